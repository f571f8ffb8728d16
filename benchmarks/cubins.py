"""Machine code of the ops, compiled for the purpose or out of a library; what ptxas gave its kernels."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sass import CSRC, tool

FATBINARY = (
    b"\x50\xed\x55\xba\x01\x00\x10\x00"  # number, version and size of the header of what nvcc made of a file
)


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel."""

    registers: int
    static_shared: int
    stack: int
    local: int


def resources_of(file: Path) -> dict[tuple[str, str], Resources]:
    """By architecture, as ``sm_90``, and name of every kernel in a cubin or a library."""
    command = [tool("cuobjdump"), "-res-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = re.search(r"\.(sm_\d+)\.cubin$", file.name)
    architecture = named[1] if named else ""
    found: dict[tuple[str, str], Resources] = {}
    pattern = r"arch = (sm_\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for entry in re.finditer(pattern, text):
        if entry[1]:
            architecture = entry[1]
        else:
            registers, stack, shared, local = map(int, entry.groups()[2:])
            found[architecture, entry[2]] = Resources(registers, shared, stack, local)
    return found


def compiled(sources: Sequence[str], architecture: str, folder: Path) -> list[Path]:
    """Cubins of the ops, in ``folder``; one that is newer than its sources is not compiled again."""
    import torch

    include = Path(torch.__file__).parent / "include"

    def make(source: str) -> Path:
        cubin = folder / f"{source}.sm_{architecture}.cubin"
        read = [*(CSRC / source).iterdir(), *(CSRC / "support").iterdir()]
        if cubin.is_file() and cubin.stat().st_mtime > max(path.stat().st_mtime for path in read):
            return cubin
        command = [
            shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", f"-arch=sm_{architecture}",
            "-std=c++20", "-O3", "-cubin", "-lineinfo", "--expt-relaxed-constexpr", "--extended-lambda", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(include),
            str(CSRC / source / "cuda.cu"), "-o", str(cubin),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return cubin

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, sources))


def of_library(library: Path, architecture: str, folder: Path) -> list[Path]:
    """The cubins of a library that was compiled with ``-lineinfo``, written to ``folder``."""
    made = []
    for number, part in enumerate(fatbinaries(library.read_bytes())):
        fatbinary = folder / f"{number}.fatbin"
        fatbinary.write_bytes(part)
        command = [tool("cuobjdump"), "-xelf", f"sm_{architecture}", fatbinary.name]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for cubin in folder.glob(f"*cuda.sm_{architecture}.cubin"):  # the same name in every part
            made.append(cubin.rename(folder / f"{number}.sm_{architecture}.cubin"))
    if not made:
        raise ValueError(f"{library} holds no code for compute capability {architecture}")
    return made


def fatbinaries(library: bytes) -> Iterator[bytes]:
    at = library.find(FATBINARY)
    while at >= 0:
        (size,) = struct.unpack_from("<Q", library, at + len(FATBINARY))
        end = at + 16 + size
        yield library[at:end]
        at = library.find(FATBINARY, end)
