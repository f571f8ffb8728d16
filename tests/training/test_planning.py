"""What is decided where the configuration leaves it open, and what a run keeps of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lungkit.data import Case, Dataset, Fingerprint, plan_preprocessing
from lungkit.data.fingerprint import ChannelFingerprint
from lungkit.errors import DataError, UsageError
from lungkit.training import DataConfig, ModelConfig, OptimiserConfig, TrainConfig, load_config
from lungkit.training.config_io import config_to_yaml
from lungkit.training.planning import (
    Plan,
    check_resampled_sizes,
    fill_cache,
    make_plan,
    open_folds,
    prepare,
    prepare_cases,
    resolve,
)


def plan_for(
    config: TrainConfig,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    channels: int = 1,
    labels: tuple[str, ...] = ("background", "tumour"),
) -> Plan:
    """The plan for a dataset of one kind of scan; shape and spacing are (Z, Y, X)."""
    channel = ChannelFingerprint("CT", "HU", "int16", -1024, 3071, -38.0, 200.0, -850.0, 156.0)
    fingerprint = Fingerprint(
        ("a",), (shape,), (spacing_mm,), (channel,) * channels, (0.01,), (1000, 10), {0: 0, 1: 1}, ()
    )
    names = tuple(f"CT{number}" for number in range(channels))
    values = {name: value for value, name in enumerate(labels)}
    cases = (Case("a", (), None, "a"),)
    dataset = Dataset(Path("scans"), "scans", cases, values, names, None, "nnunet")
    return make_plan(config, fingerprint, dataset)


def scans(**data: Any) -> TrainConfig:
    return TrainConfig(data=DataConfig(root="scans", **data))


@pytest.mark.parametrize(
    ("shape", "dims"), [((1, 512, 512), 2), ((15, 128, 128), 2), ((16, 128, 128), 3), ((200, 512, 512), 3)]
)
def test_flat_stacks_are_trained_as_slices(shape: tuple[int, int, int], dims: int) -> None:
    assert plan_for(scans(), shape).dims == dims


def test_dims_can_be_asked_for() -> None:
    assert plan_for(scans(dims=2), (200, 512, 512)).dims == 2
    assert plan_for(scans(patch_size=(16, 64, 64)), (8, 512, 512)).dims == 3


def test_large_scans_get_the_largest_patch() -> None:
    assert plan_for(scans(), (200, 512, 512)).patch_size == (64, 128, 128)
    assert plan_for(scans(dims=2), (200, 512, 512)).patch_size == (256, 256)


def test_small_slices_get_a_patch_that_can_be_shifted() -> None:
    patch = plan_for(scans(), (1, 128, 96)).patch_size
    assert all(size < extent and size % 8 == 0 for size, extent in zip(patch, (128, 96), strict=True))


def test_a_patch_is_as_the_scan_will_be_after_resampling() -> None:
    config = scans(dims=3, spacing_mm=(2.0, 2.0, 2.0))
    assert plan_for(config, (64, 128, 128)).patch_size == (32, 64, 64)


def test_strides_wait_for_the_coarse_axis() -> None:
    strides = plan_for(scans(), (64, 256, 256), (5.0, 1.0, 1.0)).model["strides"]
    assert strides == ((1, 2, 2), (1, 2, 2), (2, 2, 2))


def test_strides_follow_the_spacing_that_is_resampled_to() -> None:
    config = scans(dims=3, spacing_mm=(1.0, 1.0, 1.0))
    assert plan_for(config, (64, 256, 256), (5.0, 1.0, 1.0)).model["strides"] == ((2, 2, 2),) * 3


def test_isotropic_scans_get_strides_of_two() -> None:
    assert plan_for(scans(), (64, 64, 64)).model["strides"] == ((2, 2, 2),) * 3


def test_strides_that_are_given_are_taken() -> None:
    config = replace(scans(), model=ModelConfig(features=(8, 16, 32), strides=((1, 2, 2), 2)))
    assert plan_for(config, (64, 64, 64)).model["strides"] == ((1, 2, 2), 2)


def test_the_network_has_the_channels_and_classes_of_the_dataset() -> None:
    plan = plan_for(scans(), (1, 64, 64), channels=2, labels=("background", "solid", "ground_glass"))
    assert (plan.model["in_channels"], plan.model["out_channels"]) == (2, 3)


@pytest.mark.parametrize(("depth", "context"), [(1, 0), (2, 1), (3, 2), (4, 3), (15, 3)])
def test_a_stack_of_slices_brings_its_neighbours_as_channels(depth: int, context: int) -> None:
    plan = plan_for(scans(), (depth, 64, 64), channels=2)
    assert (plan.context_slices, plan.model["in_channels"]) == (context, 2 * (2 * context + 1))


def test_a_volume_has_no_neighbours_to_bring() -> None:
    assert plan_for(scans(), (64, 64, 64)).context_slices == 0
    with pytest.raises(UsageError, match=r"context_slices is 1, but the run is 3D"):
        plan_for(scans(context_slices=1), (64, 64, 64))


@pytest.mark.parametrize(("name", "rate"), [("adamw", 2e-3), ("sgd", 1e-2)])
def test_the_learning_rate_follows_the_optimiser(name: Any, rate: float) -> None:
    config = replace(scans(), optimiser=OptimiserConfig(name=name))
    assert plan_for(config, (1, 64, 64)).learning_rate == rate


def test_the_plan_says_what_it_is() -> None:
    summary = plan_for(replace(scans(), epochs=3), (64, 256, 256), (5.0, 1.0, 1.0)).summary()
    for words in ("3D", "64 x 128 x 128", "3 epochs", "attention-unet", "(1, 2, 2)"):
        assert words in summary


@pytest.mark.parametrize("shape", [(1, 64, 64), (9, 64, 64), (64, 64, 64)])
def test_a_resolved_configuration_makes_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    config = scans(cache="cache")
    plan = plan_for(config, shape)
    monkeypatch.chdir(tmp_path)
    resolved = resolve(config, plan)
    (tmp_path / "config.yaml").write_text(config_to_yaml(resolved))
    again = load_config(tmp_path / "config.yaml")
    again.validate()
    assert again == resolved
    assert plan_for(again, shape) == plan
    assert (again.data.root, again.data.cache) == (str(tmp_path / "scans"), str(tmp_path / "cache"))


def test_resolving_leaves_the_phantom_as_it_is() -> None:
    config = TrainConfig()
    resolved = resolve(config, plan_for(config, (1, 128, 128)))
    assert resolved.data.root is None
    assert (resolved.epochs, resolved.steps_per_epoch, resolved.batch_size) == (20, 50, 8)


def test_runs_of_several_seeds_hold_out_the_same_cases(phantom_root: Path) -> None:
    (_, first), (_, other) = (
        open_folds(TrainConfig(seed=seed, data=DataConfig(root=str(phantom_root)))) for seed in (0, 1)
    )
    assert first == other


def test_a_spacing_of_zero_is_named() -> None:
    with pytest.raises(UsageError, match=r"data\.spacing_mm is \(0, 1, 1\); give three lengths above 0"):
        plan_for(scans(spacing_mm=(0, 1, 1)), (20, 64, 64))


def test_training_scans_too_large_after_resampling_are_refused_before_any_is_preprocessed() -> None:
    channel = ChannelFingerprint("CT", "HU", "int16", -1024, 3071, 0, 100, -500, 200)
    fingerprint = Fingerprint(
        ("small", "huge"), ((24, 64, 64),) * 2, ((2.5, 0.7, 0.7), (2500.0, 700.0, 700.0)),
        (channel,), (0.1, 0.1), (10, 1), {0: 0, 1: 1}, (),
    )  # fmt: skip
    plan = plan_preprocessing(fingerprint, spacing_mm=(2.5, 0.7, 0.7))
    with pytest.raises(
        DataError, match=r"case huge: 24 x 64 x 64 voxels of 2500 x 700 x 700 mm .*9\.83e\+13 voxels"
    ):
        check_resampled_sizes(fingerprint, plan, max_voxels=2**29)
    check_resampled_sizes(fingerprint, plan_preprocessing(fingerprint, spacing_mm="native"), max_voxels=2**29)


def test_the_shares_of_processes_fill_the_cache_that_one_would(make_dataset, tmp_path):
    root = make_dataset(cases=5, validation=2)
    config = TrainConfig(data=DataConfig(root=str(root), cache=str(tmp_path / "shared")))
    prepared = prepare(config)
    shares = [fill_cache(prepared, config, rank=rank, world_size=2) for rank in range(2)]
    assert [[case.case_id for case in share] for share in shares] == [
        ["case_2", "case_4", "case_1"],
        ["case_3", "case_0"],
    ]
    made = {path.name for path in (tmp_path / "shared" / "cases").iterdir()}
    train, val = prepare_cases(prepared, config)
    assert {path.name for path in (tmp_path / "shared" / "cases").iterdir()} == made
    assert [case.case_id for case in (*train, *val)] == ["case_2", "case_3", "case_4", "case_0", "case_1"]
