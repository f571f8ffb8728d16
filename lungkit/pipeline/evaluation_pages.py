"""Pages of the worst, the median and the best case of an evaluation, on their scans where these are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lungkit.data import open_dataset, read_volume
from lungkit.data.nifti_names import nifti_by_stem, split_channel
from lungkit.errors import DataError, LungkitError
from lungkit.metrics import CaseTable
from lungkit.pipeline.labelled import representative_cases
from lungkit.pipeline.scan_pages import write_measured_page
from lungkit.report.evaluation import LabelScheme
from lungkit.report.mask_files import MaskReader
from lungkit.report.pictures import optional_page


def find_images(labels: Path, images: Path | None = None) -> dict[str, Path]:
    """The scans of labelled cases, by case id: in the folder ``images``, else in the dataset that the labels are of.

    Raises:
        DataError: ``images`` is no folder.
    """
    if images is not None:
        if not images.is_dir():
            raise DataError(f"--images {images}: no such folder")
        found = {split_channel(stem): path for stem, path in nifti_by_stem(images).items()}
        return {name: path for (name, channel), path in found.items() if not channel}
    folder = labels if labels.is_dir() else labels.parent
    for root in (folder, folder.parent):
        try:
            dataset = open_dataset(root)
        except LungkitError:
            continue
        return {case.case_id: case.images[0] for case in dataset.cases if case.images}
    return {}


def write_evaluation_pages(
    folder: Path,
    pairs: Mapping[str, tuple[Path, Path]],
    scheme: LabelScheme,
    reader: MaskReader,
    table: CaseTable,
    images: Mapping[str, Path],
) -> None:
    """Write CASE.html of the cases that :func:`~lungkit.pipeline.labelled.representative_cases` picks.

    Args:
        folder: made where it is absent.
        pairs: case id -> (prediction, label).
        scheme: what the values of the masks mean.
        reader: that they were measured with.
        table: what was measured.
        images: scans by case id; a case without one shows masks alone.
    """
    if not table.rows or "dice" not in table.metrics:
        return
    for case_id in dict.fromkeys(representative_cases({"": table}).values()):
        with optional_page(folder / f"{case_id}.html"):
            prediction, label = reader.read(*pairs[case_id])
            write_measured_page(
                folder / f"{case_id}.html",
                case_id,
                label,
                scheme,
                {"": prediction},
                {"": table},
                image=read_volume(images[case_id]) if case_id in images else None,
                index="../report.html",
            )
