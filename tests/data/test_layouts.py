"""Finding cases in each layout, and saying what is wrong with a dataset."""

from __future__ import annotations

import json
import logging
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lungkit.data import open_dataset, write_nifti
from lungkit.errors import DataError, UsageError

Builder = Callable[..., Path]


@pytest.fixture
def decathlon(nnunet_folder: Builder) -> Callable[..., Path]:
    """Factory of a dataset in Decathlon layout; keywords replace entries of dataset.json."""

    def build(**entries: Any) -> Path:
        root = nnunet_folder()
        for path in (root / "imagesTr").iterdir():
            path.rename(path.with_name(path.name.replace("_0000", "")))
        content: dict[str, Any] = {
            "name": "Lung",
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "cancer"},
            "numTraining": 2,
            "training": [
                {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
                for name in ("case_b", "case_a")
            ],
        }
        (root / "dataset.json").write_text(json.dumps(content | entries))
        return root

    return build


@pytest.fixture
def folders(nnunet_folder: Builder) -> Path:
    root = nnunet_folder()
    (root / "dataset.json").unlink()
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "masks")
    for path in (root / "images").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    return root


def test_nnunet_raw_is_recognised(nnunet_folder: Builder) -> None:
    root = nnunet_folder(channels=2)
    dataset = open_dataset(root)
    assert dataset.layout == "nnunet"
    assert [case.case_id for case in dataset.cases] == ["case_a", "case_b"]
    assert dataset.channel_names == ("CT0", "CT1")
    assert dataset.labels == {"background": 0, "tumour": 1}
    case = dataset.case("case_b")
    assert [path.name for path in case.images] == ["case_b_0000.nii.gz", "case_b_0001.nii.gz"]
    assert case.label == root / "labelsTr" / "case_b.nii.gz"


def test_nnunet_version_1_json_is_understood(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    (root / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "CT"},
                "labels": {"0": "background", "1": "tumour"},
                "training": [{"image": "./imagesTr/case_a.nii.gz", "label": "./labelsTr/case_a.nii.gz"}],
            }
        )
    )
    dataset = open_dataset(root)
    assert dataset.layout == "nnunet"
    assert dataset.labels == {"background": 0, "tumour": 1}
    assert len(dataset.cases) == 2


def test_decathlon_is_recognised(decathlon: Builder) -> None:
    dataset = open_dataset(decathlon())
    assert dataset.layout == "decathlon"
    assert dataset.name == "Lung"
    assert [case.case_id for case in dataset.cases] == ["case_a", "case_b"]
    assert dataset.labels == {"background": 0, "cancer": 1}


@pytest.mark.parametrize("mask_folder", ["masks", "labels"])
def test_two_plain_folders_are_recognised(folders: Path, mask_folder: str) -> None:
    if mask_folder != "masks":
        (folders / "masks").rename(folders / mask_folder)
    dataset = open_dataset(folders)
    assert dataset.layout == "folders"
    assert dataset.num_classes == 2
    assert dataset.case("case_a").label == folders / mask_folder / "case_a.nii.gz"


def test_unknown_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json .* images/ and masks/"):
        open_dataset(tmp_path)


def test_absent_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "absent")


def test_unknown_layout_name_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'bids' is none of auto, nnunet"):
        open_dataset(tmp_path, layout="bids")


def test_layout_can_be_forced(nnunet_folder: Builder) -> None:
    with pytest.raises(DataError, match="'training' must be a list"):
        open_dataset(nnunet_folder(), layout="decathlon")


def test_image_without_label_is_named(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    (root / "labelsTr" / "case_b.nii.gz").unlink()
    with pytest.raises(DataError, match="no label for case_b"):
        open_dataset(root)


def test_label_without_image_is_named(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    (root / "imagesTr" / "case_a_0000.nii.gz").unlink()
    with pytest.raises(DataError, match="no image for the label of case_a"):
        open_dataset(root)


def test_missing_label_folder_is_named(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    shutil.rmtree(root / "labelsTr")
    with pytest.raises(DataError, match="labelsTr: no such folder"):
        open_dataset(root)


def test_missing_channel_is_named(nnunet_folder: Builder) -> None:
    root = nnunet_folder(channels=2)
    (root / "imagesTr" / "case_b_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case case_b has the channels \[0\].*\[0, 1\] \(CT0, CT1\)"):
        open_dataset(root)


def test_image_without_channel_number_is_refused(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    (root / "imagesTr" / "case_a_0000.nii.gz").rename(root / "imagesTr" / "case_a.nii.gz")
    with pytest.raises(DataError, match=r"case_a\.nii\.gz: no channel number"):
        open_dataset(root)


def test_hidden_files_are_left_out(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    (root / "imagesTr" / "._case_a_0000.nii.gz").write_bytes(b"finder")
    assert len(open_dataset(root).cases) == 2


def test_empty_dataset_is_refused(nnunet_folder: Builder) -> None:
    with pytest.raises(DataError, match="no cases found"):
        open_dataset(nnunet_folder(names=()))


def test_wrong_number_of_cases_is_warned_of(nnunet_folder: Builder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        open_dataset(nnunet_folder(numTraining=7))
    assert "numTraining is 7, but 2 cases were found" in caplog.text


def test_same_name_with_two_suffixes_is_refused(folders: Path) -> None:
    write_nifti(folders / "images" / "case_a.nii", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"case_a exist with two suffixes"):
        open_dataset(folders)


def test_case_listed_twice_is_refused(decathlon: Builder) -> None:
    entry = {"image": "imagesTr/case_a.nii.gz", "label": "labelsTr/case_a.nii.gz"}
    with pytest.raises(DataError, match="case id occurs more than once: case_a"):
        open_dataset(decathlon(training=[entry, entry]))


def test_listed_file_that_is_absent_is_named(decathlon: Builder) -> None:
    root = decathlon()
    (root / "labelsTr" / "case_a.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case_a\.nii\.gz: label listed in .*dataset\.json is missing"):
        open_dataset(root)


def test_several_modalities_in_one_file_are_refused(decathlon: Builder) -> None:
    with pytest.raises(DataError, match=r"2 channels in 4D files \(CT, PET\)"):
        open_dataset(decathlon(modality={"0": "CT", "1": "PET"}))


@pytest.mark.parametrize(
    "entry",
    ["../secret.nii.gz", "imagesTr/../../secret.nii.gz", "{absolute}", "C:\\secret.nii.gz", "\\\\host\\x"],
)
def test_listed_path_outside_the_folder_is_refused(decathlon: Builder, tmp_path: Path, entry: str) -> None:
    write_nifti(tmp_path / "secret.nii.gz", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    entry = entry.replace("{absolute}", str(tmp_path / "secret.nii.gz"))
    root = decathlon(training=[{"image": entry, "label": "labelsTr/case_a.nii.gz"}])
    with pytest.raises(DataError, match="lies outside"):
        open_dataset(root)


def test_listed_link_that_leaves_the_folder_is_refused(decathlon: Builder, tmp_path: Path) -> None:
    root = decathlon()
    image = root / "imagesTr" / "case_a.nii.gz"
    image.rename(tmp_path / "elsewhere.nii.gz")
    image.symlink_to(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(DataError, match="lies outside"):
        open_dataset(root)


def test_linked_dataset_folder_is_fine(decathlon: Builder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(decathlon())
    assert len(open_dataset(tmp_path / "link").cases) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": None}, "'labels' must map names to values"),
        ({"labels": {"background": 0}}, "1 labels declared"),
        ({"labels": {"tumour": 1, "vessel": 2}}, "no label has the value 0"),
        (
            {"labels": {"background": 0, "tumour": [1, 2]}},
            "'regions_class_order' must give each of the 1 regions",
        ),
        ({"labels": {"background": 0, "tumour": 1, "nodule": 1}}, "declared twice"),
        ({"labels": {"background": 0, "tumour": 1.5}}, "not a name with a whole number"),
        ({"labels": {"background": 0, "tumour": -1}}, "not a name with a whole number"),
        ({"labels": {"background": 0, "tumour": True}}, "not a name with a whole number"),
        ({"channel_names": None}, "'channel_names'"),
        ({"channel_names": {}}, "'channel_names' is empty"),
        ({"channel_names": {"1": "CT"}}, "'channel_names'"),
        ({"file_ending": ".png"}, r"file_ending '\.png' is not supported"),
    ],
)
def test_malformed_declaration_is_refused(
    nnunet_folder: Builder, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(nnunet_folder(**entries))


@pytest.mark.parametrize("training", [[["image", "label"]], [{"image": "imagesTr/case_a.nii.gz"}], ["x"]])
def test_malformed_training_entry_is_refused(decathlon: Builder, training: list[Any]) -> None:
    with pytest.raises(DataError, match="must hold"):
        open_dataset(decathlon(training=training))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff\xfe", "[" * 100_000])
def test_unreadable_json_is_refused(nnunet_folder: Builder, text: str) -> None:
    root = nnunet_folder()
    (root / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(root)


def test_ignore_label_is_kept_apart_from_the_classes(nnunet_folder: Builder) -> None:
    dataset = open_dataset(nnunet_folder(labels={"background": 0, "tumour": 1, "ignore": 2}))
    assert dataset.num_classes == 2
    assert dataset.ignore_label == 2
    assert dataset.label_map == {0: 0, 1: 1, 2: 255}


def test_suffixes_count_in_any_case(nnunet_folder: Builder) -> None:
    root = nnunet_folder(file_ending=".NII.GZ")
    for folder in ("imagesTr", "labelsTr"):
        path = sorted((root / folder).iterdir())[0]
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    assert len(open_dataset(root).cases) == 2


def test_a_file_ending_that_fits_no_file_is_shown_with_that_of_the_files(nnunet_folder: Builder) -> None:
    with pytest.raises(
        DataError, match=r"imagesTr: holds \.nii\.gz files, but file_ending .* is \.nii; correct it"
    ):
        open_dataset(nnunet_folder(file_ending=".nii"))


def test_names_in_two_unicode_forms_are_pairs(folders: Path) -> None:
    for folder, form in (("images", "NFC"), ("masks", "NFD")):
        for path in sorted((folders / folder).iterdir()):
            path.rename(path.with_name(unicodedata.normalize(form, "Lä" + path.name)))
    assert [case.case_id for case in open_dataset(folders).cases] == ["Läcase_a", "Läcase_b"]


def test_a_name_that_is_not_utf8_is_named(folders: Path) -> None:
    Path(os.fsdecode(os.fsencode(folders) + b"/images/L\xe4sion.nii.gz")).touch()
    with pytest.raises(DataError, match=r"not UTF-8 \(b'L\\xe4sion\.nii\.gz'\); rename it"):
        open_dataset(folders)


def test_cases_that_nnunet_lists_are_those_and_no_others(nnunet_folder: Builder) -> None:
    listed = {
        "first": {"images": ["imagesTr/case_b_0000.nii.gz"], "label": "labelsTr/case_b.nii.gz"},
        "second": {"images": ["./imagesTr/case_a_0000.nii.gz"], "label": "labelsTr/case_a.nii.gz"},
    }
    dataset = open_dataset(nnunet_folder(dataset=listed))
    assert [(case.case_id, case.images[0].name) for case in dataset.cases] == [
        ("first", "case_b_0000.nii.gz"),
        ("second", "case_a_0000.nii.gz"),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"images": "x", "label": "y"}, "'dataset' must hold"),
        (
            {"images": ["imagesTr/case_a_0000.nii.gz"] * 2, "label": "labelsTr/case_a.nii.gz"},
            r"a has the channels \[0, 1\]",
        ),
        ({"images": ["../x.nii.gz"], "label": "labelsTr/case_a.nii.gz"}, "lies outside"),
        ({"images": ["imagesTr/x.nii.gz"], "label": "labelsTr/case_a.nii.gz"}, "x.nii.gz: listed in"),
    ],
)
def test_a_malformed_list_of_cases_is_refused(
    nnunet_folder: Builder, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(nnunet_folder(dataset={"a": entry}))


def test_patients_are_groups(nnunet_folder: Builder) -> None:
    dataset = open_dataset(nnunet_folder(patients={"case_a": "p1"}))
    assert [case.group for case in dataset.cases] == ["p1", "case_b"]


@pytest.mark.parametrize("patients", [["case_a"], {"case_a": 1}])
def test_malformed_patients_are_refused(nnunet_folder: Builder, patients: object) -> None:
    with pytest.raises(DataError, match="'patients' must map"):
        open_dataset(nnunet_folder(patients=patients))


@pytest.mark.parametrize("entry", ["../outside.nii.gz", "/etc/passwd", "a" * 5000, "a\0b", "./x/../../y"])
def test_a_list_of_nnunet_version_1_is_not_followed_out_of_the_folder(
    nnunet_folder: Callable[..., Path], entry: str
) -> None:
    root = nnunet_folder()
    (root.parent / "outside.nii.gz").touch()
    content = json.loads((root / "dataset.json").read_text())
    content["training"] = [{"image": entry, "label": entry}]
    (root / "dataset.json").write_text(json.dumps(content))
    assert open_dataset(root).layout == "nnunet"
    (root / "imagesTr").rename(root / "elsewhere")
    with pytest.raises(DataError) as found:
        open_dataset(root)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("where", ["numTraining", "name", "labels", "patients"])
def test_half_of_a_surrogate_pair_is_no_text(nnunet_folder: Callable[..., Path], where: str) -> None:
    root = nnunet_folder()
    content = json.loads((root / "dataset.json").read_text())
    content[where] = {"\ud800": 1, "background": 0} if where in ("labels", "patients") else "\ud800"
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        open_dataset(root)


def test_a_class_name_that_a_terminal_obeys_is_refused(nnunet_folder: Callable[..., Path]) -> None:
    root = nnunet_folder()
    content = json.loads((root / "dataset.json").read_text())
    content["labels"] = {"background": 0, "tumour\x1b[2J": 1}
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"label 'tumour\\x1b\[2J' holds what is no letter"):
        open_dataset(root)
