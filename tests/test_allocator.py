"""Freed memory that the process keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

_CHILD = """
import ctypes, resource, lungkit
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
print(lungkit.keep_freed_memory() if {keep} else None)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(4):
    before = faults()
    block = libc.malloc({bytes})
    ctypes.memset(block, 1, {bytes})
    libc.free(block)
    counts.append(faults() - before)
print(sum(counts[1:]) * resource.getpagesize() / {bytes})
"""


def run(*, keep: bool, size: int, **environment: str) -> tuple[str, float]:
    """What the call returned, and how many of three blocks, after a first, were asked of the system anew."""
    clean = {
        name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.format(keep=keep, bytes=size)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    returned, share = done.stdout.split()
    return returned, float(share)


@needs_glibc
def test_a_freed_block_is_used_again():
    assert run(keep=False, size=1 << 27)[1] > 2.5
    returned, share = run(keep=True, size=1 << 27)
    assert returned == "True"
    assert share < 0.1


@needs_glibc
def test_a_block_as_large_as_a_long_scan_is_given_back():
    assert run(keep=True, size=(1 << 30) + (1 << 20))[1] > 2.5


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stands(name):
    assert run(keep=True, size=1 << 22, **{name: "1000000"})[0] == "False"


_FRAGMENTS = """
import ctypes, lungkit
from lungkit._allocator import release_free_memory
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
lungkit.keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [libc.malloc(1 << 20) for _ in range(256)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
for block in blocks[:-1]:
    libc.free(block)
before = resident()
print(release_free_memory(), (before - resident()) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@needs_glibc
def test_what_is_free_below_a_block_in_use_is_given_back_on_request():
    clean = {
        name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", _FRAGMENTS], env=clean, capture_output=True, text=True, check=True
    )
    released, mebibytes = done.stdout.split()
    assert released == "True" and int(mebibytes) >= 250
