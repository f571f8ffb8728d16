"""Finding the cases of a dataset: nnU-Net raw, Medical Segmentation Decathlon, or two plain folders.

nnU-Net raw (Isensee et al. 2021): ``imagesTr/<case>_0000.nii.gz`` (one file a channel),
``labelsTr/<case>.nii.gz`` and ``dataset.json`` with ``labels`` and ``channel_names`` (or ``modality``, as in
version 1). Decathlon (Antonelli et al. 2022): ``dataset.json`` lists ``training`` pairs of image and label.
Several readers, beside nnU-Net's folders: ``votesTr/<case>.nii.gz`` counts the readers who marked a voxel, and
``"readers": 4`` in ``dataset.json`` tells how many there were; or ``"readers": ["A", "B"]`` names them, and
``readersTr/A/<case>.nii.gz`` is the mask of one (of those who have read the case).
Folders: ``images`` and ``masks`` (or ``labels``) with files of the same names, values 0 and 1.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lungkit._reading import read_json
from lungkit.data.dataset import Case, Dataset, Readers
from lungkit.data.declared_labels import Regions, as_int, parse_labels
from lungkit.data.nifti_names import SUFFIXES, nifti_by_stem, nifti_files, split_channel, split_suffix
from lungkit.errors import DataError, UsageError, shorten

_LOG = logging.getLogger("lungkit")

_MASK_FOLDERS = ("masks", "labels")


def open_dataset(root: str | os.PathLike[str], *, layout: str = "auto") -> Dataset:
    """Open the dataset in folder ``root``; files are listed, not read.

    Args:
        root: folder with ``dataset.json``, or with ``images`` and ``masks`` (or ``labels``).
        layout: "nnunet", "decathlon", "folders", or "auto" to look which it is.

    Raises:
        UsageError: ``layout`` is none of these.
        DataError: the folder is absent or of no known layout; ``dataset.json`` is malformed, or points
            outside the folder; an image has no label or a label no image; a case id occurs twice; there
            is no case.

    Example:
        >>> import tempfile
        >>> from lungkit.data import write_phantom_dataset
        >>> root = write_phantom_dataset(tempfile.mkdtemp() + "/phantoms", cases=2, shape=(8, 32, 32), dims=3)
        >>> dataset = open_dataset(root)
        >>> dataset.layout, len(dataset.cases), dataset.num_classes
        ('nnunet', 2, 2)
    """
    root = Path(root)
    readers = {"nnunet": _open_nnunet, "decathlon": _open_decathlon, "folders": _open_folders}
    if layout != "auto" and layout not in readers:
        raise UsageError(f"layout: {layout!r} is none of auto, {', '.join(readers)}")
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; name the folder that holds dataset.json or images/ and masks/"
        )
    dataset = readers[_detect(root) if layout == "auto" else layout](root)
    if not dataset.cases:
        raise DataError(f"{root}: no cases found (layout {dataset.layout}); add images and labels")
    repeated = [name for name, count in Counter(case.case_id for case in dataset.cases).items() if count > 1]
    if repeated:
        raise DataError(f"{root}: case id occurs more than once: {shorten(repeated)}; rename the files")
    return dataset


def read_declared_labels(path: Path) -> tuple[dict[str, int], int | None, Regions]:
    """Labels by name, the value to ignore if there is one, and regions, that the ``dataset.json`` at ``path`` declares.

    Raises:
        DataError: the file is malformed, or declares no usable labels.
    """
    return parse_labels(_read_json(path), path)


def _detect(root: Path) -> str:
    if (root / "dataset.json").is_file():
        training = _read_json(root / "dataset.json").get("training")
        if isinstance(training, list) and training:
            # nnU-Net version 1 lists Decathlon's pairs too, but its files carry a channel number.
            first = training[0].get("image", "") if isinstance(training[0], dict) else ""
            there = not isinstance(first, str) or _exists_inside(root, first)
            if there or not (_is_numbered(root / "imagesTr") and (root / "labelsTr").is_dir()):
                return "decathlon"
        return "nnunet"
    if (root / "images").is_dir() and any((root / name).is_dir() for name in _MASK_FOLDERS):
        return "folders"
    raise DataError(
        f"{root}: no known dataset layout; looked for dataset.json (nnU-Net raw, Medical Segmentation "
        "Decathlon) and for the folders images/ and masks/ or labels/"
    )


def _exists_inside(root: Path, entry: str) -> bool:
    try:
        return _inside(root, entry, root / "dataset.json").exists()
    except (DataError, OSError):
        return False


def _is_numbered(folder: Path) -> bool:
    return any(split_channel(stem)[1] is not None for stem, _ in nifti_files(folder))


def _open_nnunet(root: Path) -> Dataset:
    json_path = root / "dataset.json"
    content = _read_json(json_path)
    labels, ignore_label, regions = parse_labels(content, json_path)
    channel_names = _parse_channels(content, json_path)
    if isinstance(content.get("dataset"), dict):
        images, masks = _listed_cases(root, content["dataset"], json_path)
    else:
        images, masks = _cases_in_folders(root, content, json_path)
    expected = set(range(len(channel_names)))
    for case_id, channels in images.items():
        if set(channels) != expected:
            raise DataError(
                f"{root}: case {case_id} has the channels {sorted(channels)}, dataset.json "
                f"declares {sorted(expected)} ({', '.join(channel_names)}); add files or correct it"
            )
    _warn_of_count(content, json_path, len(images))
    patients = _parse_patients(content, json_path)
    readers = _parse_readers(root, content, json_path)
    read = {} if readers is None else _files_of_readers(root, readers)
    cases = tuple(
        Case(
            case_id,
            tuple(channels[index] for index in sorted(channels)),
            masks[case_id],
            patients.get(case_id, case_id),
            tuple(read.get(case_id, ())),
            readers is not None and not readers.names,
        )
        for case_id, channels in sorted(images.items())
    )
    name = _name(content, root)
    return Dataset(root, name, cases, labels, channel_names, ignore_label, "nnunet", readers, regions)


_Images = dict[str, dict[int, Path]]


def _cases_in_folders(
    root: Path, content: dict[str, Any], json_path: Path
) -> tuple[_Images, dict[str, Path]]:
    """Images by case and channel, masks by case, in ``imagesTr`` and ``labelsTr``."""
    suffix = content.get("file_ending", ".nii.gz")
    if not isinstance(suffix, str) or suffix.lower() not in SUFFIXES:
        raise DataError(f"{json_path}: file_ending {suffix!r} is not supported; convert the files to .nii.gz")
    folders = [_need_folder(root / name) for name in ("imagesTr", "labelsTr")]
    for folder in folders:
        other = sorted({split_suffix(path.name)[1] for _, path in nifti_files(folder)})
        if other and suffix.lower() not in (ending.lower() for ending in other):
            raise DataError(
                f"{folder}: holds {' and '.join(other)} files, but file_ending in {json_path} is {suffix}; correct it"
            )
    images: _Images = {}
    for stem, path in nifti_by_stem(folders[0], suffix.lower()).items():
        case_id, channel = split_channel(stem)
        if channel is None:
            raise DataError(f"{path}: no channel number; nnU-Net images are named <case>_0000{suffix}")
        images.setdefault(case_id, {})[channel] = path
    masks = nifti_by_stem(folders[1], suffix.lower())
    _check_pairs(images, masks, *folders)
    return images, masks


def _listed_cases(root: Path, listed: dict[str, Any], json_path: Path) -> tuple[_Images, dict[str, Path]]:
    """The same from nnU-Net's ``dataset``: for each case its ``images``, in order of channel, and its ``label``."""
    images: _Images = {}
    masks: dict[str, Path] = {}
    for case_id, entry in listed.items():
        files = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(files, list) or "label" not in entry:
            raise DataError(
                f"{json_path}: 'dataset' must hold {{images: [...], label}} for each case, found {entry!r:.80} for "
                f"{case_id}"
            )
        paths = [_inside(root, file, json_path) for file in (*files, entry["label"])]
        for path in paths:
            if not path.is_file():
                raise DataError(
                    f"{path}: listed in {json_path} for {case_id}, but missing; add it or correct the list"
                )
        *channels, masks[case_id] = paths
        images[case_id] = dict(enumerate(channels))
    return images, masks


def _open_decathlon(root: Path) -> Dataset:
    json_path = root / "dataset.json"
    content = _read_json(json_path)
    labels, ignore_label, regions = parse_labels(content, json_path)
    channel_names = _parse_channels(content, json_path)
    if len(channel_names) > 1:
        raise DataError(
            f"{json_path}: {len(channel_names)} channels in 4D files ({', '.join(channel_names)}); "
            "write one 3D file for each channel in the nnU-Net layout (<case>_0000.nii.gz, _0001.nii.gz)"
        )
    training = content.get("training")
    if not isinstance(training, list):
        raise DataError(f"{json_path}: 'training' must be a list of {{image, label}}, found {training!r:.80}")
    cases = []
    for entry in training:
        if not (isinstance(entry, dict) and {"image", "label"} <= entry.keys()):
            raise DataError(
                f"{json_path}: 'training' must hold {{image, label}} entries, found {entry!r:.80}"
            )
        image = _inside(root, entry["image"], json_path)
        label = _inside(root, entry["label"], json_path)
        for path, kind in ((image, "image"), (label, "label")):
            if not path.is_file():
                raise DataError(
                    f"{path}: {kind} listed in {json_path} is missing; add it or remove the entry"
                )
        case_id, suffix = split_suffix(image.name)
        if not suffix:
            raise DataError(f"{image}: listed in {json_path}, but not a .nii or .nii.gz file")
        cases.append(Case(case_id, (image,), label, case_id))
    _warn_of_count(content, json_path, len(cases))
    cases.sort(key=lambda case: case.case_id)
    name = _name(content, root)
    return Dataset(
        root, name, tuple(cases), labels, channel_names, ignore_label, "decathlon", regions=regions
    )


def _open_folders(root: Path) -> Dataset:
    found = [root / name for name in _MASK_FOLDERS if (root / name).is_dir()]
    if len(found) != 1:
        raise DataError(f"{root}: expected one of the folders masks/ and labels/, found {len(found)}")
    images = nifti_by_stem(_need_folder(root / "images"))
    masks = nifti_by_stem(found[0])
    _check_pairs(images, masks, root / "images", found[0])
    cases = tuple(Case(case_id, (path,), masks[case_id], case_id) for case_id, path in sorted(images.items()))
    return Dataset(root, root.resolve().name, cases, {"background": 0, "tumour": 1}, ("CT",), None, "folders")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; this layout needs it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _parse_channels(content: dict[str, Any], path: Path) -> tuple[str, ...]:
    declared = content.get("channel_names", content.get("modality"))
    if not isinstance(declared, dict) or set(declared) != {str(index) for index in range(len(declared))}:
        raise DataError(
            f"{path}: 'channel_names' (or 'modality') must map \"0\", \"1\", ... to names, "
            f"found {declared!r:.80}"
        )
    if not declared:
        raise DataError(f'{path}: \'channel_names\' is empty; declare e.g. {{"0": "CT"}}')
    return tuple(str(declared[str(index)]) for index in range(len(declared)))


def _parse_patients(content: dict[str, Any], path: Path) -> dict[str, str]:
    """Patient by case id, as ``lungkit-import`` notes them; a case without an entry is a patient of its own."""
    declared = content.get("patients", {})
    if not isinstance(declared, dict) or not all(isinstance(patient, str) for patient in declared.values()):
        raise DataError(f"{path}: 'patients' must map case ids to names of patients, found {declared!r:.80}")
    return declared


def _parse_readers(root: Path, content: dict[str, Any], path: Path) -> Readers | None:
    """Who has read the scans: names or a number in ``dataset.json``, or votes of nobody knows how many."""
    declared = content.get("readers")
    if declared is None:
        return Readers(None) if (root / "votesTr").is_dir() else None
    if isinstance(declared, list):
        plain = [isinstance(name, str) and Path(name).name == name and name != ".." for name in declared]
        if len(declared) < 2 or not all(plain) or len(set(declared)) < len(declared):
            raise DataError(
                f"{path}: 'readers' must list two or more different names of folders in readersTr, found "
                f"{declared!r:.80}"
            )
        for name in declared:
            _need_folder(root / "readersTr" / name)
        return Readers(len(declared), tuple(declared))
    count = as_int(declared)
    if count is None or count < 2:
        raise DataError(
            f"{path}: 'readers' must be their number, 2 or more, or their names, found {declared!r:.80}"
        )
    _need_folder(root / "votesTr")
    return Readers(count)


def _files_of_readers(root: Path, readers: Readers) -> dict[str, list[Path]]:
    """The file of votes, or the masks of the readers in their order, by case."""
    folders = [root / "readersTr" / name for name in readers.names] or [root / "votesTr"]
    files: dict[str, list[Path]] = {}
    for folder in folders:
        for case_id, path in nifti_by_stem(folder).items():
            files.setdefault(case_id, []).append(path)
    return files


def _name(content: dict[str, Any], root: Path) -> str:
    return str(content.get("name") or root.resolve().name)


def _warn_of_count(content: dict[str, Any], path: Path, found: int) -> None:
    declared = content.get("numTraining")
    if declared is not None and declared != found:
        _LOG.warning("%s: numTraining is %.80r, but %d cases were found", path, declared, found)


def _inside(root: Path, entry: object, source: Path) -> Path:
    """Path of ``entry`` under ``root``: a dataset from elsewhere must not make us read the whole disk."""
    if not isinstance(entry, str) or not entry or "\0" in entry:
        raise DataError(f"{source}: {entry!r:.80} is not a file name")
    absolute = PurePosixPath(entry).is_absolute() or PureWindowsPath(entry).drive or entry.startswith("\\")
    path = root / entry
    try:
        escapes = absolute or not path.resolve().is_relative_to(root.resolve())
        path.is_file()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a loop of links, a name that is too long or no text
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{source}: {entry!r:.80} cannot be followed ({reason})") from error
    if escapes:
        raise DataError(
            f"{source}: {entry!r:.80} lies outside {root}; list files inside the dataset folder only"
        )
    return path


def _need_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; this layout needs it")
    return folder


def _check_pairs(images: Iterable[str], masks: Iterable[str], image_folder: Path, mask_folder: Path) -> None:
    unlabelled = sorted(set(images) - set(masks))
    if unlabelled:
        raise DataError(f"{mask_folder}: no label for {shorten(unlabelled)}; add them or remove the images")
    orphaned = sorted(set(masks) - set(images))
    if orphaned:
        raise DataError(f"{image_folder}: no image for the label of {shorten(orphaned)}; add or remove them")
