"""Every reader on mutated files: a right result or an error of lungkit's, never another traceback or other voxels.

Seeds are fixed and the number of files bounded, so that a run takes seconds and fails the same way twice; for the long
mode see :mod:`fuzzing`.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_cases import files, make_hu, write_ct, write_enhanced_ct
from fuzzing import tries
from model_cases import random_network, save_model

from lungkit.checkpoint import _digest_of, load_checkpoint, sha256_of
from lungkit.data import open_dataset, read_volume, write_nifti
from lungkit.data.dicom import read_series
from lungkit.errors import CheckpointError, LungkitError
from lungkit.inference import TrainedModel
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import config_to_yaml, load_config

AFFINE = np.diag([-0.75, -0.75, 2.5, 1.0])
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        255,
        300,
        70_000,
        2**40,
        10**400,
        0.5,
        -0.0,
        1e-300,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "0",
        "tumour",
        "../../etc",
        "\0",
        "\ud800",
        "٣",
        [],
        [0],
        [[]],
        {},
        {"0": "a"},
        {"": None},
        [1, "a"],
    ),
)
WORDS = tuple(
    struct.pack(f"<{kind}", value)
    for kind, values in {
        "h": (0, 1, -1, 32767, -32768),
        "i": (0, 1, -1, 2**31 - 1, -(2**31)),
        "f": (0.0, -1.0, 1e30, -1e-30, float("nan"), float("inf")),
    }.items()
    for value in values
)

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join(9 * [f'*{before}'])}]\n"
    for before, after in itertools.pairwise("abcdefghij")
)


def mutate(content: bytes, random: np.random.Generator, *, end: int | None = None) -> bytes:
    """One damage of the first ``end`` bytes: bits, a word of an extreme value, a gap, a repeat, or an early end."""
    end = len(content) if end is None else end
    position = int(random.integers(end))
    length = int(random.integers(1, 64))
    kind = random.integers(6)
    if kind == 0:
        return content[:position]
    if kind == 1:
        return content[:position] + content[position + length :]
    if kind == 2:
        return content[:position] + content[position : position + length] * 2 + content[position + length :]
    damaged = bytearray(content)
    if kind == 3:
        word = WORDS[random.integers(len(WORDS))]
        damaged[position : position + len(word)] = word
    else:
        for _ in range(1 if kind == 4 else 8):
            damaged[int(random.integers(end))] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def replaced(tree: Any, random: np.random.Generator) -> Any:
    """A copy of a JSON tree with one node replaced, removed or added."""
    tree = copy.deepcopy(tree)
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = nodes[random.integers(len(nodes))]
    value = copy.deepcopy(VALUES[random.integers(len(VALUES))])
    kind = random.integers(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(value)] = node.pop(key)
    else:
        node[key] = value
    return tree


def outcomes(
    action: Callable[[], Any], count: int, prepare: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """Number and result of every run that ends without an error; an error must be one of lungkit's, in words."""
    failed = 0
    for number in range(tries(count)):
        prepare(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = action()
        except LungkitError as error:
            failed += 1
            assert len(str(error)) > 10
            continue
        yield number, result
    assert failed, "no mutation was noticed"


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_header(tmp_path: Path, kind: Any) -> None:
    array = np.random.default_rng(0).integers(-1000, 400, (5, 4, 3)).astype(np.int16)
    image = kind(array, AFFINE)
    image.set_qform(AFFINE, 1)
    path = tmp_path / "a.nii"
    nib.save(image, path)
    content = path.read_bytes()

    def prepare(number: int) -> None:
        path.write_bytes(
            mutate(content, np.random.default_rng(number), end=kind.header_class.template_dtype.itemsize)
        )

    for number, volume in outcomes(lambda: read_volume(path), 1500, prepare):
        assert volume.array.ndim == 3, number
        assert np.isfinite(volume.array).all(), number
        assert np.isfinite(np.linalg.inv(volume.affine)).all(), number
        try:
            other = np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
        except Exception:
            continue  # nibabel's own kinds of errors are its business
        np.testing.assert_allclose(
            volume.array,
            other.reshape(volume.array.shape, order="F"),
            rtol=1e-5,
            atol=1e-37,
            err_msg=str(number),
        )


def test_compressed_nifti(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-1000, 400, (9, 8, 7)).astype(np.int16)
    path = tmp_path / "a.nii.gz"
    write_nifti(path, array, AFFINE)
    content = path.read_bytes()
    for number, volume in outcomes(
        lambda: read_volume(path),
        800,
        lambda number: path.write_bytes(mutate(content, np.random.default_rng(number))) and None,
    ):
        np.testing.assert_array_equal(volume.array, array, err_msg=str(number))
        np.testing.assert_array_equal(volume.affine, AFFINE, err_msg=str(number))


def test_compressed_nifti_header(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    write_nifti(path, np.zeros((9, 8, 7), np.int16), AFFINE)
    content = gzip.decompress(path.read_bytes())

    def prepare(number: int) -> None:
        path.write_bytes(gzip.compress(mutate(content, np.random.default_rng(number), end=352), 1))

    for number, volume in outcomes(lambda: read_volume(path), 800, prepare):
        assert volume.array.size <= 9 * 8 * 7 * 2, number


def test_dicom(tmp_path: Path) -> None:
    import pydicom

    folder = tmp_path / "ct"
    hu = write_ct(folder, make_hu((6, 5, 3)))
    original = read_series(folder)
    path = files(folder)[1]
    content = path.read_bytes()
    decisive = [
        *(
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "Rows",
            "Columns",
            "BitsAllocated",
        ),
        *(
            "BitsStored",
            "HighBit",
            "PixelRepresentation",
            "RescaleSlope",
            "RescaleIntercept",
            "PixelData",
            "Modality",
        ),
        *("SeriesInstanceUID", "ImageType", "SOPClassUID", "PixelPaddingValue", "PixelPaddingRangeLimit"),
        *("SamplesPerPixel", "NumberOfFrames", "SeriesNumber", "FrameOfReferenceUID"),
    ]

    def prepare(number: int) -> None:
        path.write_bytes(mutate(content, np.random.default_rng(number)))

    before = pydicom.dcmread(path)
    for number, scan in outcomes(lambda: read_series(folder), 500, prepare):
        assert scan.volume.array.ndim == 3, number
        same = scan.volume.array.shape == hu.shape and (scan.volume.array == hu).all()
        if not same or not np.array_equal(scan.volume.affine, original.volume.affine):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                after = pydicom.dcmread(path, force=True)
            assert any(before.get(name) != after.get(name) for name in decisive), number


def test_enhanced_dicom(tmp_path: Path) -> None:
    write_enhanced_ct(tmp_path, make_hu((6, 5, 3)))
    path = tmp_path / "enhanced.dcm"
    content = path.read_bytes()

    def prepare(number: int) -> None:
        path.write_bytes(mutate(content, np.random.default_rng(number)))

    for number, scan in outcomes(lambda: read_series(tmp_path), 300, prepare):
        assert scan.volume.array.shape[2] == len(scan.headers), number


@pytest.mark.parametrize("layout", ["nnunet", "decathlon"])
def test_dataset_json(tmp_path: Path, layout: str) -> None:
    content: dict[str, Any] = {
        "name": "phantoms",
        "channel_names": {"0": "CT", "1": "PET"} if layout == "nnunet" else {"0": "CT"},
        "labels": {"background": 0, "tumour": 1, "node": 2, "ignore": 255},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for case in ("a", "b"):
        for channel in range(2):
            (tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
        (tmp_path / "labelsTr" / f"{case}.nii.gz").touch()
    if layout == "decathlon":
        content["training"] = [
            {"image": f"./imagesTr/{case}_0000.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in "ab"
        ]
    path = tmp_path / "dataset.json"

    def prepare(number: int) -> None:
        random = np.random.default_rng(number)
        if number % 2:
            path.write_bytes(mutate(json.dumps(content).encode(), random))
        else:
            path.write_text(json.dumps(replaced(content, random)))

    for number, found in outcomes(lambda: open_dataset(tmp_path), 1000, prepare):
        assert found.num_classes >= 2, number
        assert len(found.cases) in (1, 2), number
        values = [*found.labels.values(), *([] if found.ignore_label is None else [found.ignore_label])]
        assert all(isinstance(value, int) and 0 <= value <= 65535 for value in values), number
        assert len({*values}) == len(values), number
        assert all(
            path.resolve().is_relative_to(tmp_path.resolve()) for c in found.cases for path in c.images
        )


def test_checkpoint_of_flipped_bits(tmp_path: Path) -> None:
    whole = save_model(tmp_path / "whole", random_network())
    folder = tmp_path / "damaged"

    def prepare(number: int) -> None:
        random = np.random.default_rng(number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        path = folder / ("manifest.json", "model.safetensors", "trainer.pt")[number % 3]
        path.write_bytes(mutate(path.read_bytes(), random))

    manifest = json.loads((whole / "manifest.json").read_text())
    for number, loaded in outcomes(lambda: load_checkpoint(folder), 150, prepare):
        # White space in JSON, or a word that was there before.
        same = all((folder / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())
        assert number % 3 == 0 or same, number
        assert loaded.description == manifest, number


def test_checkpoint_of_another_program(tmp_path: Path) -> None:
    """Files whose checksums are right, but not what they hold."""
    whole = save_model(tmp_path / "whole", random_network(), training_spacing_mm={
        "min": [1.0, 0.5, 0.5], "median": [2.0, 0.7, 0.7], "max": [3.0, 0.9, 0.9]})  # fmt: skip
    folder = tmp_path / "damaged"
    manifest = json.loads((whole / "manifest.json").read_text())

    def prepare(number: int) -> None:
        random = np.random.default_rng(number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        changed = copy.deepcopy(manifest)
        if number % 3:
            path = folder / ("model.safetensors", "trainer.pt")[number % 2]
            # The header of safetensors and of the archive, where it hurts most.
            path.write_bytes(mutate(path.read_bytes(), random, end=1024))
            changed["sha256"][path.name] = sha256_of(path)
        else:
            for _ in range(50):
                changed = replaced(manifest, random)
                if isinstance(changed.get("sha256"), dict):
                    break
        try:
            changed["sha256"]["manifest.json"] = _digest_of(changed)
        except (KeyError, TypeError, ValueError):
            changed = copy.deepcopy(manifest)
        (folder / "manifest.json").write_text(json.dumps(changed))

    def load() -> TrainedModel:
        load_checkpoint(folder)
        return TrainedModel.load(folder)

    for number, model in outcomes(load, 300, prepare):
        assert model.labels, number
        assert sum(parameter.numel() for parameter in model.network.parameters()) < 100_000, number


def test_a_network_without_end_is_refused_before_it_is_built(tmp_path: Path) -> None:
    network = random_network()
    for number, (name, value) in enumerate(
        {
            "convolutions": [2**40, 2],
            "features": [2**40, 8],
            "residual_encoder": 2**40,
            "decoder_convolutions": [2**40],
        }.items()
    ):
        folder = save_model(tmp_path / str(number), network)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["model"][name] = value
        manifest["sha256"]["manifest.json"] = _digest_of(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"model\.safetensors holds"):
            TrainedModel.load(folder)


def test_configuration(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "config.yaml"
    text = config_to_yaml(TrainConfig())
    tree = yaml.safe_load(text)

    def prepare(number: int) -> None:
        random = np.random.default_rng(number)
        if number % 2:
            path.write_bytes(mutate(text.encode(), random))
        else:
            path.write_text(yaml.safe_dump(replaced(tree, random)), encoding="utf-8", errors="surrogatepass")

    for number, config in outcomes(lambda: load_config(path), 300, prepare):
        assert isinstance(config, TrainConfig), number
        assert load_config_of(config, tmp_path) == config or config != config, number


def load_config_of(config: TrainConfig, folder: Path) -> TrainConfig:
    """``config`` after it was written and read."""
    (folder / "again.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return load_config(folder / "again.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "&a [*a]",
        "epochs: &a {b: *a}",
        "epochs: " + "[" * 3000,
        LAUGHS,
        "!!python/object/apply:os.system ['true']",
        "epochs: 1e400",
        "epochs: 2020-01-01",
        "\x00",
        "",
    ],
    ids=["loop", "loop in a mapping", "nesting", "billion laughs", "object", "infinity", "date", "NUL", "empty"],
)  # fmt: skip
def test_hostile_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    try:
        assert load_config(path) == TrainConfig()
        assert text == ""
    except LungkitError as error:
        assert len(str(error)) < 2000
