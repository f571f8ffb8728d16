"""The emulator that runs CUDA kernels on the CPU: right kernels pass in every thread order, wrong ones are caught."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.emulator import Emulator
from op_kernels import schedules_of

SOURCES = Path(__file__).parent / "cuda_on_cpu"
SELF_TEST = ("self_test.cpp", "self_test_unit.cpp")

RIGHT = [
    "block_reduction",
    "warp_scan",
    "tiled_transpose",
    "histogram",
    "last_block",
    "votes",
    "shuffles",
    "half_warps",
    "partial_warp",
    "early_exit",
    "kernel_arguments",
    "intrinsics",
    "runtime_api",
    "statistics_count",
    "every_block_runs_once",
    "orders_differ",
    "translation_units",
    "launches_after_an_error",
    "launches_from_threads",
]

# A kernel that breaks a rule, and what the message must say.
REPORTED = {
    "barrier_after_exit": "7 of 64 threads wait at __syncthreads",
    "two_barriers": "all threads of a block must reach the same barrier",
    "exited_lane": "lane 8 of warp 0), which the mask names, has exited",
    "source_outside_mask": "with the mask 0xff and reads lane 8, which the mask leaves out",
    "caller_outside_mask": "which leaves out its own lane",
    "missing_lane": "reads lane 31, which its warp does not have",
    "two_shuffles": "all lanes of a mask must make the same call",
    "barrier_against_shuffle": "which the mask names, waits at __syncthreads",
    "two_masks": "which the mask names, has exited",
    "odd_width": "with the width 12; it must be 1, 2, 4, 8, 16 or 32",
    "trap": "thread (5, 0, 0) (lane 5 of warp 0) called __trap",
    "block_too_large": "the block is (33, 32, 1); it must have 1 to 1024 threads",
    "block_empty": "the block is (32, 0, 1); it must have 1 to 1024 threads",
    "grid_empty": "the grid is (4, 0, 1); every size must be at least 1",
    "grid_too_high": "the grid is (1, 65536, 1); x may be at most 2147483647, y and z 65535",
    "shared_too_large": "233472 bytes of dynamic shared memory; a block has at most 232448",
    "shared_without_opt_in": "49153 bytes of dynamic shared memory, but it may have 49152; call cudaFuncSet",
    "shared_opt_in": "emulated kernel other: 102400 bytes of dynamic shared memory, but it may have 49152",
    "launch_in_a_kernel": "emulated kernel inner: launched from inside a kernel",
    "exception_of_a_thread": "thrown by thread 9",
}

SANITISED = {
    "store_behind_global": "heap-buffer-overflow",
    "store_behind_dynamic": "heap-buffer-overflow",
    "store_behind_static": "out of bounds for type 'float [64]'",
    "signed_overflow": "signed integer overflow",
    "misaligned_load": "misaligned address",
    "endless_recursion": "stack-overflow",
}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory):
    """Compiles sources of tests/cuda_on_cpu; the workers of one pytest run share the results."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    temporary = tmp_path_factory.getbasetemp()
    folder = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary

    def compile_program(name: str, sources: tuple[str, ...], *options: str) -> Path:
        program = folder / name
        command = ["g++", "-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-o", str(program)]
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not program.exists():
                done = subprocess.run(
                    [*command, *(str(SOURCES / source) for source in sources), *options],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
        return program

    return compile_program


@pytest.fixture(scope="session")
def self_test(build) -> Path:
    return build("self_test", SELF_TEST, "-O2")


@pytest.fixture(scope="session")
def sanitised_self_test(build) -> Path:
    options = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return build("self_test_sanitised", SELF_TEST, *options)


@pytest.fixture(scope="session")
def portable_self_test(build) -> Path:
    """Fibres without assembly, as on processors other than x86-64."""
    return build("self_test_portable", SELF_TEST, "-O0", "-DLUNGKIT_EMULATOR_UCONTEXT")


@pytest.fixture(scope="session")
def emulator(build) -> Emulator:
    """``torch.ops.lungkit_emulator_test``, whose kernels run on the emulator."""
    torch_folder = Path(torch.__file__).parent
    library = build(
        "self_test_library.so",
        ("self_test_library.cpp",),
        "-O1", "-shared", "-fPIC", "-Wno-unused-function", "-isystem", str(torch_folder / "include"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        "-Wl,--no-as-needed", str(torch_folder / "lib" / "libtorch.so"),
    )  # fmt: skip
    torch.ops.load_library(str(library))
    return Emulator(library)


def run(program: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LUNGKIT_EMULATOR")}
    return subprocess.run(
        [program, mode], env=inherited | environment, capture_output=True, text=True, check=False, timeout=120
    )


def assert_passes(program: Path, mode: str, **environment: str) -> None:
    done = run(program, mode, **environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", RIGHT)
def test_right_kernels_pass_in_every_order(self_test, mode):
    assert_passes(self_test, mode)


@pytest.mark.parametrize("mode", RIGHT)
def test_right_kernels_are_clean_under_the_sanitisers(sanitised_self_test, mode):
    assert_passes(sanitised_self_test, mode)


@pytest.mark.parametrize(
    "mode", ["block_reduction", "shuffles", "launches_after_an_error", "missing_barrier"]
)
def test_fibres_without_assembly_behave_the_same(portable_self_test, mode):
    assert_passes(portable_self_test, mode)


@pytest.mark.parametrize(
    "mode", ["missing_barrier", "missing_second_barrier", "missing_syncwarp", "float_atomics"]
)
def test_results_that_depend_on_the_order_are_noticed(self_test, mode):
    assert_passes(self_test, mode)


@pytest.mark.parametrize("mode", ["stale_static_shared", "stale_dynamic_shared"])
def test_shared_memory_does_not_outlive_its_block(self_test, mode):
    assert_passes(self_test, mode)


@pytest.mark.parametrize("mode", REPORTED)
def test_broken_rules_are_reported(self_test, mode):
    done = run(self_test, mode)
    assert done.returncode == 3
    assert REPORTED[mode] in done.stderr


@pytest.mark.parametrize("mode", REPORTED)
def test_reports_leave_nothing_behind_for_the_sanitisers(sanitised_self_test, mode):
    done = run(sanitised_self_test, mode)
    assert done.returncode == 3, done.stderr
    assert "Sanitizer" not in done.stderr


@pytest.mark.parametrize("mode", SANITISED)
def test_sanitisers_see_into_kernels(sanitised_self_test, mode):
    done = run(sanitised_self_test, mode)
    assert done.returncode == 1
    assert SANITISED[mode] in done.stderr


def test_store_behind_dynamic_shared_memory_is_reported_without_sanitisers_too(self_test):
    done = run(self_test, "store_behind_dynamic")
    assert done.returncode == 3
    assert "wrote past the end of the dynamic shared memory" in done.stderr


def test_static_and_dynamic_shared_memory_share_the_limit(self_test):
    done = run(self_test, "static_beside_dynamic")
    assert done.returncode == 3
    assert (
        "49024 bytes of dynamic and at least 256 bytes of static shared memory; together they may have 49152"
        in (done.stderr)
    )


def test_stack_overflow_hits_the_guard_page(self_test):
    assert run(self_test, "endless_recursion").returncode == -signal.SIGSEGV


def test_order_is_read_from_the_environment(self_test):
    assert run(self_test, "print_order", LUNGKIT_EMULATOR_ORDER="reverse").stdout == "7 6 5 4 3 2 1 0 "


def test_seed_is_read_from_the_environment(self_test):
    orders = [
        run(self_test, "print_order", LUNGKIT_EMULATOR_ORDER="random", LUNGKIT_EMULATOR_SEED=seed).stdout
        for seed in ("7", "7", "8")
    ]
    assert orders[0] == orders[1] != orders[2]


def test_unknown_order_in_the_environment_is_refused(self_test):
    done = run(self_test, "print_order", LUNGKIT_EMULATOR_ORDER="backwards")
    assert done.returncode == 3
    assert "LUNGKIT_EMULATOR_ORDER is 'backwards'; set it to forward, reverse or random" in done.stderr


def test_emulated_op_gives_the_same_bits_in_every_order(emulator):
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.ops.lungkit_emulator_test.sum(x), x.sum())
    schedules_of("emulated", emulator).assert_same_bits(lambda: [torch.ops.lungkit_emulator_test.sum(x)])


def test_comparison_of_orders_notices_a_missing_barrier(emulator):
    x = torch.ones(256)
    with pytest.raises(AssertionError, match=r"other bits in order reverse \(seed 0\) than in order forward"):
        schedules_of("emulated", emulator).assert_same_bits(
            lambda: [torch.ops.lungkit_emulator_test.sum_without_barrier(x)]
        )


def test_launches_of_an_emulated_op_are_counted(emulator):
    with emulator.counted() as counts:
        torch.ops.lungkit_emulator_test.sum(torch.ones(10))
    assert (counts.launches, counts.blocks, counts.threads) == (2, 5, 5 * 256)


def test_emulator_error_is_a_python_error(emulator):
    with pytest.raises(RuntimeError, match=r"barrier_after_exit, block \(0, 0, 0\): 7 of 256 threads wait"):
        torch.ops.lungkit_emulator_test.divergent_barrier(torch.ones(1))


def test_emulator_runs_on_after_an_error(emulator):
    with pytest.raises(RuntimeError):
        torch.ops.lungkit_emulator_test.divergent_barrier(torch.ones(1))
    assert torch.ops.lungkit_emulator_test.sum(torch.ones(500)) == 500
