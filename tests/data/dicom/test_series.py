"""Reading one CT series out of a folder."""

from __future__ import annotations

import logging
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import OBLIQUE, PATIENT_NAME, change, files, lossless_jpeg, make_hu, write_ct

from lungkit.data import find_series, read_series, read_volume
from lungkit.errors import DataError

RLE, JPEG_LS = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80"
JPEG_LOSSLESS, JPEG_PROCESS_14, JPEG_2000 = (f"1.2.840.10008.1.2.4.{end}" for end in (70, 57, 90))
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"


def test_slices_come_in_order_of_position_whatever_the_files_are_called(tmp_path: Path) -> None:
    hu = write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    np.testing.assert_array_equal(scan.volume.array, hu)
    assert scan.volume.array.dtype == np.int16
    assert [header.InstanceNumber for header in scan.headers] == [1, 2, 3, 4, 5, 6]
    assert scan.volume.path == tmp_path / "ct"


def test_affine_is_in_ras_with_column_spacing_along_x(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    expected = [[-0.9, 0, 0, 50], [0, -0.7, 0, 60], [0, 0, 2.5, 100], [0, 0, 0, 1]]
    np.testing.assert_allclose(read_series(tmp_path / "ct").volume.affine, expected, atol=1e-9)


@pytest.mark.parametrize("orientation", [OBLIQUE, (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, -1, 0)])
def test_geometry_equals_simpleitk(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    import SimpleITK as sitk

    write_ct(tmp_path / "ct", orientation=orientation)
    volume = read_series(tmp_path / "ct").volume
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(image).T, volume.array)
    for voxel in ((0, 0, 0), (11, 0, 0), (0, 9, 0), (3, 4, 5)):
        lps = image.TransformIndexToPhysicalPoint(voxel)
        ras = (volume.affine @ (*voxel, 1))[:3]
        np.testing.assert_allclose(ras, (-lps[0], -lps[1], lps[2]), atol=1e-6)


def test_real_series_equals_its_nifti(real_data: Path) -> None:
    scan = read_series(real_data / "dicom_pat4")
    expected = read_volume(real_data / "nsclc_ct" / "imagesTr" / "nsclc_pat4_0000.nii.gz")
    np.testing.assert_array_equal(scan.volume.array, expected.array)
    np.testing.assert_allclose(scan.volume.affine, expected.affine, atol=1e-6)
    assert scan.series.slices == 56


@pytest.mark.parametrize("syntax", [RLE, JPEG_LS])
def test_lossless_compression_changes_no_voxel(tmp_path: Path, syntax: str) -> None:
    hu = write_ct(tmp_path / "ct", compress=syntax)
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, JPEG_PROCESS_14])
def test_lossless_jpeg_as_scanners_of_old_write_it_changes_no_voxel(tmp_path: Path, syntax: str) -> None:
    pytest.importorskip("libjpeg", reason="pylibjpeg-libjpeg is not installed (extra 'dicom')")
    hu = write_ct(tmp_path / "ct", edit=lossless_jpeg(syntax))
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)


def test_jpeg_2000_is_read(tmp_path: Path) -> None:
    import io

    from PIL import Image
    from pydicom.encaps import encapsulate

    def encode(dataset: Any, k: int) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG2000", no_jp2=True, irreversible=False)
        dataset.PixelData = encapsulate([buffer.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEG_2000

    hu = write_ct(tmp_path / "ct", edit=encode)
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)


def test_signed_12_bit_values_keep_their_sign_and_lose_overlay_bits(tmp_path: Path) -> None:
    hu = make_hu()

    def edit(dataset: Any, k: int) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept = (
            1,
            12,
            11,
            0,
        )
        twelve = (hu[:, :, k].T.astype(np.int32) & 0x0FFF) | 0x5000
        dataset.PixelData = twelve.astype("<u2").tobytes()

    write_ct(tmp_path / "ct", hu, edit=edit)
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)


def test_fractional_slope_gives_float32(tmp_path: Path) -> None:
    hu = write_ct(tmp_path / "ct", edit=change(RescaleSlope=0.5))
    array = read_series(tmp_path / "ct").volume.array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, (hu.astype(np.float32) + 1024) / 2 - 1024)


def test_values_beyond_int16_give_int32(tmp_path: Path) -> None:
    hu = np.full((4, 3, 3), 100, np.int32)
    hu[1, 1, 1] = 40000
    write_ct(tmp_path / "ct", hu)
    array = read_series(tmp_path / "ct").volume.array
    assert array.dtype == np.int32
    np.testing.assert_array_equal(array, hu)


def test_peak_memory_is_the_volume_and_little_more(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", np.zeros((256, 256, 24), np.int16))
    read_series(tmp_path / "ct")  # imports
    tracemalloc.start()
    scan = read_series(tmp_path / "ct")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one_slice = scan.volume.array.nbytes / 24
    assert peak < scan.volume.array.nbytes + 10 * one_slice  # file, stored, int32, headers


def test_lossy_compression_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_ct(tmp_path / "ct", edit=change(2, LossyImageCompression="01"))
    with caplog.at_level(logging.WARNING, "lungkit"):
        read_series(tmp_path / "ct")
    assert "1-004-002.dcm: compressed with loss" in caplog.text


def test_a_folder_of_two_series_lists_them_and_takes_the_one_that_is_named(tmp_path: Path) -> None:
    first = write_ct(tmp_path / "ct")
    second = write_ct(tmp_path / "ct", make_hu(seed=1), series=2)
    with pytest.raises(
        DataError, match=r"--series UID.*1: 1.2.3.1 \(CT, 12 x 10, 6 slices\); 2: 1.2.3.2 \(CT"
    ):
        read_series(tmp_path / "ct")
    np.testing.assert_array_equal(read_series(tmp_path / "ct", series=2).volume.array, second)
    np.testing.assert_array_equal(read_series(tmp_path / "ct", series="1.2.3.1").volume.array, first)
    with pytest.raises(DataError, match=r"'1\.2' fits several"):
        read_series(tmp_path / "ct", series="1.2")
    with pytest.raises(DataError, match=r"no series '7'; the folder holds 1: 1\.2\.3\.1"):
        read_series(tmp_path / "ct", series="7")


def test_series_are_listed_with_what_tells_them_apart(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    write_ct(tmp_path / "ct", series=2, edit=change(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128"))
    ct, pet = find_series(tmp_path / "ct")
    assert (ct.uid, ct.description, ct.modality, ct.slices, ct.size) == (
        "1.2.3.1",
        "Chest 1",
        "CT",
        6,
        (12, 10),
    )
    assert (ct.is_ct, pet.modality, pet.is_ct) == (True, "PT", False)


def test_pet_beside_the_ct_is_passed_over_and_refused_where_it_is_named(tmp_path: Path) -> None:
    hu = write_ct(tmp_path / "ct")
    write_ct(tmp_path / "ct", series=2, edit=change(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128"))
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)
    with pytest.raises(DataError, match=r"series 1.2.3.2 is PT \(Positron Emission .*not CT"):
        read_series(tmp_path / "ct", series=2)


def test_localizers_contours_and_notes_are_passed_over(tmp_path: Path) -> None:
    hu = write_ct(tmp_path / "ct")
    write_ct(
        tmp_path / "scout", make_hu((20, 4, 1)), edit=change(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    shutil.copy(files(tmp_path / "scout")[0], tmp_path / "ct" / "scout.dcm")
    write_ct(tmp_path / "rt", make_hu((2, 2, 1)), edit=change(SOPClassUID=RTSTRUCT))
    shutil.copy(files(tmp_path / "rt")[0], tmp_path / "ct" / "RS.dcm")
    for name in ("README", "notes.txt", ".DS_Store"):
        (tmp_path / "ct" / name).write_text("text")
    np.testing.assert_array_equal(read_series(tmp_path / "ct").volume.array, hu)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"Rows": 9}, r"differ in columns and rows: .*\(12, 9\) in 1-004-002.dcm"),
        ({"FrameOfReferenceUID": "1.2.3.98"}, "differ in frame of reference"),
        ({"Modality": "PT"}, "1-004-002.dcm: CT Image Storage among CT slices|1-004-002.dcm: .* PT"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "Secondary Capture Image Storage among CT slices"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "pixels are MONOCHROME1"),
        ({"BitsStored": 17}, "17 bits stored of 16"),
        ({"HighBit": 14}, "highest of 16 bits is bit 14"),
        ({"RescaleType": "Z_EFF"}, r"Z_EFF \(RescaleType\), not HU"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"Rows": 0}, "12 columns and 0 rows"),
        ({"RescaleSlope": None}, "RescaleSlope is missing"),
        ({"PixelRepresentation": None}, "PixelRepresentation is missing"),
        ({"SeriesInstanceUID": None}, "SeriesInstanceUID is missing"),
        ({"PixelData": None}, "no pixel data"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    write_ct(tmp_path / "ct", edit=change(2, **values))
    with pytest.raises(DataError, match=message) as caught:
        read_series(tmp_path / "ct")
    assert "1-004-002.dcm" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_series_of_several_multi_frame_files_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", edit=change(SOPClassUID=ENHANCED_CT))
    with pytest.raises(DataError, match=r"6 files, some of them multi-frame.*emf2sf"):
        read_series(tmp_path / "ct")


def test_compression_without_a_decoder_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pydicom.pixels
    from pydicom.encaps import encapsulate

    def edit(dataset: Any, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = JPEG_LOSSLESS
        dataset.PixelData = encapsulate([b"\xff\xd8" * 20])
        dataset["PixelData"].VR = "OB"

    class Decoder:
        is_available = False

    write_ct(tmp_path / "ct", edit=edit)
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda syntax: Decoder())
    expected = (
        r"as JPEG Lossless.* no decoder .*'lungkit\[dicom\]', which has pylibjpeg and pylibjpeg-libjpeg"
        ".*gdcmconv --raw"
    )
    with pytest.raises(DataError, match=expected):
        read_series(tmp_path / "ct")


@pytest.mark.parametrize("syntax", [None, RLE, JPEG_LS])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.4, 0.6, 0.8, 0.95])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, syntax: str | None, kept: float) -> None:
    write_ct(tmp_path / "ct", compress=syntax)
    path = files(tmp_path / "ct")[2]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"1-004-002\.dcm"):
        read_series(tmp_path / "ct")


def test_folders_without_a_series_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: no such folder"):
        read_series(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: a file; name the folder"):
        read_series(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no DICOM file among the 1 files"):
        read_series(tmp_path)
    write_ct(tmp_path / "pet", edit=change(Modality="PT"))
    with pytest.raises(DataError, match=r"no CT series; the folder holds 1: 1\.2\.3\.1 \(PT"):
        read_series(tmp_path / "pet")


def test_too_many_voxels_are_refused_before_they_are_read(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct", edit=change(PixelData=b""))
    with pytest.raises(DataError, match="12 x 10 x 6 voxels, more than max_voxels = 719"):
        read_series(tmp_path / "ct", max_voxels=719)


def test_a_scan_that_is_printed_does_not_tell_the_patient(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    assert scan.headers[0].PatientName == PATIENT_NAME
    assert PATIENT_NAME not in repr(scan)


def test_rescale_is_applied_slice_by_slice(tmp_path: Path) -> None:
    hu = make_hu()

    def edit(dataset: Any, k: int) -> None:
        if k % 2:
            dataset.RescaleSlope, dataset.RescaleIntercept = 2, -2048

    write_ct(tmp_path / "ct", hu, edit=edit)
    expected = hu.astype(np.int32)
    expected[:, :, 1::2] = 2 * (expected[:, :, 1::2] + 1024) - 2048
    array = read_series(tmp_path / "ct").volume.array
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array, expected)


def test_one_fractional_slope_makes_the_volume_float32(tmp_path: Path) -> None:
    hu = write_ct(tmp_path / "ct", edit=change(1, RescaleSlope=0.5))
    array = read_series(tmp_path / "ct").volume.array
    expected = hu.astype(np.float32)
    expected[:, :, 1] = (expected[:, :, 1] + 1024) / 2 - 1024
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected)


def test_values_that_no_scanner_measures_are_noted(tmp_path: Path) -> None:
    hu = make_hu().astype(np.int32)
    hu[:3] = 62512
    write_ct(tmp_path / "ct", hu)
    assert read_series(tmp_path / "ct").volume.notes[0].startswith("values up to 62512 HU")


@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("named", [True, False])
def test_an_end_slice_of_another_series_uid_is_refused_by_name(
    tmp_path: Path, position: int, named: bool
) -> None:
    folder = tmp_path / "ct"
    write_ct(folder, edit=change(position, SeriesInstanceUID="1.2.3.9"))
    name = files(folder)[position].name
    series = "1.2.3.1" if named else None
    with pytest.raises(
        DataError, match=f"{name}: of another SeriesInstanceUID" if named else "several CT series"
    ):
        read_series(folder, series=series)


@pytest.mark.parametrize("position", [0, 5])
def test_an_end_slice_of_another_class_than_its_file_says_is_refused_by_name(
    tmp_path: Path, position: int
) -> None:
    folder = tmp_path / "ct"
    write_ct(folder)
    path = files(folder)[position]
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(path)
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.3"
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    pydicom.dcmwrite(path, dataset, enforce_file_format=False)
    with pytest.raises(DataError, match=f"{path.name}: SOPClassUID is not the one"):
        read_series(folder)


def test_an_end_slice_without_its_mark_is_refused_whatever_the_files_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    write_ct(folder)
    for path in files(folder):
        path.rename(path.with_suffix(".img"))
    (folder / "notes.txt").write_text("of the radiographer")
    assert read_series(folder).volume.array.shape[2] == 6
    last = sorted(folder.glob("*.img"))[-1]
    last.write_bytes(last.read_bytes()[:128] + b"DICX" + last.read_bytes()[132:])
    with pytest.raises(DataError, match=f"{last.name}: no DICM mark"):
        read_series(folder)


@pytest.mark.parametrize(
    "keyword", ["Modality", "RescaleType", "SeriesDescription", "PhotometricInterpretation"]
)
def test_no_message_repeats_text_of_the_scanner(
    tmp_path: Path, keyword: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "ct"
    write_ct(folder, edit=change(**{keyword: "DOE JANE"}))
    write_ct(folder, series=2)
    messages = [caplog.text]
    for wanted in (None, 1, 7):
        try:
            read_series(folder, series=wanted)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 1
    assert "DOE" not in "".join(messages)
