"""lungkit-train on data that cannot be trained on: exit code 3, and a message that names the file and the fault."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lungkit.cli.train import main
from lungkit.data import read_volume, write_nifti

Options = Callable[..., list[str]]
IMAGE, MASK = "imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"


def case_ids(dataset: Path) -> list[str]:
    return sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTr").iterdir())


@pytest.fixture
def image(dataset: Path) -> Path:
    return dataset / IMAGE.format(case_ids(dataset)[0])


@pytest.fixture
def mask(dataset: Path) -> Path:
    return dataset / MASK.format(case_ids(dataset)[0])


@pytest.fixture
def refusal(
    dataset: Path, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run on the damaged dataset; checks the exit code and gives the message."""

    def run(*more: str, data: Path = dataset) -> str:
        assert main(options(*more, data=data)) == 3
        assert not (tmp_path / "runs").exists()
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message.split("error: ")[-1]

    return run


def rewrite(path: Path, array: np.ndarray) -> None:
    write_nifti(path, array, read_volume(path).affine)


def plain_header(path: Path) -> tuple[bytearray, bytes]:
    """Header of 352 bytes and data of a compressed file."""
    content = gzip.decompress(path.read_bytes())
    return bytearray(content[:352]), content[352:]


def test_truncated(image: Path, refusal: Callable[..., str]) -> None:
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    message = refusal()
    assert str(image) in message
    assert "truncated" in message


def test_bit_flipped(image: Path, refusal: Callable[..., str]) -> None:
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 0x10
    image.write_bytes(content)
    message = refusal()
    assert str(image) in message
    assert "corrupt" in message or "damaged" in message or "checksum" in message


def test_zero_bytes(image: Path, refusal: Callable[..., str]) -> None:
    image.write_bytes(b"")
    message = refusal()
    assert str(image) in message
    assert "empty" in message


def test_wrong_magic(image: Path, refusal: Callable[..., str]) -> None:
    header, data = plain_header(image)
    header[344:348] = b"nope"
    image.write_bytes(gzip.compress(bytes(header) + data))
    message = refusal()
    assert str(image) in message
    assert "magic" in message


def test_not_gzip_at_all(image: Path, refusal: Callable[..., str]) -> None:
    image.write_bytes(b"this is no scan" * 100)
    message = refusal()
    assert str(image) in message
    assert "gzip" in message


def test_header_larger_than_the_data(image: Path, refusal: Callable[..., str]) -> None:
    header, data = plain_header(image)
    image.write_bytes(gzip.compress(bytes(header) + data[:-100]))
    message = refusal()
    assert str(image) in message
    assert "bytes" in message


def test_nan_voxels(image: Path, refusal: Callable[..., str]) -> None:
    array = read_volume(image).array.astype(np.float32)
    array[3:5, 0, 0] = np.nan
    rewrite(image, array)
    message = refusal()
    assert str(image) in message
    assert "2 " in message
    assert "NaN" in message


def test_four_dimensions(image: Path, refusal: Callable[..., str]) -> None:
    nib.save(nib.Nifti1Image(np.zeros((48, 48, 1, 3), np.int16), np.eye(4)), image)
    message = refusal()
    assert str(image) in message
    assert "(48, 48, 1, 3)" in message


def test_mask_of_another_shape(mask: Path, refusal: Callable[..., str]) -> None:
    rewrite(mask, np.zeros((48, 40, 1), np.uint8))
    message = refusal()
    assert str(mask) in message
    assert "(48, 40, 1)" in message
    assert "(48, 48, 1)" in message


def test_mask_of_another_affine(mask: Path, refusal: Callable[..., str]) -> None:
    volume = read_volume(mask)
    affine = volume.affine.copy()
    affine[0, 3] += 5
    write_nifti(mask, volume.array, affine)
    message = refusal()
    assert str(mask) in message
    assert "affine" in message
    assert "differs by 5" in message


def test_undeclared_label(mask: Path, refusal: Callable[..., str]) -> None:
    array = read_volume(mask).array.astype(np.uint8)
    array[:3, 0, 0] = 7
    rewrite(mask, array)
    message = refusal()
    assert str(mask) in message
    assert "7 (3 voxels)" in message


def test_missing_label_file(mask: Path, refusal: Callable[..., str]) -> None:
    mask.unlink()
    message = refusal()
    assert str(mask.parent) in message
    assert f"no label for {mask.name.removesuffix('.nii.gz')}" in message


def test_path_out_of_the_dataset_in_its_json(
    dataset: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    decathlon = tmp_path / "decathlon"
    shutil.copytree(dataset / "imagesTr", decathlon / "imagesTr")
    entry = {"image": f"../scans/imagesTr/{case_ids(dataset)[0]}_0000.nii.gz", "label": "../scans/labelsTr/x"}
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "tumour"}, "training": [entry]}
    (decathlon / "dataset.json").write_text(json.dumps(content))
    message = refusal(data=decathlon)
    assert str(decathlon / "dataset.json") in message
    assert "../scans" in message


def test_broken_json(dataset: Path, refusal: Callable[..., str]) -> None:
    (dataset / "dataset.json").write_text('{"labels": ')
    assert str(dataset / "dataset.json") in refusal()


def test_empty_folder(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "nothing").mkdir()
    message = refusal(data=tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message
    assert "dataset.json" in message


def test_no_such_folder(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "no such folder" in refusal(data=tmp_path / "absent")


def test_fold_without_foreground(dataset: Path, refusal: Callable[..., str]) -> None:
    names = case_ids(dataset)
    for name in names[:3]:
        path = dataset / MASK.format(name)
        rewrite(path, np.zeros(read_volume(path).array.shape, np.uint8))
    folds = [{"train": names[:3], "val": names[3:]}, {"train": names[3:], "val": names[:3]}]
    (dataset / "splits_final.json").write_text(json.dumps(folds))
    message = refusal()
    assert "no training case of fold 0 has foreground" in message
    assert "--data.fold" in message


def test_split_of_unknown_cases(dataset: Path, refusal: Callable[..., str]) -> None:
    (dataset / "splits_final.json").write_text(json.dumps([{"train": ["ghost"], "val": case_ids(dataset)}]))
    message = refusal()
    assert "splits_final.json" in message
    assert "ghost" in message


def test_more_voxels_than_allowed(image: Path, refusal: Callable[..., str]) -> None:
    message = refusal("--max-voxels", "2000")
    assert "2304" in message.replace(",", "").replace("_", "")
    assert "max" in message


def test_a_damaged_validation_case_is_found_before_training(
    dataset: Path, refusal: Callable[..., str]
) -> None:
    names = case_ids(dataset)
    (dataset / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    path = dataset / IMAGE.format(names[4])
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in refusal()
