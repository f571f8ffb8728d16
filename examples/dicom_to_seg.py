"""A DICOM series in, a DICOM SEG out: read, segment, write, read back (extra ``dicom``).

``python examples/dicom_to_seg.py SERIES OUT.dcm --model RUN`` does it for your series with a model of yours. Without
arguments it makes a series from the phantom and a mask by threshold, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from lungkit.data import DicomScan, make_phantom, read_dicom_seg, read_series, write_dicom_seg


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("series", nargs="?", type=Path, help="folder of a CT series (default: a phantom)")
    parser.add_argument("output", nargs="?", type=Path, default=Path("phantom_seg.dcm"))
    parser.add_argument("--model", type=Path, help="run folder of lungkit-train (default: a threshold)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        series = options.series
        if series is None:
            series = Path(folder) / "series"
            write_phantom_series(series)
        scan = read_series(series)
        mask, labels = segment(scan, options.model)
        write_dicom_seg(options.output, scan, mask, labels)
        again, names = read_dicom_seg(options.output, scan)
        assert np.array_equal(again.array != 0, mask != 0)
        print(f"{options.output}: {', '.join(names)}, {int((mask != 0).sum())} voxels, read back the same")


def segment(scan: DicomScan, model: Path | None) -> tuple[np.ndarray, dict[str, int]]:
    """(X, Y, Z) on the grid of the series, and its names."""
    if model is None:
        return (scan.volume.array > 200).astype(np.uint8), {"bone": 1}
    from lungkit import Predictor

    prediction = Predictor.from_run(model)(scan.volume)
    return prediction.mask, {name: value for name, value in prediction.labels.items() if value}


def write_phantom_series(folder: Path) -> None:
    """A CT series of single-slice files, as a scanner would send it, but synthetic."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    phantom = make_phantom(5, shape=(12, 64, 64))
    (step, row, column), origin = phantom.spacing_mm, phantom.origin_mm
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir()
    for k, pixels in enumerate(phantom.image):
        slice_ = Dataset()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        slice_.PatientName, slice_.PatientID, slice_.PatientBirthDate, slice_.PatientSex = (
            "Phantom",
            "0",
            "",
            "",
        )
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.StudyDate, slice_.StudyTime, slice_.StudyID, slice_.AccessionNumber = (
            "20260101",
            "120000",
            "1",
            "",
        )
        slice_.ReferringPhysicianName, slice_.PositionReferenceIndicator = "", ""
        slice_.Modality, slice_.SeriesNumber, slice_.InstanceNumber = "CT", 1, k + 1
        slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [round(v, 6) for v in (origin[2], origin[1], origin[0] + k * step)]
        slice_.PixelSpacing, slice_.SliceThickness = [round(row, 6), round(column, 6)], round(step, 6)
        slice_.Rows, slice_.Columns = pixels.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = (
            1,
            "MONOCHROME2",
            0,
        )
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
        slice_.add_new("PixelData", "OW", (pixels.astype(np.int32) + 1024).astype("<u2").tobytes())
        slice_.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)


if __name__ == "__main__":
    main()
