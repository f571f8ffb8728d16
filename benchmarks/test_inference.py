"""From a scan to its mask: lungkit's predictor and sliding window, MONAI's, and the whole volume at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from inference_providers import PROVIDERS, InferenceCase, network_of

from lungkit.inference import gaussian_weights

_CUBE, _CHEST = (256, 256, 256), (300, 512, 512)


def cases(selection: str, device: str, threads: tuple[int, ...]) -> list[InferenceCase]:
    """ "smoke" runs in seconds, "default" in minutes, "full" in hours."""

    def case(
        network: str, size: tuple[int, int, int], patch: tuple[int, ...], batch: int, count: int
    ) -> InferenceCase:
        return InferenceCase(device, count, network, size, patch, batch)

    many, batches = threads[0], (1, 4)
    if selection == "smoke":
        cases = [case(network, (16, 24, 24), (8, 16, 16), 2, many) for network in ("attention", "pointwise")]
        return [*cases, case("attention", (4, 16, 16), (16, 16), 2, many)]
    # On a CPU the network takes most of the time: a few windows show as much as many.
    few = selection == "default" and device == "cpu"
    size, counts = ((96, 144, 144), (many,)) if few else (_CUBE, threads)
    both = list(product(batches, counts))
    return [
        *(case("attention", size, (64, 96, 96), batch, count) for batch, count in both),
        *(
            case("attention", (64, 128, 128), (128, 128), batch, count)
            for batch in (1, 16)
            for count in counts
        ),
        *(case("attention", (16, 512, 512), (512, 512), 1, count) for count in counts),
        *(case("pointwise", _CUBE, (64, 128, 128), batch, count) for batch, count in both),
        *(case("pointwise", _CHEST, (64, 128, 128), 4, count) for count in counts),
    ]


@pytest.mark.cases(of=cases)
def test_inference(report: Callable[..., None], case: InferenceCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_providers_solve_the_same_problem(provider: str) -> None:
    if provider == "MONAI":
        pytest.importorskip("monai", reason="MONAI is not installed (extra 'test')")
    case = InferenceCase("cpu", 1, "pointwise", (24, 48, 40), (16, 32, 32), 2)
    inputs = case.inputs()
    mask = case.build(provider, inputs).forward()
    assert torch.equal(mask, torch.from_numpy(inputs[0].array.transpose(2, 1, 0) > 0).byte())


@pytest.mark.parametrize("patch", [(8, 16, 16), (24, 24)], ids=str)
@pytest.mark.parametrize("provider", ["lungkit, tensor", "MONAI"])
def test_the_same_windows_and_weights_give_the_same_mask(provider: str, patch: tuple[int, ...]) -> None:
    case = InferenceCase("cpu", 1, "attention", (16, 24, 24), patch, 2)
    inputs = case.inputs()
    options = {}
    if provider == "MONAI":
        pytest.importorskip("monai", reason="MONAI is not installed (extra 'test')")
        # Its own Gaussian, cut off below 0.001, changes the mask at the borders of the scan.
        z, y, x = map(gaussian_weights, (1, *patch)[-3:])
        options["roi_weight_map"] = z[:, None, None] * y[:, None] * x
    mask = PROVIDERS[provider](case, network_of("attention", len(patch)), **options)(inputs)
    expected = case.build("lungkit", inputs).forward()
    assert 0.1 < expected.float().mean() < 0.9
    assert (mask != expected).float().mean() < 1e-3  # rounding decides ties
