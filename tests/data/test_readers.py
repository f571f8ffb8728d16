"""What several readers say: votes and masks become codes, and codes shares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import (
    CaseCache,
    fingerprint_dataset,
    open_dataset,
    plan_preprocessing,
    read_volume,
    write_nifti,
)
from lungkit.data.readers import CodedCase, ReaderCodes, read_codes, reader_codes
from lungkit.errors import DataError, UsageError

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def votes_of(case: int) -> np.ndarray:
    return np.random.default_rng(case).integers(0, 4, (8, 6, 4)).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two scans, votes of three readers, and the masks that give these votes; reader C has not read scan 1."""
    for case in range(2):
        votes = votes_of(case)
        image = (100.0 * votes - 700).astype(np.int16)
        write(tmp_path / "imagesTr" / f"scan_{case}_0000.nii.gz", image)
        write(tmp_path / "labelsTr" / f"scan_{case}.nii.gz", (votes >= 2).astype(np.uint8))
        write(tmp_path / "votesTr" / f"scan_{case}.nii.gz", votes)
        for number, name in enumerate("ABC"[: 3 - case]):
            write(tmp_path / "readersTr" / name / f"scan_{case}.nii.gz", (votes > number).astype(np.uint8))
    declare(tmp_path, readers=3)
    return tmp_path


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, array, AFFINE)


def declare(root: Path, **content: object) -> None:
    labels = {"background": 0, "tumour": 1}
    known = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", **content}
    (root / "dataset.json").write_text(json.dumps(known))


def codes_of(root: Path, case_id: str, codes: ReaderCodes) -> np.ndarray:
    dataset = open_dataset(root)
    case = dataset.case(case_id)
    return read_codes(case, codes, dataset.label_map, read_volume(case.images[0])).array


def test_two_classes_are_coded_by_their_votes():
    codes = ReaderCodes(readers=4, classes=2)
    np.testing.assert_array_equal(codes.shares[:5, 1], [0, 0.25, 0.5, 0.75, 1])
    assert codes.votes(np.array([0, 3, 4]), 1).tolist() == [0, 3, 4]


def test_every_way_of_dividing_comes_back_from_its_code():
    codes = ReaderCodes(readers=3, classes=3)
    np.testing.assert_array_equal(codes.encode(codes.counts.T), np.arange(len(codes.counts)))
    np.testing.assert_allclose(codes.shares.sum(1), 1)
    np.testing.assert_array_equal(codes.readings(np.arange(len(codes.counts))), codes.counts.sum(1))
    assert codes.encode(np.zeros((3, 1), np.uint8)).tolist() == [255]


def test_too_many_ways_are_refused():
    with pytest.raises(UsageError, match=r"can divide over 9 classes .* at most 255"):
        ReaderCodes(readers=5, classes=9)


def test_votes_are_read(root):
    codes = reader_codes(open_dataset(root))
    np.testing.assert_array_equal(codes_of(root, "scan_1", codes), votes_of(1))


def test_masks_of_each_reader_give_their_votes(root):
    declare(root, readers=["A", "B", "C"])
    codes = reader_codes(open_dataset(root))
    np.testing.assert_array_equal(codes_of(root, "scan_0", codes), votes_of(0))


def test_a_reader_who_has_not_read_a_scan_counts_neither_way(root):
    declare(root, readers=["A", "B", "C"])
    codes = reader_codes(open_dataset(root))
    found = codes_of(root, "scan_1", codes)
    assert (codes.readings(found) == 2).all()
    np.testing.assert_array_equal(codes.shares[found, 1], np.minimum(votes_of(1), 2) / 2)


def test_votes_of_more_readers_than_there_were_are_refused(root):
    declare(root, readers=2)
    with pytest.raises(DataError, match=r"scan_0\.nii\.gz: votes from 0 to 3, but there were 2 readers"):
        codes_of(root, "scan_0", reader_codes(open_dataset(root)))


def test_votes_of_an_unknown_number_of_readers_need_it(root):
    declare(root)
    with pytest.raises(UsageError, match=r"how many readers there were; give --data\.readers"):
        reader_codes(open_dataset(root))
    assert reader_codes(open_dataset(root), readers=3).readers == 3


def test_a_dataset_of_one_reader_has_no_codes(root):
    declare(root)
    for path in (root / "votesTr").iterdir():
        path.unlink()
    (root / "votesTr").rmdir()
    with pytest.raises(UsageError, match="has no labels of several readers"):
        reader_codes(open_dataset(root))


@pytest.mark.parametrize(
    ("readers", "message"),
    [
        (1, "must be their number, 2 or more"),
        (["A"], "two or more different names"),
        (["A", "../B"], "names of folders"),
        (["A", "Z"], "no such folder"),
    ],
)
def test_readers_that_make_no_sense_are_refused(root, readers, message):
    declare(root, readers=readers)
    with pytest.raises(DataError, match=message):
        open_dataset(root)


def test_the_cache_keeps_the_codes_beside_the_consensus(root, tmp_path):
    dataset = open_dataset(root)
    plan = plan_preprocessing(fingerprint_dataset(dataset, ["scan_0"]))
    case = CaseCache(tmp_path / "cache", dataset, plan, codes=reader_codes(dataset)).prepare("scan_0")
    np.testing.assert_array_equal(case.label, case.codes >= 2)
    np.testing.assert_array_equal(np.sort(case.codes.ravel()), np.sort(votes_of(0).ravel()))
    assert CodedCase(case).label is case.codes
