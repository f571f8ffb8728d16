"""Scans unlike those of training raise a doubt; ordinary CT, however padded, cropped or enhanced, raises none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_cases import save_model, threshold_network

from lungkit import Predictor
from lungkit.data import Preprocessing, Volume, make_phantom, open_dataset, read_case
from lungkit.data.fingerprint import ChannelFingerprint
from lungkit.data.preprocessing import ChannelNormalisation
from lungkit.errors import DataError
from lungkit.inference import TrainedModel
from lungkit.inference.scan_doubts import scan_doubts

AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])
KNOWN = {
    "HU": ChannelFingerprint("CT", "HU", "int16", -1024, 3071, -38, 200, -850, 156, (-1000, -700, 300)),
    "8-bit": ChannelFingerprint("CT", "8-bit", "uint8", 0, 255, 120, 40, 20, 240, (0, 60, 230)),
    "offset": ChannelFingerprint("CT", "arbitrary", "uint16", 0, 4095, 980, 200, 150, 1180, (0, 300, 1320)),
    "z-scores": ChannelFingerprint("CT", "arbitrary", "float32", -1.6, 9.5, 1.2, 0.3, -0.5, 1.9, (-1.5, -0.8, 1.7)),
    "0..1": ChannelFingerprint("CT", "arbitrary", "float32", 0, 1, 0.5, 0.2, 0.1, 0.9, (0.0, 0.2, 0.9)),
}  # fmt: skip
WINDOWS = {
    "HU": (-1000.0, 400.0),
    "8-bit": (20.0, 240.0),
    "offset": (150.0, 1180.0),
    "z-scores": (-0.5, 1.9),
    "0..1": (0.1, 0.9),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainedModel]:
    folder = tmp_path_factory.mktemp("models")
    count = iter(range(1000))

    def build(units: str, **description: Any) -> TrainedModel:
        known = KNOWN[units]
        channel = ChannelNormalisation(WINDOWS[units], known.mean, known.std, known.units)
        plan = Preprocessing((channel,), {0: 0, 1: 1})
        content = {"intensities": [known.__dict__], **description}
        path = save_model(folder / str(next(count)), threshold_network(), preprocessing=plan, **content)
        return TrainedModel.load(path)

    return build


@pytest.fixture(scope="module")
def ct() -> np.ndarray:
    """A noisy thorax in HU, (X, Y, Z)."""
    return np.ascontiguousarray(make_phantom(3, shape=(24, 96, 96)).image.transpose(2, 1, 0))


def stretched(hu: np.ndarray) -> np.ndarray:
    return (np.clip(hu, -1000, 400) + 1000) / 1400


DISGUISES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "HU + 1024": lambda hu: (hu.astype(np.int32) + 1024).astype(np.uint16),
    "HU + 1000": lambda hu: (hu.astype(np.int32) + 1000).astype(np.int16),
    "HU + 1024 in float": lambda hu: hu.astype(np.float32) + 1024,
    "HU + 1024, padded": lambda hu: np.pad(hu[4:-4] + np.int16(1024), ((4, 4), (0, 0), (0, 0)), constant_values=-976),
    "HU + 32768": lambda hu: (hu.astype(np.int32) + 32768).astype(np.uint16),
    "uint16": lambda hu: (stretched(hu) * 65535).astype(np.uint16),
    "z-scores": lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32),
    "z-scores of the window": lambda hu: ((np.clip(hu, -1000, 400) + 300) / 350).astype(np.float32),
    "0..1": lambda hu: stretched(hu).astype(np.float32),
    "-1..1": lambda hu: (2 * stretched(hu) - 1).astype(np.float64),
    "8-bit": lambda hu: (255 * stretched(hu)).astype(np.uint8),
    "0..255 in float": lambda hu: (255 * stretched(hu)).astype(np.float32),
    "HU / 1000": lambda hu: hu / np.float32(1000),
    "HU * 10": lambda hu: hu.astype(np.int32) * 10,
    "clipped to soft tissue": lambda hu: np.clip(hu, -160, 240),
    "clipped above": lambda hu: np.clip(hu, -1024, 200),
    "clipped below": lambda hu: np.clip(hu, -500, None),
}  # fmt: skip


@pytest.mark.parametrize("disguise", DISGUISES)
def test_ct_in_disguise_raises_a_doubt_of_a_model_of_hu(
    models: Callable[..., TrainedModel], ct: np.ndarray, disguise: str
) -> None:
    found = scan_doubts(models("HU"), [Volume(DISGUISES[disguise](ct), AFFINE)])
    assert len(found) == 1
    assert "trained on HU; the mask cannot be trusted" in found[0]


@pytest.mark.parametrize("disguise", [name for name in DISGUISES if not name.startswith("clipped")])
def test_checkpoints_without_intensities_still_tell_units(
    models: Callable[..., TrainedModel], ct: np.ndarray, disguise: str
) -> None:
    model = replace(models("HU"), intensities=None)
    assert len(scan_doubts(model, [Volume(DISGUISES[disguise](ct), AFFINE)])) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu,
        lambda hu: hu.astype(np.float32) + 0.25,
        lambda hu: np.where(hu < -900, np.int16(-2000), hu),
        lambda hu: np.pad(hu, ((9, 9), (9, 9), (0, 0)), constant_values=-2000),
        lambda hu: np.pad(hu, ((9, 9), (9, 9), (0, 0)), constant_values=-3024),
        lambda hu: np.pad(hu, ((9, 9), (9, 9), (0, 0)), constant_values=-1024),
        lambda hu: np.pad(hu, ((9, 9), (9, 9), (0, 0)), constant_values=-32768),
        lambda hu: np.clip(hu, -1000, 400),
        lambda hu: np.clip(hu, -1024, 600),
        lambda hu: np.clip(hu, -1024, 3071),
        lambda hu: np.where(hu > 500, np.int16(3071), hu),
        lambda hu: np.where((hu > -50) & (np.arange(hu.shape[1])[None, :, None] % 9 == 0), np.int16(450), hu),
        lambda hu: np.full(hu.shape, -1000, np.int16),
        lambda hu: (hu > -300).astype(np.int16) * 1000 - 1000,
    ],
    ids=[
        *("plain", "float", "air -2000", "padded -2000", "padded -3024", "padded -1024", "padded -32768"),
        *(
            "clipped as the window",
            "clipped wider",
            "12 bits",
            "metal",
            "contrast",
            "nothing but air",
            "two values",
        ),
    ],
)
def test_ordinary_ct_raises_no_doubt(
    models: Callable[..., TrainedModel], ct: np.ndarray, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    for model in (models("HU"), replace(models("HU"), intensities=None)):
        assert scan_doubts(model, [Volume(change(ct), AFFINE)]) == []


@pytest.mark.parametrize("mean", [-80, 0, 40, 150])
def test_a_crop_without_air_raises_no_doubt(models: Callable[..., TrainedModel], mean: int) -> None:
    crop = np.random.default_rng(0).normal(mean, 25, (24, 24, 8)).astype(np.int16)
    crop[:4, :4] += 700  # a rib
    assert scan_doubts(models("HU"), [Volume(crop, AFFINE)]) == []


PICTURE, OFFSET, SCORES, UNIT = "8-bit", "HU + 1024", "z-scores", "0..1"


@pytest.mark.parametrize(
    ("units", "own"), [("8-bit", PICTURE), ("offset", OFFSET), ("z-scores", SCORES), ("0..1", UNIT)]
)
def test_other_models_know_their_own_kind_and_doubt_the_rest(
    models: Callable[..., TrainedModel], ct: np.ndarray, units: str, own: str
) -> None:
    model = models(units)
    assert scan_doubts(model, [Volume(DISGUISES[own](ct), AFFINE)]) == []
    for other in {PICTURE, OFFSET, "uint16"} - {own}:
        assert len(scan_doubts(model, [Volume(DISGUISES[other](ct), AFFINE)])) == 1, other
    assert len(scan_doubts(model, [Volume(ct, AFFINE)])) == 1
    for other in {SCORES, UNIT} - {own}:
        if units in ("8-bit", "offset"):
            assert len(scan_doubts(model, [Volume(DISGUISES[other](ct), AFFINE)])) == 1, other


def test_every_channel_is_looked_at(tmp_path: Path, ct: np.ndarray) -> None:
    plan = Preprocessing(
        tuple(ChannelNormalisation(WINDOWS["HU"], 0.0, 100.0, "HU") for _ in range(2)), {0: 0, 1: 1}
    )
    known = [KNOWN["HU"].__dict__] * 2
    model = TrainedModel.load(
        save_model(
            tmp_path / "m",
            threshold_network(channels=2),
            preprocessing=plan,
            channels=("plain", "contrast"),
            intensities=known,
        )
    )
    found = scan_doubts(model, [Volume(ct, AFFINE), Volume(DISGUISES["HU + 1024"](ct), AFFINE)])
    assert len(found) == 1
    assert found[0].startswith("channel contrast: ")


RANGE = {"min": [2.0, 0.7, 0.7], "median": [2.5, 0.8, 0.8], "max": [3.0, 0.9, 0.9]}


@pytest.mark.parametrize(
    ("spacing", "known"),
    [((0.8, 0.8, 2.5), True), ((0.62, 0.62, 2.5), True), ((0.8, 0.8, 4.0), True), ((0.3, 0.3, 2.5), False),
     ((2.4, 2.4, 2.5), False), ((0.8, 0.8, 10.0), False), ((0.8, 0.8, 0.5), False), ((800.0, 800.0, 2500.0), False)],
)  # fmt: skip
def test_a_voxel_size_that_the_model_does_not_know_raises_a_doubt(
    models: Callable[..., TrainedModel], ct: np.ndarray, spacing: tuple[float, float, float], known: bool
) -> None:
    model = models("HU", training_spacing_mm=RANGE)
    found = scan_doubts(model, [Volume(ct, np.diag([*spacing, 1.0]))])
    assert [("was trained on 2 x 0.7 x 0.7 to 3 x 0.9 x 0.9 mm" in doubt) for doubt in found] == [True] * (
        not known
    )


def test_strict_refuses_what_is_otherwise_a_warning(
    models: Callable[..., TrainedModel], ct: np.ndarray
) -> None:
    model, scan = models("HU"), Volume(DISGUISES["HU + 1024"](ct), AFFINE)
    assert "no air" in Predictor([model], device="cpu")(scan).warnings[0]
    with pytest.raises(DataError, match="no air"):
        Predictor([model], device="cpu", strict=True)(scan)
    assert Predictor([model], device="cpu", strict=True)(Volume(ct, AFFINE)).warnings == ()


def test_a_doubtful_header_is_a_warning_and_refused_by_strict(
    models: Callable[..., TrainedModel], ct: np.ndarray
) -> None:
    scan = Volume(ct, AFFINE, notes=("sform and qform disagree",))
    assert Predictor([models("HU")], device="cpu")(scan).warnings == ("sform and qform disagree",)
    with pytest.raises(DataError, match="sform and qform disagree"):
        Predictor([models("HU")], device="cpu", strict=True)(scan)


def test_a_scan_too_large_after_resampling_is_refused_with_its_spacing(
    models: Callable[..., TrainedModel], ct: np.ndarray
) -> None:
    model = models("HU", training_spacing_mm=RANGE)
    huge = Volume(ct, np.diag([800.0, 800.0, 2500.0, 1.0]))
    with pytest.raises(DataError, match=r"24 x 96 x 96 voxels of 2500 x 800 x 800 mm .*more than max_voxels"):
        Predictor([model], device="cpu")(huge)
    small = Predictor([model], device="cpu", max_voxels=10_000)
    with pytest.raises(DataError, match="more than max_voxels = 10000"):
        small(Volume(ct, np.diag([0.8, 0.8, 2.5, 1.0])))


def test_labels_beyond_255_are_written_as_uint16(tmp_path: Path, ct: np.ndarray) -> None:
    folder = save_model(tmp_path / "m", threshold_network(), label_values={"background": 0, "tumour": 850})
    prediction = Predictor.from_run(folder, device="cpu")(Volume(ct, AFFINE))
    assert prediction.mask.dtype == np.uint16
    assert np.unique(prediction.mask).tolist() == [0, 850]


def test_real_ct_raises_no_doubt(models: Callable[..., TrainedModel], real_data: Path) -> None:
    from lungkit.data.dicom import read_series

    dataset = open_dataset(real_data / "nsclc_ct")
    scans = [read_case(case, dataset.label_map)[0][0] for case in dataset.cases]
    scans.append(read_series(real_data / "dicom_pat4").volume)
    model = models("HU")
    assert [(scan.path, doubts) for scan in scans if (doubts := scan_doubts(model, [scan]))] == []


def test_real_ct_without_its_intercept_raises_a_doubt(
    models: Callable[..., TrainedModel], real_data: Path
) -> None:
    dataset = open_dataset(real_data / "nsclc_ct")
    for case in dataset.cases:
        (scan,), _ = read_case(case, dataset.label_map)
        shifted = replace(scan, array=scan.array.astype(np.int32) + 1024, space=None)
        assert len(scan_doubts(models("HU"), [shifted])) == 1, case.case_id
