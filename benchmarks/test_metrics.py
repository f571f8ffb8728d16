"""Surface metrics (HD95 and NSD at 2 mm) of a tumour and of an organ: lungkit, MONAI, edt and surface-distance.

The pair is 96 x 192 x 192 voxels of 2.5 x 0.8 x 0.8 mm.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from metrics_providers import MEASURES, SurfaceCase


def cases(selection: str, device: str, threads: tuple[int, ...]) -> list[SurfaceCase]:
    """The masks are numpy arrays: no case on a GPU."""
    if device != "cpu":
        return []
    if selection == "smoke":
        return [SurfaceCase(device, 1, "tumour", 300, (16, 32, 32))]
    return [
        SurfaceCase(device, count, name, voxels)
        for name, voxels in (("tumour", 27_000), ("organ", 930_000))
        for count in threads
    ]


@pytest.mark.cases(of=cases)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_hd95_and_nsd(report: Callable[..., None], case: SurfaceCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("provider", ["MONAI", "edt"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_providers_solve_the_same_problem(provider: str) -> None:
    case = SurfaceCase("cpu", 1, "tumour", 2_000, (32, 48, 48))
    try:
        measure = MEASURES[provider](1)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    pair = case.inputs()
    assert measure(pair) == pytest.approx(MEASURES["lungkit"](1)(pair), abs=1e-4)
