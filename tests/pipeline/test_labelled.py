"""Labelled scans are measured where their readers drew, and drawn as they were measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_cases import HU, random_network, save_model, threshold_network

from lungkit.data import open_dataset, read_volume, write_nifti
from lungkit.errors import DataError
from lungkit.inference import Postprocessing, Predictor
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline import labelled
from lungkit.pipeline.labelled import (
    LabelledScans,
    draw_overlays,
    measure_scans,
    readers_ceiling,
    representative_cases,
)
from lungkit.report.evaluation import evaluate_pairs

FLIPPED = np.diag([-0.5, -0.5, 2.0, 1.0])  # x runs to the left, y to the front


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two scans: a ball of 500 HU in -500 HU, truth one row larger; below it one row to ignore."""
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    grid = np.meshgrid(np.arange(24), np.arange(20), np.arange(8), indexing="ij")
    for name, centre in {"a": (8, 9, 4), "b": (14, 10, 3)}.items():
        ball = sum((axis - c) ** 2 * w for axis, c, w in zip(grid, centre, (1, 1, 4), strict=True)) < 30
        label = (ball | np.roll(ball, 1, axis=1)).astype(np.uint8)
        label[:, -1] = 3
        write_nifti(
            tmp_path / "imagesTr" / f"{name}_0000.nii.gz", np.where(ball, 500, -500).astype(np.int16), FLIPPED
        )
        write_nifti(
            tmp_path / "labelsTr" / f"{name}.nii.gz", 2 * (label == 1) + label * (label == 3), FLIPPED
        )
    labels = {"background": 0, "tumour": 2, "ignore": 3}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def scans_of(root: Path, *case_ids: str) -> LabelledScans:
    return LabelledScans(open_dataset(root), case_ids or ("a", "b"))


def predictor_of(
    folder: Path, *, spacing_mm: tuple[float, float, float] | None = None, **options: Any
) -> Predictor:
    preprocessing = replace(HU, target_spacing_mm=spacing_mm, label_map={0: 0, 2: 1, 3: 255})
    network = options.pop("network", threshold_network())
    values = {"background": 0, "tumour": 2}
    path = save_model(folder / "model", network, preprocessing=preprocessing, label_values=values)
    return Predictor.from_run(path, device="cpu", precision="fp32", **options)


def test_what_readers_reach_is_known_without_a_model(root: Path) -> None:
    assert readers_ceiling([scans_of(root)]) == []
    (root / "votesTr").mkdir()
    votes = {}
    for name in ("a", "b"):
        label = read_volume(root / "labelsTr" / f"{name}.nii.gz")
        inside = label.array == 2
        votes[name] = inside + (inside & np.roll(inside, 1, axis=0)).astype(np.uint8)
        write_nifti(root / "votesTr" / f"{name}.nii.gz", votes[name], label.affine)
    assert readers_ceiling([scans_of(root)]) == []  # nobody knows how many there were
    (note,) = readers_ceiling([scans_of(root, "a"), scans_of(root)], readers=2)
    one, two = (
        np.mean([dice(votes[name]) for name in votes])
        for dice in (
            lambda v: 2 * v.sum() / (v.sum() + 2 * (v > 0).sum()),
            lambda v: 2 * (v > 1).sum() / v.sum(),
        )
    )
    assert f"{one:.4f} for one of 2 against these labels, {two:.4f} for two readers" in note
    assert "means of 2 and 2 cases" in note


def test_a_prediction_is_measured_against_the_mask_of_the_file(root: Path) -> None:
    scans = scans_of(root)
    table = measure_scans(predictor_of(root), scans)
    assert (table.case_ids, table.labels) == (("a", "b"), ("tumour",))
    for row in table.rows:
        image, mask = (
            read_volume(root / folder / f"{row.case_id}{end}").array
            for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz"))
        )
        found, true, counted = image == 500, mask == 2, mask != 3
        counts = [(found & true & counted).sum(), (found & ~true & counted).sum(), (~found & true).sum()]
        assert [row.values[name] for name in ("tp", "fp", "fn")] == counts
        assert counts[0] and counts[2]


def test_a_resampled_prediction_is_measured_on_the_scans_own_grid(root: Path) -> None:
    """It went down to half the resolution and back: its outline is off, its middle is not; the truth is the file's."""
    exact = measure_scans(predictor_of(root), scans_of(root))
    resampled = measure_scans(predictor_of(root / "coarse", spacing_mm=(2.0, 1.0, 1.0)), scans_of(root))
    for row, other in zip(exact.rows, resampled.rows, strict=True):
        assert row.values["volume_true_ml"] == other.values["volume_true_ml"]
        assert 0.8 * row.values["dice"] < other.values["dice"] != row.values["dice"]


def test_it_is_what_evaluating_the_written_mask_gives(root: Path) -> None:
    scans, predictor, options = (
        scans_of(root),
        predictor_of(root, spacing_mm=(2.0, 1.0, 1.0)),
        MetricOptions(),
    )
    pairs = {}
    for case_id in scans.case_ids:
        case = scans.dataset.case(case_id)
        predictor(list(case.images)).save(root / f"{case_id}.nii.gz")
        assert case.label is not None
        pairs[case_id] = (root / f"{case_id}.nii.gz", case.label)
    evaluation = evaluate_pairs(pairs, scans.scheme, options=options)
    assert not evaluation.failed
    assert measure_scans(predictor, scans, options=options).rows == evaluation.table.rows


def test_the_predictors_postprocessing_is_measured(root: Path) -> None:
    table = measure_scans(
        predictor_of(root, postprocessing=Postprocessing(smallest_lesion_ml=1000.0)), scans_of(root)
    )
    assert {row.values["tp"] for row in table.rows} == {0.0}


def test_it_can_be_given_up_between_two_cases(root: Path) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_scans(predictor_of(root), scans_of(root), progress=stop)
    assert seen == [(1, 2)]


def test_a_case_without_a_mask_is_named(root: Path) -> None:
    dataset = open_dataset(root)
    unlabelled = replace(dataset, cases=tuple(replace(case, label=None) for case in dataset.cases))
    with pytest.raises(DataError, match=r"case a of .* has no mask"):
        measure_scans(predictor_of(root), LabelledScans(unlabelled, ("a",)))


def test_a_mask_on_another_grid_is_refused(root: Path) -> None:
    mask = root / "labelsTr" / "a.nii.gz"
    write_nifti(mask, read_volume(mask).array[:, :, 1:], FLIPPED)
    with pytest.raises(DataError, match=r"a_0000\.nii\.gz.*shape"):
        measure_scans(predictor_of(root), scans_of(root, "a"))


def test_larger_files_than_allowed_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="voxels"):
        measure_scans(predictor_of(root), replace(scans_of(root), max_voxels=100))


def test_pictures_show_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the scan's own grid in canonical orientation: its HU, the mask of the file, the mask of the predictor."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        labelled, "save_overlays", lambda path, *args, **options: drawn.update({path.name: (args, options)})
    )
    predictors = {
        "sharp": predictor_of(root / "a"),
        "gated": predictor_of(root / "b", spacing_mm=(2.0, 1.0, 1.0), network=random_network()),
    }
    scans = scans_of(root)
    tables = {name: measure_scans(predictor, scans) for name, predictor in predictors.items()}
    draw_overlays(root, predictors, scans, tables)
    assert {name.split("-")[0] for name in drawn} == {"worst", "median", "best"}
    (image, truth, masks, attention), options = next(
        entry for name, entry in drawn.items() if name.endswith("-a.png")
    )

    def seen(array: np.ndarray) -> np.ndarray:
        return array[::-1, ::-1].transpose(2, 1, 0)

    channels, label = scans.read("a")
    np.testing.assert_array_equal(image, seen(channels[0].array))
    np.testing.assert_array_equal(truth, seen(np.select([label.array == 2, label.array == 3], [1, 255])))
    for name, predictor in predictors.items():
        np.testing.assert_array_equal(masks[name], seen(predictor(channels).mask))
    assert list(attention) == ["gated"]
    alpha = predictors["gated"](channels, attention=True).attention
    assert alpha is not None
    np.testing.assert_array_equal(attention["gated"], seen(alpha)[options["slice_index"]])
    assert options["slice_index"] == int((truth == 1).sum(axis=(1, 2)).argmax())
    assert options["window"] == HU.channels[0].window and options["ignore_index"] == 255
    assert options["spacing_mm"] == pytest.approx((2.0, 0.5, 0.5))
    dice = [next(row for row in table.rows if row.case_id == "a").values["dice"] for table in tables.values()]
    assert options["title"].endswith(f"held-out case a (Dice: sharp {dice[0]:.3f}, gated {dice[1]:.3f})")


def test_a_single_nameless_predictor_is_drawn(root: Path) -> None:
    predictor, scans = predictor_of(root), scans_of(root, "b")
    draw_overlays(root, {"": predictor}, scans, {"": measure_scans(predictor, scans)})
    assert {path.name for path in root.glob("*.png")} == {"worst-b.png", "median-b.png", "best-b.png"}


def table_of(dice: dict[str, float]) -> CaseTable:
    table = CaseTable()
    for name, value in dice.items():
        table.add_row(name, "tumour", {"dice": value})
    return table


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ({"a": 0.9, "b": 0.1, "c": 0.5}, {"worst": "b", "median": "c", "best": "a"}),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, {"worst": "a", "median": "b", "best": "c"}),
        ({"a": math.nan, "b": 0.2, "c": 0.4}, {"worst": "b", "median": "c", "best": "c"}),
        ({"a": math.nan}, {}),
        ({}, {}),
    ],
)
def test_representative_cases_follow_the_ranks(dice: dict[str, float], expected: dict[str, str]) -> None:
    assert representative_cases({"": table_of(dice)}) == expected


def test_representative_cases_favour_no_arm() -> None:
    tables = {"A": table_of({"a": 0.9, "b": 0.1, "c": 0.6}), "B": table_of({"a": 0.2, "b": 0.8, "c": 0.6})}
    # Means: a 0.55, b 0.45, c 0.6.
    assert representative_cases(tables) == {"worst": "b", "median": "a", "best": "c"}


def test_undefined_cases_represent_nothing() -> None:
    assert representative_cases({"A": table_of({"a": math.nan}), "B": table_of({"a": 0.5})}) == {}
