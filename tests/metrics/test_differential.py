"""The same numbers as MONAI, scikit-learn and surface-distance, where their definitions are ours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from lungkit.data import read_volume
from lungkit.metrics import (
    EmptyPolicy,
    assd_mm,
    evaluate_case,
    hausdorff_mm,
    label_surface_distances,
    surface_dice,
    surface_distances,
)

monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed (extra 'test')")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def blobs(shape: tuple[int, ...], seed: int, classes: int = 2) -> np.ndarray:
    """Smooth random label map, 0..classes-1."""
    random = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(random.random(shape), 2.0) for _ in range(classes)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def one_voxel(shape: tuple[int, ...], *at: int) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[at] = 1
    return mask


SPACING = {2: (0.7, 1.3), 3: (2.5, 0.8, 0.7)}
PAIRS = {
    "blobs 2D": (blobs((40, 50), 0), blobs((40, 50), 1)),
    "blobs 3D": (blobs((10, 30, 40), 0), blobs((10, 30, 40), 1)),
    "noise": (blobs((6, 20, 20), 2), (np.random.default_rng(0).random((6, 20, 20)) < 0.3).astype(np.uint8)),
    "touching borders": (
        np.ones((4, 8, 9), np.uint8),
        np.pad(np.ones((2, 6, 9), np.uint8), ((2, 0), (0, 2), (0, 0))),
    ),
    "one voxel": (one_voxel((5, 6, 7), 0, 0, 0), one_voxel((5, 6, 7), 4, 5, 6)),
    "same": (blobs((10, 20, 20), 3), blobs((10, 20, 20), 3)),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    return PAIRS[request.param]


def as_monai(labels: np.ndarray, classes: int = 2) -> torch.Tensor:
    """One-hot (1, K, *S)."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), classes)
    return one_hot.movedim(-1, 0)[None]


def test_overlap_equals_monais(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, truth = pair
    ours = evaluate_case(prediction, truth, 2).of_class(1)
    first, second = as_monai(prediction), as_monai(truth)
    confusion = monai.get_confusion_matrix(first, second, include_background=False)
    theirs = {
        "dice": monai.compute_dice(first, second, include_background=False),
        "iou": monai.compute_iou(first, second, include_background=False),
        "sensitivity": monai.compute_confusion_matrix_metric("sensitivity", confusion),
        "specificity": monai.compute_confusion_matrix_metric("specificity", confusion),
        "ppv": monai.compute_confusion_matrix_metric("precision", confusion),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("prediction_empty", [False, True])
def test_truth_without_foreground_is_nan_as_in_monai(prediction_empty: bool) -> None:
    truth = np.zeros((4, 5), np.uint8)
    prediction = truth if prediction_empty else one_voxel((4, 5), 1, 1)
    ours = evaluate_case(prediction, truth, 2, empty=EmptyPolicy.NAN_IF_TRUTH_EMPTY).of_class(1)["dice"]
    theirs = float(monai.compute_dice(as_monai(prediction), as_monai(truth), include_background=False))
    assert math.isnan(ours) and math.isnan(theirs)


@pytest.mark.parametrize("prediction_empty", [False, True])
@pytest.mark.parametrize("truth_empty", [False, True])
def test_empty_pairs_count_as_in_monai_without_ignore_empty(
    prediction_empty: bool, truth_empty: bool
) -> None:
    full = one_voxel((4, 5), 1, 1)
    prediction, truth = full * (not prediction_empty), full * (not truth_empty)
    ours = evaluate_case(prediction, truth, 2, empty=EmptyPolicy.PERFECT_IF_BOTH_EMPTY).of_class(1)["dice"]
    theirs = monai.compute_dice(
        as_monai(prediction), as_monai(truth), include_background=False, ignore_empty=False
    )
    assert ours == float(theirs)


@pytest.mark.parametrize("percentile", [None, 95, 50])
def test_hausdorff_equals_monais(pair: tuple[np.ndarray, np.ndarray], percentile: float | None) -> None:
    prediction, truth = pair
    spacing = SPACING[prediction.ndim]
    ours = hausdorff_mm(surface_distances(prediction, truth, spacing), percentile=percentile or 100)
    theirs = monai.compute_hausdorff_distance(
        as_monai(prediction), as_monai(truth), percentile=percentile, spacing=spacing
    )
    assert ours == pytest.approx(float(theirs), abs=1e-4)


@pytest.mark.parametrize("tolerance_mm", [0.5, 1.0, 3.1])
def test_surface_dice_equals_monais(pair: tuple[np.ndarray, np.ndarray], tolerance_mm: float) -> None:
    prediction, truth = pair
    spacing = SPACING[prediction.ndim]
    ours = surface_dice(surface_distances(prediction, truth, spacing), tolerance_mm)
    theirs = monai.compute_surface_dice(
        as_monai(prediction), as_monai(truth), [tolerance_mm], spacing=spacing
    )
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_assd_equals_monais(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, truth = pair
    spacing = SPACING[prediction.ndim]
    ours = assd_mm(surface_distances(prediction, truth, spacing))
    theirs = monai.compute_average_surface_distance(
        as_monai(prediction), as_monai(truth), symmetric=True, spacing=spacing
    )
    assert ours == pytest.approx(float(theirs), abs=1e-4)


def test_every_label_equals_monais() -> None:
    prediction, truth = blobs((10, 30, 40), 4, classes=4), blobs((10, 30, 40), 5, classes=4)
    sets = label_surface_distances(prediction, truth, labels=(1, 2, 3), spacing_mm=SPACING[3])
    theirs = monai.compute_hausdorff_distance(
        as_monai(prediction, 4), as_monai(truth, 4), percentile=95, spacing=SPACING[3]
    )
    assert [hausdorff_mm(label) for label in sets] == pytest.approx(theirs[0].tolist(), abs=1e-4)


def test_overlap_equals_scikit_learns(pair: tuple[np.ndarray, np.ndarray]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra 'test')")
    prediction, truth = (labels.reshape(-1) for labels in pair)
    ours = evaluate_case(prediction, truth, 2).of_class(1)
    theirs = {
        "dice": sklearn.f1_score(truth, prediction),
        "iou": sklearn.jaccard_score(truth, prediction),
        "ppv": sklearn.precision_score(truth, prediction, zero_division=np.nan),
        "sensitivity": sklearn.recall_score(truth, prediction, zero_division=np.nan),
        "specificity": sklearn.recall_score(truth, prediction, pos_label=0, zero_division=np.nan),
    }
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, nan_ok=True)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hausdorff_of_a_shifted_block_equals_surface_distances(axis: int) -> None:
    # That package puts the surface between the voxels; for a shifted block this moves both surfaces alike.
    theirs = pytest.importorskip("surface_distance.metrics", reason="surface-distance is not installed")
    truth = np.zeros((12, 14, 16), bool)
    truth[3:7, 3:8, 3:9] = True
    prediction = np.roll(truth, 3, axis)
    distances = theirs.compute_surface_distances(truth, prediction, SPACING[3])
    expected = theirs.compute_robust_hausdorff(distances, 100)
    assert hausdorff_mm(surface_distances(prediction, truth, SPACING[3]), percentile=100) == pytest.approx(
        expected
    )


def test_dice_equals_surface_distances(pair: tuple[np.ndarray, np.ndarray]) -> None:
    theirs = pytest.importorskip("surface_distance.metrics", reason="surface-distance is not installed")
    prediction, truth = pair
    expected = theirs.compute_dice_coefficient(truth.astype(bool), prediction.astype(bool))
    assert evaluate_case(prediction, truth, 2).of_class(1)["dice"] == pytest.approx(expected)


def test_surfaces_of_a_real_tumour_equal_monais(real_data: Path) -> None:
    volume = read_volume(real_data / "nsclc_ct" / "labelsTr" / "nsclc_pat1.nii.gz")
    truth = (volume.array != 0).astype(np.uint8)
    prediction = ndimage.binary_dilation(np.roll(truth, 2, 0), iterations=2).astype(np.uint8)
    distances = surface_distances(prediction, truth, volume.spacing_mm)
    first, second = as_monai(prediction), as_monai(truth)
    expected = monai.compute_hausdorff_distance(first, second, percentile=95, spacing=volume.spacing_mm)
    assert hausdorff_mm(distances) == pytest.approx(float(expected), abs=1e-4)
    expected = monai.compute_surface_dice(first, second, [1.7], spacing=volume.spacing_mm)
    assert surface_dice(distances, 1.7) == pytest.approx(float(expected), abs=1e-6)
