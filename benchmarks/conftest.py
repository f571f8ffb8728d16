"""``pytest benchmarks``: options, the cases of each benchmark, and the report of a measurement.

Every provider and mode of a case is a test of its own, so that they can be selected by name and pytest-benchmark lists
them side by side. All providers of a case that were selected are measured together, in turns (see harness.py), when the
first of its tests runs; each test then reports its part. pytest-benchmark has no door for times that were taken
elsewhere, so it is given a timer that plays them back: its statistics, tables and files are then those of the real
samples.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import summary
import torch
from harness import COPY, OURS, Case, Measured, flops_per_second, measure, quantiles
from peak_memory import MemoryWorker

import lungkit
from lungkit.ops import _library

_ROUNDS = {"smoke": 2, "default": 5, "full": 5}
_MOST_COPIES = 16  # of the main input, that the inputs and the hungriest provider take together
_SECONDS = {"smoke": 0.0, "default": 6.0, "full": 6.0}


class Playback:
    """A timer that is asked before and after each call and answers with the times of recorded calls."""

    def __init__(self) -> None:
        self._instants: deque[float] = deque()

    def load(self, seconds: list[float]) -> None:
        self._instants = deque(instant for value in seconds for instant in (0.0, value))

    def __call__(self) -> float:
        return self._instants.popleft()


FALLBACK = "plain PyTorch"
_PLAYBACK = Playback()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lungkit benchmarks")
    sizes = {
        "full": "every size, dtype, label type and thread count: hours",
        "smoke": "tiny sizes, two rounds: shows within a minute that all of it runs; the times mean nothing",
    }
    for name, text in sizes.items():
        group.addoption(
            f"--{name}", dest="selection", action="store_const", const=name, default="default", help=text
        )
    group.addoption(
        "--allow-fallback",
        action="store_true",
        help=f"go on where lungkit's kernels are not loaded; its rows are then named '{FALLBACK} for {OURS}'",
    )
    group.addoption(
        "--keep-freed-memory",
        action="store_true",
        help="let the process keep what it frees, for all providers alike, as lungkit's commands do on Linux",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cases(of): function that gives the cases of a selection, device and thread counts"
    )
    options = config.option
    if not _library.CPU_LIBRARY.loaded and not options.allow_fallback:
        raise pytest.UsageError(
            f"lungkit from {Path(lungkit.__file__).parent} would be timed without its kernels: "
            f"{_library.CPU_LIBRARY.reason}. --allow-fallback times plain PyTorch under that name"
        )
    if options.keep_freed_memory and not lungkit.keep_freed_memory():
        raise pytest.UsageError(
            "--keep-freed-memory has no effect here: it needs glibc, and no malloc settings in the environment"
        )
    if options.selection == "smoke":
        options.benchmark_min_rounds, options.benchmark_max_time = 1, "0"
    if not (options.benchmark_json or options.benchmark_save or options.benchmark_autosave):
        options.benchmark_save, options.benchmark_save_data = options.selection, True


def pytest_report_header(config: pytest.Config) -> list[str]:
    threads = torch.get_num_threads()
    kept = "kept by the process" if config.option.keep_freed_memory else "given back as the C library likes"
    selection = f"{config.option.selection} selection, cases on the CPU with {threads} threads and 1"
    return [
        f"benchmarks: {selection}, freed memory {kept}",
        f"benchmarks: lungkit {lungkit.__version__} from {Path(lungkit.__file__).parent}",
        *(f"benchmarks: {backend} kernels {_kernels(backend)}" for backend in ("cpu", "cuda")),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises by case, mode and provider, the parts of one case next to each other."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    selection = metafunc.config.option.selection
    # Threads wait long for each other on a busy machine, and a smoke run measures nothing.
    threads = (1,) if selection == "smoke" else tuple(dict.fromkeys((torch.get_num_threads(), 1)))
    no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    parameters = []
    for device, counts, marks in (("cpu", threads, ()), ("cuda", threads[:1], (no_cuda,))):
        for case in marker.kwargs["of"](selection, device, counts):
            parameters += [
                pytest.param(case, mode, provider, id=f"{case.id}-{mode}-{provider}", marks=marks)
                for mode in case.modes
                for provider in case.providers
            ]
    metafunc.parametrize(("case", "mode", "provider"), parameters)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [bench.extra_info for bench in config._benchmarksession.benchmarks if "op" in bench.extra_info]
    if rows:
        terminalreporter.section("lungkit benchmarks")
        terminalreporter.write_line(summary.table(rows))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cases"):
            item.add_marker(pytest.mark.benchmark(timer=_PLAYBACK))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lungkit"] = lungkit.__version__
    machine_info["torch"] = torch.__version__
    machine_info["compared_with"] = {name: _version(name) for name in ("monai", "edt", "surface-distance")}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["freed_memory_kept"] = config.option.keep_freed_memory
    machine_info["instruction_set"] = _library.cpu_isa()
    machine_info["selection"] = config.option.selection
    machine_info["lungkit_from"] = "a checkout" if _library.checkout() else "an installation"
    machine_info["kernels"] = {backend: _kernels(backend) for backend in ("cpu", "cuda")}
    machine_info["native_ops"] = [
        f"{name} ({backend})"
        for name in _library.defined_ops()
        for backend in ("cpu", "cuda")
        if _library.is_native(name, backend)
    ]
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _kernels(backend: str) -> str:
    """Whether lungkit's kernels are what is timed on "cpu" or "cuda", and why not."""
    library = _library.CPU_LIBRARY if backend == "cpu" else _library.CUDA_LIBRARY
    return "loaded" if library.loaded else f"NOT LOADED: {library.reason}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="session")
def memory_worker() -> Iterator[MemoryWorker]:
    with MemoryWorker() as worker:
        yield worker


@pytest.fixture(scope="session")
def results() -> dict[str, Any]:
    """The measurement of the case at hand, under its name; the one before is dropped."""
    return {}


@pytest.fixture
def report(
    request: pytest.FixtureRequest, benchmark: Any, memory_worker: MemoryWorker, results: dict[str, Any]
) -> Callable[[Case, str, str], None]:
    """Call with case, mode and provider: measures the case once and reports this part of it."""

    def run(case: Case, mode: str, provider: str) -> None:
        if case not in results:
            results.clear()
            results[case] = _measure(request.config, case, _selected(request, case), memory_worker)
        measured, peaks = results[case]
        if provider in measured.left_out:
            pytest.skip(f"{provider}: {measured.left_out[provider]}")
        seconds = measured.samples[provider].of(mode)
        benchmark.group = f"{case.op} {mode} {case.id}"
        benchmark.extra_info.update(_row(case, mode, provider, measured, peaks))
        _PLAYBACK.load(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return run


def _selected(request: pytest.FixtureRequest, case: Case) -> list[str]:
    found = {
        item.callspec.params["provider"]
        for item in request.session.items
        if item.name.startswith(f"{request.node.originalname}[") and item.callspec.params["case"] == case
    }
    return [name for name in case.providers if name in found]


def _measure(
    config: pytest.Config, case: Case, names: list[str], worker: MemoryWorker
) -> tuple[Measured, dict[str, dict[str, int]]]:
    selection = config.option.selection
    _skip_what_does_not_fit(case)
    measured = measure(case, names, seconds=_SECONDS[selection], rounds=_ROUNDS[selection])
    return measured, worker.measure(case, [name for name in names if name not in measured.left_out])


def _skip_what_does_not_fit(case: Case) -> None:
    """On the CPU, where running out of memory ends the process; on CUDA it ends one provider."""
    main = case.main_bytes()
    if case.device != "cpu" or main is None:
        return
    needed, free = _MOST_COPIES * main, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        pytest.skip(f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def _row(
    case: Case, mode: str, provider: str, measured: Measured, peaks: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What the summary shows of one provider and mode; times in seconds, memory in bytes."""
    seconds = measured.samples[provider].of(mode)
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.label,
        "device": case.device,
        "threads": case.threads,
        "mode": mode,
        "provider": _label(case, provider),
        "seconds": quantiles(seconds),
        "peak_memory": peaks.get(provider, {}).get(mode),
        "main_bytes": case.main_bytes(),
        "launches": measured.launches.get(provider, {}).get(mode),
    }
    if OURS in measured.samples:
        ours = measured.samples[OURS].of(mode)
        row["times_ours"] = quantiles([a / b for a, b in zip(seconds, ours, strict=True)])
    return row | _bound(case, mode, quantiles(seconds)[1], measured)


def _label(case: Case, provider: str) -> str:
    fallback = provider.startswith(OURS) and _kernels(case.device) != "loaded"
    return f"{FALLBACK} for {provider}" if fallback else provider


def _bound(case: Case, mode: str, median: float, measured: Measured) -> dict[str, Any]:
    """The time that the machine needs at least, by bytes or by arithmetic, as a share of the time taken."""
    fewest, flops = case.fewest_bytes(), case.flops()
    if fewest is None:
        return {}
    copy_seconds = quantiles(measured.samples[COPY].of(mode))[1]
    least = {"bytes": copy_seconds}
    if flops is not None:
        work = sum(flops.values()) if mode == "both" else flops[mode]
        least["arithmetic"] = work / flops_per_second(case.device, case.threads, case.dtype)
    bound = max(least, key=lambda name: least[name])
    moved = sum(fewest.values()) if mode == "both" else fewest[mode]
    return {
        "fewest_bytes": moved,
        "copy_bytes_per_second": moved / copy_seconds,
        "bound": bound,
        "share_of_bound": least[bound] / median,
        "share_of_copy_bandwidth": copy_seconds / median,
    }
