"""Evaluation of files: pairing, label schemes, geometry, and one bad file that stops none of the others."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import write_nifti
from lungkit.errors import DataError, UsageError
from lungkit.metrics import MetricGroup, MetricOptions
from lungkit.report.evaluation import (
    FOREGROUND,
    LabelScheme,
    evaluate_pairs,
    find_label_scheme,
    parse_labels,
)
from lungkit.report.mask_files import find_pairs

AFFINE = np.diag([0.8, 0.8, 2.5, 1.0])
OVERLAP = MetricOptions(groups=(MetricGroup.OVERLAP,))


def mask(start: int = 4, value: int = 1) -> np.ndarray:
    array = np.zeros((16, 16, 4), np.uint8)
    array[start : start + 5, 4:9, 1:3] = value
    return array


def write(folder: Path, name: str, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    folder.mkdir(exist_ok=True)
    write_nifti(folder / name, array, affine)
    return folder / name


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for case in ("a", "b", "c"):
        write(tmp_path / "labels", f"{case}.nii.gz", mask())
        write(tmp_path / "predictions", f"{case}.nii.gz", mask(5))
    return tmp_path / "predictions", tmp_path / "labels"


def test_files_of_the_same_name_are_pairs(folders: tuple[Path, Path]) -> None:
    assert list(find_pairs(*folders).pairs) == ["a", "b", "c"]


def test_cases_on_one_side_only_are_named(folders: tuple[Path, Path]) -> None:
    predictions, labels = folders
    (predictions / "a.nii.gz").unlink()
    (labels / "b.nii.gz").unlink()
    found = find_pairs(predictions, labels)
    assert (list(found.pairs), found.without_prediction, found.without_label) == (["c"], ("a",), ("b",))


def test_suffix_may_differ(tmp_path: Path) -> None:
    write(tmp_path / "p", "a.nii", mask())
    write(tmp_path / "l", "a.nii.gz", mask())
    assert list(find_pairs(tmp_path / "p", tmp_path / "l").pairs) == ["a"]


def test_two_files_are_a_pair(folders: tuple[Path, Path]) -> None:
    predictions, labels = folders
    found = find_pairs(predictions / "a.nii.gz", labels / "b.nii.gz")
    assert found.pairs == {"b": (predictions / "a.nii.gz", labels / "b.nii.gz")}


def test_labels_may_be_a_dataset(tmp_path: Path) -> None:
    for kind, name in (("imagesTr", "a_0000.nii.gz"), ("labelsTr", "a.nii.gz")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        write_nifti(tmp_path / "data" / kind / name, mask(), AFFINE)
    declared = {"labels": {"background": 0, "lesion": 1}, "channel_names": {"0": "CT"}, "numTraining": 1}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**declared, "file_ending": ".nii.gz"}))
    write(tmp_path / "predictions", "a.nii.gz", mask())
    assert list(find_pairs(tmp_path / "predictions", tmp_path / "data").pairs) == ["a"]
    assert find_label_scheme(tmp_path / "data").values == {"background": 0, "lesion": 1}
    assert find_label_scheme(tmp_path / "data" / "labelsTr").values == {"background": 0, "lesion": 1}


def test_dataset_of_plain_folders_has_the_labels_of_training(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        write(tmp_path / folder, "a.nii.gz", mask())
    assert find_label_scheme(tmp_path).values == {"background": 0, "tumour": 1}
    assert find_label_scheme(tmp_path / "masks") == FOREGROUND


def test_no_case_in_common_shows_both_sides(tmp_path: Path) -> None:
    write(tmp_path / "p", "a.nii", mask())
    write(tmp_path / "l", "b.nii", mask())
    with pytest.raises(DataError, match=r"predictions a; labels b"):
        find_pairs(tmp_path / "p", tmp_path / "l")


def test_absent_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        find_pairs(tmp_path / "nowhere", tmp_path)


def test_file_against_folder_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="one of each"):
        find_pairs(folders[0] / "a.nii.gz", folders[1])


def test_same_case_twice_is_refused(folders: tuple[Path, Path]) -> None:
    write(folders[0], "a.nii", mask())
    with pytest.raises(DataError, match="a exist with two suffixes"):
        find_pairs(*folders)


def test_masks_without_names_are_foreground(folders: tuple[Path, Path]) -> None:
    assert find_label_scheme(folders[1]) == FOREGROUND


@pytest.mark.parametrize(
    "texts", [["tumour"], ["=1"], ["tumour=x"], ["tumour=65536"], ["a=1", "b=1"], ["a=0"]]
)
def test_label_that_cannot_be_parsed_is_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="label"):
        parse_labels(texts)


def test_values_become_class_indices() -> None:
    scheme = LabelScheme({"background": 0, "node": 7, "tumour": 3}, ignore_value=9)
    assert scheme.class_indices == {"background": 0, "tumour": 1, "node": 2}
    assert scheme.label_map == {0: 0, 3: 1, 7: 2, 9: 255}


def test_spacing_comes_from_the_header(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_pairs(find_pairs(*folders).pairs)
    assert evaluation.table.column("hd95_directed_mm", "foreground").tolist() == pytest.approx([0.8] * 3)
    assert evaluation.table.column("volume_true_ml", "foreground").tolist() == pytest.approx(
        [50 * 1.6e-3] * 3
    )


def test_diameter_is_measured_in_the_axial_plane_however_the_file_is_stored(tmp_path: Path) -> None:
    upright = np.zeros((16, 16, 4), np.uint8)
    upright[3:13, 7, 1] = 1
    # The same mask with its axes stored as (Z, X, Y).
    turned = np.transpose(upright, (2, 0, 1))
    affine = AFFINE[:, [2, 0, 1, 3]]
    pairs = {
        name: (write(tmp_path, f"{name}.nii", array, matrix),) * 2
        for name, array, matrix in (("upright", upright, AFFINE), ("turned", turned, affine))
    }
    table = evaluate_pairs(pairs).table
    assert table.column("diameter_true_mm", "foreground").tolist() == pytest.approx([8.0, 8.0])


def test_masks_stored_in_different_orientations_are_compared_voxel_by_voxel(tmp_path: Path) -> None:
    flipped = AFFINE.copy()
    flipped[0, 0], flipped[0, 3] = -0.8, 15 * 0.8
    pair = (
        write(tmp_path, "p.nii", np.ascontiguousarray(mask()[::-1]), flipped),
        write(tmp_path, "l.nii", mask()),
    )
    assert evaluate_pairs({"x": pair}, options=OVERLAP).table.mean("dice") == 1.0


def test_a_black_and_white_mask_is_said_once_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = {
        name: (
            write(tmp_path / "p", f"{name}.nii", mask()),
            write(tmp_path / "l", f"{name}.nii", mask(value=255)),
        )
        for name in "ab"
    }
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        assert evaluate_pairs(pairs, options=OVERLAP).table.mean("dice") == 1.0
    assert caplog.text.count("0 and 255, read as 0 and 1") == 1


def test_values_beyond_255_are_measured(tmp_path: Path) -> None:
    truth = mask().astype(np.uint16) * 850
    pair = write(tmp_path, "p.nii", truth), write(tmp_path, "l.nii", truth)
    table = evaluate_pairs({"x": pair}, parse_labels(["aorta=850"]), options=OVERLAP).table
    assert table.mean("dice") == 1.0


def test_every_class_has_its_row(tmp_path: Path) -> None:
    truth = mask() + mask(10, 2)
    pair = write(tmp_path, "p.nii", truth), write(tmp_path, "l.nii", truth)
    table = evaluate_pairs(
        {"x": pair}, LabelScheme({"background": 0, "tumour": 1, "node": 2}), options=OVERLAP
    ).table
    assert table.labels == ("tumour", "node")
    assert table.mean("dice") == 1.0


def test_ignored_voxels_count_nowhere(tmp_path: Path) -> None:
    truth, prediction = mask(), mask()
    truth[12:], prediction[12:] = 9, 1
    pair = write(tmp_path, "p.nii", prediction), write(tmp_path, "l.nii", truth)
    scheme = LabelScheme({"background": 0, "tumour": 1}, ignore_value=9)
    assert evaluate_pairs({"x": pair}, scheme, options=OVERLAP).table.mean("dice") == 1.0


def break_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def shift_origin(path: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 3] = 5
    write_nifti(path, mask(), affine)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_file, "b.nii.gz"),
        (shift_origin, r"affine .* differs by 5 "),
        (lambda path: write_nifti(path, mask()[:8], AFFINE), r"shape \(8, 16, 4\)"),
        (lambda path: write_nifti(path, mask(value=4), AFFINE), r"undeclared label 4 \(50 voxels\)"),
        (lambda path: path.write_bytes(b""), "empty"),
    ],
    ids=["truncated", "moved", "cropped", "label", "empty"],
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_file_is_named_and_the_others_are_measured(
    folders: tuple[Path, Path], spoil: object, message: str, jobs: int
) -> None:
    spoil(folders[0] / "b.nii.gz")
    evaluation = evaluate_pairs(find_pairs(*folders).pairs, jobs=jobs, options=OVERLAP)
    assert evaluation.table.case_ids == ("a", "c")
    assert list(evaluation.failed) == ["b"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(evaluation.failed["b"])


def test_jobs_change_nothing(folders: tuple[Path, Path]) -> None:
    pairs = find_pairs(*folders).pairs
    assert evaluate_pairs(pairs, jobs=3).table.rows == evaluate_pairs(pairs).table.rows


def test_progress_counts_to_the_end(folders: tuple[Path, Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate_pairs(find_pairs(*folders).pairs, options=OVERLAP, progress=lambda *step: seen.append(step))
    assert seen == [("a", 1, 3), ("b", 2, 3), ("c", 3, 3)]


def test_real_labels_against_themselves_are_perfect(real_data: Path) -> None:
    labels = real_data / "nsclc_ct" / "labelsTr"
    pairs = {
        name: pair for name, pair in find_pairs(labels, labels).pairs.items() if name != "pyradiomics_lung2"
    }
    table = evaluate_pairs(pairs, find_label_scheme(labels)).table
    assert table.mean("dice") == table.mean("nsd_voxel_2mm") == table.mean("lesion_f1") == 1.0
    assert table.mean("hd95_directed_mm") == 0.0
