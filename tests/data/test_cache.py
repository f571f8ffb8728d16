"""The cache: right contents, no stale entry, damage found, many writers at once."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import save_model, threshold_network

from lungkit.data import (
    CachedCase,
    CaseCache,
    ChannelNormalisation,
    Dataset,
    NanPolicy,
    Preprocessing,
    cache,
    open_dataset,
    read_volume,
    write_nifti,
)
from lungkit.data.preprocessing import quantise
from lungkit.errors import DataError, ResourceError, UsageError
from lungkit.inference import Predictor, TrainedModel

AFFINE = np.diag([-0.75, -0.75, 2.5, 1.0])
PLAN = Preprocessing((ChannelNormalisation((-1000.0, 400.0), -100.0, 200.0, "HU"),), {0: 0, 1: 1})

Builder = Callable[..., Path]


@pytest.fixture
def dataset(nnunet_folder: Builder) -> Dataset:
    return open_dataset(nnunet_folder())


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != "sources")


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


class Recording(torch.nn.Module):
    """Keeps the patches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.seen.append(patches)
        return torch.cat([patches, -patches], 1)


@pytest.mark.parametrize("spacing", [None, (2.0, 1.0, 0.6)])
def test_the_cache_holds_what_prediction_gives_to_the_network(
    dataset: Dataset, tmp_path: Path, spacing: tuple[float, float, float] | None
) -> None:
    plan = dataclasses.replace(PLAN, target_spacing_mm=spacing)
    case = CaseCache(tmp_path / "cache", dataset, plan).prepare("case_a")
    model = TrainedModel.load(save_model(tmp_path / "m", threshold_network(), preprocessing=plan))
    network = Recording()
    model = dataclasses.replace(model, network=network, patch_size=case.shape)
    Predictor([model], device="cpu", precision="fp32")(dataset.case("case_a").images[0])
    (patches,) = network.seen
    assert case.image.dtype == np.int16
    np.testing.assert_array_equal(case.image, quantise(patches[0].numpy(), plan))
    np.testing.assert_allclose(case.image_float(), patches[0], rtol=0, atol=0.51 * case.slope)


def test_a_cached_case_has_the_shape_and_spacing_of_the_scan(dataset: Dataset, tmp_path: Path) -> None:
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert case.shape == (6, 10, 12) and case.image.shape == (1, 6, 10, 12)
    np.testing.assert_allclose(case.spacing_mm, (2.5, 0.75, 0.75), rtol=1e-6)
    stored = read_volume(dataset.case("case_a").images[0]).array[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_allclose(case.image_float()[0], (stored.clip(-1000, 400) + 100) / 200, atol=1e-5)


def test_cached_label_and_foreground_agree_with_the_mask(dataset: Dataset, tmp_path: Path) -> None:
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    mask = read_volume(tmp_path / "dataset" / "labelsTr" / "case_a.nii.gz").array
    np.testing.assert_array_equal(case.label, mask[::-1, ::-1].transpose(2, 1, 0))
    np.testing.assert_array_equal(case.foreground, np.argwhere(case.label == 1))
    assert case.foreground.dtype == np.int32
    assert case.class_voxels == (720 - 48, 48)


def test_arrays_are_memory_maps(dataset: Dataset, tmp_path: Path) -> None:
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert isinstance(case.image, np.memmap)
    assert not case.image.flags.writeable


def test_case_without_foreground_is_cached(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "dataset" / "labelsTr" / "case_a.nii.gz"
    write_nifti(path, np.zeros((12, 10, 6), np.uint8), AFFINE)
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert case.foreground.shape == (0, 3)


def test_ignored_voxels_are_255_and_not_foreground(nnunet_folder: Builder, tmp_path: Path) -> None:
    root = nnunet_folder(labels={"background": 0, "tumour": 1, "ignore": 2})
    mask = np.zeros((12, 10, 6), np.uint8)
    mask[0, 0, 0], mask[1, 1, 1] = 1, 2
    write_nifti(root / "labelsTr" / "case_a.nii.gz", mask, AFFINE)
    dataset = open_dataset(root)
    plan = dataclasses.replace(PLAN, label_map=dataset.label_map)
    case = CaseCache(tmp_path / "cache", dataset, plan).prepare("case_a")
    assert np.count_nonzero(case.label == 255) == 1
    assert len(case.foreground) == 1
    assert case.class_voxels == (718, 1)


def test_foreground_is_capped_without_losing_a_small_class() -> None:
    label = np.zeros((40, 40, 40), np.uint8)
    label[:30] = 1
    label[39, 39, 30:] = 2
    positions = cache._foreground(label, 3)
    classes = label[tuple(positions.T)]
    assert np.count_nonzero(classes == 1) == 10_000
    assert np.count_nonzero(classes == 2) == 10
    assert len(np.unique(positions, axis=0)) == len(positions)
    np.testing.assert_array_equal(positions, cache._foreground(label, 3))


def test_second_prepare_reads_the_entry_instead_of_the_scan(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the scan was read again")

    monkeypatch.setattr(cache, "read_case", refuse)
    CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")


def test_changed_scan_gives_a_new_entry(dataset: Dataset, tmp_path: Path) -> None:
    before = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    path = dataset.case("case_a").images[0]
    array = read_volume(path).array.copy()
    array[0, 0, 0] = 77
    write_nifti(path, array, AFFINE)
    after = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert after.directory != before.directory
    assert np.count_nonzero(after.image_float() != before.image_float()) == 1


def test_changed_mask_gives_a_new_entry(dataset: Dataset, tmp_path: Path) -> None:
    before = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    write_nifti(tmp_path / "dataset" / "labelsTr" / "case_a.nii.gz", np.ones((12, 10, 6), np.uint8), AFFINE)
    after = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert before.label.sum() == 48
    assert after.label.sum() == 720


@pytest.mark.parametrize(
    "change",
    [
        {"channels": (dataclasses.replace(PLAN.channels[0], mean=0.0),)},
        {"channels": (dataclasses.replace(PLAN.channels[0], window=(-500.0, 0.0)),)},
        {"target_spacing_mm": (1.0, 1.0, 1.0)},
    ],
)
def test_changed_preprocessing_gives_a_new_entry(dataset: Dataset, tmp_path: Path, change: dict) -> None:
    before = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    after = CaseCache(tmp_path / "cache", dataset, dataclasses.replace(PLAN, **change)).prepare("case_a")
    assert after.directory != before.directory


def test_same_scan_under_two_ids_gives_two_cases(dataset: Dataset, tmp_path: Path) -> None:
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        source = tmp_path / "dataset" / folder / f"case_a{suffix}.nii.gz"
        source.with_name(f"case_b{suffix}.nii.gz").write_bytes(source.read_bytes())
    prepared = CaseCache(tmp_path / "cache", dataset, PLAN).prepare_all(["case_a", "case_b"])
    assert [case.case_id for case in prepared] == ["case_a", "case_b"]


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "foreground.npy", "case.json"])
@pytest.mark.parametrize("damage", ["byte", "truncated", "removed"])
def test_damaged_entry_is_made_again_with_a_warning(
    dataset: Dataset, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").directory
    intact = {path.name: path.read_bytes() for path in directory.iterdir()}
    path = directory / name
    if damage == "byte":
        flip_byte(path, path.stat().st_size // 2)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert "is damaged" in caplog.text
    assert {path.name: path.read_bytes() for path in case.directory.iterdir()} == intact
    assert entries(tmp_path / "cache") == [directory]


def test_every_byte_of_a_large_array_is_checked(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").directory
    image, record = folder / "image.npy", folder / "case.json"
    np.save(image, np.random.default_rng(0).integers(-1000, 1000, (1, 40, 400, 300)).astype(np.int16))
    entry = json.loads(record.read_text())["entry"]
    entry["files"]["image"] = cache._checksums(image)
    written = {record: json.dumps({"entry": entry, "crc32": zlib.crc32(json.dumps(entry).encode())}).encode()}
    written |= {path: path.read_bytes() for path in folder.glob("*.npy")}
    size = image.stat().st_size
    for position in (130, size // 3 + 1, size // 2 + 40_000, size - 1):
        for path, content in written.items():
            path.write_bytes(content)
        flip_byte(image, position)
        with caplog.at_level(logging.WARNING, logger="lungkit"):
            assert CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").image.shape != (
                1,
                40,
                400,
                300,
            )
        assert "image.npy does not match its checksum" in caplog.text
        caplog.clear()


def test_an_array_is_read_once_in_a_process_to_be_checked(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").directory.iterdir():
        os.utime(path, (0, 0))  # a file of this moment may change again and keep its time
    CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    monkeypatch.setattr(cache, "_crc_of_file", lambda path: pytest.fail(f"{path} is read again"))
    CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")


def test_interrupted_build_leaves_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_checksums", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert entries(tmp_path / "cache") == []


def test_full_disk_is_a_resource_error_and_leaves_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("720 requested and 96 written")  # as numpy says it

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ResourceError, match=r"case_a-[0-9a-f]{20}: not written, the disk"):
        CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert entries(tmp_path / "cache") == []


def test_damaged_scan_is_refused_and_not_cached(dataset: Dataset, tmp_path: Path) -> None:
    path = dataset.case("case_a").images[0]
    flip_byte(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="case_a_0000"):
        CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert entries(tmp_path / "cache") == []


def test_undeclared_label_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, label_map={0: 0, 2: 1})
    with pytest.raises(DataError, match="undeclared label 1"):
        CaseCache(tmp_path / "cache", dataset, plan).prepare("case_a")


def test_case_without_label_is_a_usage_error(dataset: Dataset, tmp_path: Path) -> None:
    cases = tuple(dataclasses.replace(case, label=None) for case in dataset.cases)
    unlabelled = dataclasses.replace(dataset, cases=cases)
    with pytest.raises(UsageError, match="case_a has no label"):
        CaseCache(tmp_path / "cache", unlabelled, PLAN).prepare("case_a")


def test_directory_that_cannot_be_made_is_a_usage_error(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot be made"):
        CaseCache(tmp_path / "file" / "cache", dataset, PLAN)


def test_pickled_case_is_small_and_reopens_its_maps(dataset: Dataset, tmp_path: Path) -> None:
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    image = np.array(case.image)
    content = pickle.dumps(case)
    assert len(content) < 1000
    copy: CachedCase = pickle.loads(content)
    np.testing.assert_array_equal(copy.image, image)


def test_removed_cache_is_said_when_a_map_is_opened(dataset: Dataset, tmp_path: Path) -> None:
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    (case.directory / "image.npy").unlink()
    with pytest.raises(ResourceError, match="was the cache removed"):
        _ = case.image


def test_prepare_all_keeps_order_and_reports_progress(dataset: Dataset, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    prepared = CaseCache(tmp_path / "cache", dataset, PLAN).prepare_all(
        ["case_b", "case_a"], workers=2, progress=lambda done, total: calls.append((done, total))
    )
    assert [case.case_id for case in prepared] == ["case_b", "case_a"]
    assert calls == [(1, 2), (2, 2)]


def prepare_in_process(root: Path, directory: Path, barrier, results) -> None:  # type: ignore[no-untyped-def]
    cases = CaseCache(directory, open_dataset(root), PLAN)
    barrier.wait()
    results.put([int(cases.prepare(name).image.sum(dtype=np.int64)) for name in ("case_a", "case_b")])


def test_processes_that_prepare_the_same_cases_agree(dataset: Dataset, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=prepare_in_process, args=(dataset.root, tmp_path / "cache", barrier, results))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    sums = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(found == sums[0] for found in sums)
    assert len(entries(tmp_path / "cache")) == 2


def test_slower_writer_keeps_the_entry_of_the_faster(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cache._checksums
    nested: list[CachedCase] = []

    def prepare_in_between(path: Path) -> dict[str, int]:
        if not nested:
            monkeypatch.setattr(cache, "_checksums", original)
            nested.append(CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a"))
            marker = nested[0].directory.stat().st_ino
            nested_inode.append(marker)
        return original(path)

    nested_inode: list[int] = []
    monkeypatch.setattr(cache, "_checksums", prepare_in_between)
    case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert case.directory.stat().st_ino == nested_inode[0]
    assert len(entries(tmp_path / "cache")) == 1


def test_checksum_of_the_description_covers_its_numbers(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").directory / "case.json"
    content = json.loads(path.read_text())
    content["entry"]["slope"] *= 2
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger="lungkit"):
        case = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")
    assert "case.json does not match" in caplog.text
    assert case.slope == PLAN.quantisation[0]


def test_entry_of_another_plan_under_this_name_is_not_used(dataset: Dataset, tmp_path: Path) -> None:
    directory = CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").directory
    other = dataclasses.replace(PLAN, channels=(dataclasses.replace(PLAN.channels[0], std=100.0),))
    elsewhere = CaseCache(tmp_path / "other", dataset, other).prepare("case_a").directory
    shutil.rmtree(directory)
    elsewhere.rename(directory)
    assert CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a").slope == PLAN.quantisation[0]


def test_voxels_that_are_no_numbers_are_an_entry_of_their_own(dataset: Dataset, tmp_path: Path) -> None:
    case = dataset.case("case_a")
    array = read_volume(case.images[0]).array.astype(np.float32)
    array[0, 0, 0] = np.nan
    write_nifti(case.images[0], array, read_volume(case.label).affine)
    made = CaseCache(tmp_path / "cache", dataset, PLAN, nan_policy=NanPolicy.MINIMUM).prepare("case_a")
    assert np.isfinite(made.image).all()
    with pytest.raises(DataError, match=r"--data\.nan minimum"):
        CaseCache(tmp_path / "cache", dataset, PLAN).prepare("case_a")


def test_case_ids_as_long_as_a_name_may_be_have_an_entry(dataset: Dataset, tmp_path: Path) -> None:
    long = dataclasses.replace(dataset.case("case_a"), case_id="ä" * 120)
    longer = dataclasses.replace(dataset, cases=(long,))
    for _ in range(2):
        assert CaseCache(tmp_path / "cache", longer, PLAN).prepare(long.case_id).case_id == long.case_id
