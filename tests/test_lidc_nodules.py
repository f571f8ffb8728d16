"""benchmarks/lidc_nodules.py on a synthetic series and annotations in the form of LIDC-IDRI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom")

from dicom_cases import write_ct

from lungkit.data import open_dataset, read_volume

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "lidc_nodules.py"
SLICES = 9
# Corners (left, top, right, bottom) of what the readers outlined, by slice: the outline is outside of the nodule.
SQUARES = [
    {2: (90, 60, 99, 69), 3: (90, 60, 99, 69), 6: (90, 60, 99, 69)},
    {2: (92, 60, 101, 69), 3: (92, 60, 101, 69), 4: (92, 60, 101, 69), 6: (90, 60, 99, 69)},
    {5: (10, 10, 16, 16)},
]


@pytest.fixture(scope="module")
def lidc():
    spec = importlib.util.spec_from_file_location("lidc_nodules_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def edge(left: int, top: int, right: int, bottom: int) -> list[tuple[int, int]]:
    across, down = range(left, right), range(top, bottom)
    return [
        *((x, top) for x in across),
        *((right, y) for y in down),
        *((x, bottom) for x in reversed(range(left + 1, right + 1))),
        *((left, y) for y in reversed(range(top + 1, bottom + 1))),
    ]


def annotations(marks: list[dict[int, tuple[int, int, int, int]]]) -> str:
    """XML of one nodule a reader, and a point of a small one by the last of them."""
    sessions = ""
    for number, slices in enumerate(marks):
        rois = ""
        for at, corners in slices.items():
            points = "".join(
                f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in edge(*corners)
            )
            rois += (
                f"<roi><imageSOP_UID>1.2.3.1.{at + 1}</imageSOP_UID><inclusion>TRUE</inclusion>{points}</roi>"
            )
        sessions += (
            f"<readingSession><unblindedReadNodule><noduleID>{number}</noduleID>{rois}</unblindedReadNodule>"
        )
        point = "<edgeMap><xCoord>5</xCoord><yCoord>5</yCoord></edgeMap>"
        sessions += (
            "<unblindedReadNodule><noduleID>small</noduleID><roi><imageSOP_UID>1.2.3.1.1</imageSOP_UID>"
            f"<inclusion>TRUE</inclusion>{point}</roi></unblindedReadNodule></readingSession>"
        )
    header = "<ResponseHeader><SeriesInstanceUid>1.2.3.1</SeriesInstanceUid></ResponseHeader>"
    return f'<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov">{header}{sessions}</LidcReadMessage>'


@pytest.fixture
def tcia(tmp_path: Path) -> Path:
    """A patient's study as TCIA gives it, 200 x 150 pixels."""
    folder = tmp_path / "LIDC-IDRI" / "LIDC-IDRI-0001" / "study" / "series"
    hu = np.random.default_rng(0).integers(-1000, 200, (200, 150, SLICES)).astype(np.int16)
    write_ct(
        folder, hu, spacing=(0.7, 0.7), edit=lambda header, _: setattr(header, "PatientID", "LIDC-IDRI-0001")
    )
    (folder / "069.xml").write_text(annotations(SQUARES))
    return tmp_path / "LIDC-IDRI"


def array(path: Path) -> np.ndarray:
    return np.asarray(read_volume(path).array)


def test_readers_marks_become_stacks_of_what_two_agree_on(lidc, tcia, tmp_path, capsys):
    assert lidc.main([str(tcia), "-o", str(tmp_path / "out")]) == 0
    assert "2 stacks" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out")
    # One reader's mark at (10, 10) is no nodule of two; slice 5, which nobody marked, parts the other.
    assert [case.case_id for case in dataset.cases] == ["LIDC-IDRI-0001_n00r0", "LIDC-IDRI-0001_n00r1"]
    votes = array(tmp_path / "out" / "votesTr" / "LIDC-IDRI-0001_n00r0.nii.gz")
    label = array(tmp_path / "out" / "labelsTr" / "LIDC-IDRI-0001_n00r0.nii.gz")
    assert votes.shape == (128, 128, 2) and np.array_equal(label, votes >= 2)
    # Pixels 91 to 98 of one and 93 to 100 of the other in x, 61 to 68 in y.
    assert (votes > 0).sum() == 2 * 10 * 8 and label.sum() == 2 * 6 * 8
    spacing = read_volume(tmp_path / "out" / "imagesTr" / "LIDC-IDRI-0001_n00r0_0000.nii.gz").affine
    np.testing.assert_allclose(np.diag(spacing), [-0.7, -0.7, 2.5, 1.0])


def test_crops_are_scaled_slice_by_slice_and_lie_in_the_scan(lidc, tcia, tmp_path):
    lidc.build(tcia, tmp_path / "out")
    image = array(tmp_path / "out" / "imagesTr" / "LIDC-IDRI-0001_n00r1_0000.nii.gz")
    label = array(tmp_path / "out" / "labelsTr" / "LIDC-IDRI-0001_n00r1.nii.gz")
    assert image.shape == (128, 128, 1) and (image.min(), image.max()) == (0, 255)
    x, y, _ = np.argwhere(label).min(axis=0)
    # The middle of all marks is column 95: the crop begins at 31 there, and at row 0, where it would hang over.
    assert (x, y) == (91 - 31, 61)


def test_outlines_count_where_that_is_asked_for(lidc, tcia, tmp_path):
    lidc.build(tcia, tmp_path / "out", with_outline=True)
    assert array(tmp_path / "out" / "labelsTr" / "LIDC-IDRI-0001_n00r1.nii.gz").sum() == 10 * 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<LidcReadMessage", "not readable as annotations"),
        (annotations([{20: (5, 5, 9, 9)}, {20: (5, 5, 9, 9)}]), "1.2.3.1.21, which is annotated, is missing"),
        ("<IdriReadMessage/>", "no CT series with annotations"),
    ],
)
def test_bad_annotations_are_named(lidc, tcia, tmp_path, text, message, caplog):
    next(tcia.rglob("*.xml")).write_text(text)
    assert lidc.main([str(tcia), "-o", str(tmp_path / "out")]) == 3
    assert message in caplog.text
