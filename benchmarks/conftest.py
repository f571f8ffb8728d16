"""``pytest benchmarks``: options, the cases of each benchmark, and the report of a measurement.

Every provider and mode of a case is a test of its own, so that they can be selected by name and pytest-benchmark lists
them side by side. All providers of a case that were selected are measured together, in turns (see harness.py), when the
first of its tests runs; each test then reports its part. pytest-benchmark has no door for times that were taken
elsewhere, so it is given a timer that plays them back: its statistics, tables and files are then those of the real
samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import COPY, OURS, Case, Measured, flops_per_second, measure, quantiles
from peak_memory import MemoryWorker

import lungkit
from lungkit.ops import _library

_ROUNDS = {"smoke": 2, "default": 5, "full": 5}
_SECONDS = {"smoke": 0.0, "default": 8.0, "full": 8.0}


class Playback:
    """A timer that is asked before and after each call and answers with the times of recorded calls."""

    def __init__(self) -> None:
        self._instants: deque[float] = deque()

    def load(self, seconds: list[float]) -> None:
        self._instants = deque(instant for value in seconds for instant in (0.0, value))

    def __call__(self) -> float:
        return self._instants.popleft()


_PLAYBACK = Playback()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lungkit benchmarks")
    choice = group.addoption
    choice("--full", dest="selection", action="store_const", const="full", default="default",
           help="every size, dtype, label type and thread count: hours")  # fmt: skip
    choice("--smoke", dest="selection", action="store_const", const="smoke",
           help="tiny sizes, two rounds: shows within a minute that the benchmarks run; the times mean nothing")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cases(function): gives the cases of a selection, device and thread counts"
    )
    options = config.option
    if options.selection == "smoke":
        options.benchmark_min_rounds, options.benchmark_max_time = 1, "0"
    elif not (options.benchmark_json or options.benchmark_save or options.benchmark_autosave):
        options.benchmark_save, options.benchmark_save_data = options.selection, True


def pytest_report_header(config: pytest.Config) -> str:
    return f"benchmarks: {config.option.selection} selection, {torch.get_num_threads()} threads and 1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises by case, mode and provider, the parts of one case next to each other."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    threads = tuple(dict.fromkeys((torch.get_num_threads(), 1)))
    no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    parameters = []
    for device, counts, marks in (("cpu", threads, ()), ("cuda", threads[:1], (no_cuda,))):
        for case in marker.args[0](metafunc.config.option.selection, device, counts):
            parameters += [
                pytest.param(case, mode, provider, id=f"{case.id}-{mode}-{provider}", marks=marks)
                for mode in case.modes
                for provider in case.providers
            ]
    metafunc.parametrize(("case", "mode", "provider"), parameters)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cases"):
            item.add_marker(pytest.mark.benchmark(timer=_PLAYBACK))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["lungkit"] = lungkit.__version__
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = _library.cpu_isa()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


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
            results[case] = _measure(case, _selected(request, case), memory_worker)
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
    case: Case, names: list[str], worker: MemoryWorker
) -> tuple[Measured, dict[str, dict[str, int]]]:
    selection = "default"
    raise NotImplementedError
