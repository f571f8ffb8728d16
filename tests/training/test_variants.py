"""Every kind of data and every option of the engine and the network train, and do what they say."""

from __future__ import annotations

import csv
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import has_colour
from torch import Tensor

from lungkit.data import AugmentConfig, read_volume, write_nifti
from lungkit.errors import DataError, Interrupted, UsageError
from lungkit.inference import Predictor
from lungkit.inference.export import export_model
from lungkit.nn import build_model
from lungkit.training import Checkpoint, TrainConfig, Trainer, TrainResult, load_checkpoint
from lungkit.training.session import Session

MakeDataset = Callable[..., Path]
Tiny = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a tiny run; the tests of pictures ask for them."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
        monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


@pytest.fixture
def pictures() -> None:
    """Asks for pictures."""


def train(config: TrainConfig) -> tuple[TrainResult, Checkpoint]:
    result = Trainer(config).fit()
    return result, load_checkpoint(result.run_folder / "checkpoints" / "last")


def steps_of(monkeypatch: pytest.MonkeyPatch, *attributes: str) -> list[Any]:
    """What the session's attributes were after every training step."""
    seen: list[Any] = []
    train_step = Session.train_step

    def watched(self: Session, step: int, images: Tensor, labels: Tensor) -> None:
        train_step(self, step, images, labels)
        seen.append([functools.reduce(getattr, name.split("."), self) for name in attributes])

    monkeypatch.setattr(Session, "train_step", watched)
    return seen


def test_volumes_train_in_3d(make_dataset: MakeDataset, tiny: Tiny, pictures: None) -> None:
    root = make_dataset(shape=(16, 24, 24), spacings_mm=((4.0, 1.0, 1.0),), validation=1)
    config = tiny(
        data__root=str(root), data__patch_size=None, model__features=(4, 8, 8), epochs=1, steps_per_epoch=2
    )
    result, checkpoint = train(config)
    assert checkpoint.description["model"]["dims"] == 3
    assert checkpoint.description["patch_size"] == [16, 24, 24]
    assert checkpoint.description["model"]["strides"] == [[1, 2, 2], [1, 2, 2]]
    assert result.table.case_ids == ("case_0",)
    overlays = list((result.run_folder / "overlays").glob("*.png"))
    assert len(overlays) == 3 and all(has_colour(path, "#3ddc84") for path in overlays)  # the truth's outline


def test_a_3d_run_is_not_measured_on_single_slices(make_dataset: MakeDataset, tiny: Tiny) -> None:
    """Said before training: predictors refuse them, so it could not be measured at the end."""
    root = make_dataset(shape=(16, 24, 24), validation=1)
    for path in (root / "imagesTr" / "case_0_0000.nii.gz", root / "labelsTr" / "case_0.nii.gz"):
        volume = read_volume(path)
        write_nifti(path, volume.array[..., :1], volume.affine)
    config = tiny(data__root=str(root), data__dims=3, data__patch_size=(8, 16, 16), epochs=1)
    with pytest.raises(DataError, match=r"1 single slice \(case_0\), but the run is 3D.*--data.dims 2"):
        train(config)


def test_stacks_train_in_2d_with_their_neighbours(make_dataset: MakeDataset, tiny: Tiny) -> None:
    root = make_dataset(shape=(5, 24, 24), validation=1)
    _, checkpoint = train(tiny(data__root=str(root), epochs=1))
    assert checkpoint.description["context_slices"] == 3
    assert checkpoint.description["model"]["in_channels"] == 7


def test_several_channels_train(make_dataset: MakeDataset, tiny: Tiny, pictures: None) -> None:
    root = make_dataset(channels=2, validation=1)
    _, checkpoint = train(tiny(data__root=str(root), epochs=1))
    assert checkpoint.description["model"]["in_channels"] == 2
    assert checkpoint.description["channels"] == ["CT", "CT1"]


def test_several_classes_are_told_apart_in_the_table(
    make_dataset: MakeDataset, tiny: Tiny, pictures: None
) -> None:
    root = make_dataset(classes=3, validation=2)
    result, checkpoint = train(tiny(data__root=str(root), epochs=1))
    assert result.table.labels == ("tumour1", "tumour2")
    assert len(result.table.rows) == 4
    assert checkpoint.description["labels"] == {"background": 0, "tumour1": 1, "tumour2": 2}


def test_regions_train_are_measured_predicted_and_exported(make_dataset: MakeDataset, tiny: Tiny) -> None:
    """Class 3 lies in class 2, and both in class 1, as nnU-Net declares it."""
    root = make_dataset(classes=4, validation=1)
    content = json.loads((root / "dataset.json").read_text())
    content["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 2}
    content["regions_class_order"] = [1, 3, 2]
    (root / "dataset.json").write_text(json.dumps(content))
    config = tiny(
        data__root=str(root),
        model__deep_supervision=True,
        model__features=(4, 8, 8),
        epochs=3,
        optimiser__learning_rate=0.02,
        save_validation=True,
    )
    result, checkpoint = train(config)
    model = checkpoint.description["model"]
    assert isinstance(model, dict) and model["out_channels"] == 3
    assert sorted(result.table.labels) == ["core", "rim", "whole"]
    folder = result.run_folder
    predicted, truth = (
        read_volume(path).array
        for path in (folder / "validation" / "case_0.nii.gz", root / "labelsTr" / "case_0.nii.gz")
    )
    values = {row.label: row.values for row in result.table.rows}
    for name, inside in (("whole", [1, 2, 3]), ("core", [2, 3]), ("rim", [2])):
        mine, true = np.isin(predicted, inside), np.isin(truth, inside)
        assert values[name]["tp"] == (mine & true).sum()
        assert values[name]["fp"] == (mine & ~true).sum()
    predictor = Predictor.from_run(folder, device="cpu")
    prediction = predictor(root / "imagesTr" / "case_0_0000.nii.gz", probabilities=True)
    np.testing.assert_array_equal(prediction.mask, predicted)
    expected = np.zeros_like(predicted)
    for name, value in (("whole", 1), ("core", 3), ("rim", 2)):
        expected[prediction.probabilities[name] > 0.5] = value
    np.testing.assert_array_equal(predicted, expected)
    exported = export_model(predictor.models[0], folder / "model.pt2")
    assert exported.metadata["output"]["probabilities"] == "sigmoid"
    assert exported.metadata["regions"] == [["whole", [1, 2, 3]], ["core", [2, 3]], ["rim", [2]]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"choose_postprocessing": True}, r"choose_postprocessing .* declares regions"),
        ({"loss__lesion_weight": 0.5}, r"loss\.lesion_weight is 0\.5, but .* declares regions"),
    ],
)
def test_regions_refuse_what_needs_classes_before_any_scan_is_read(
    make_dataset: MakeDataset, tiny: Tiny, options: dict[str, Any], said: str
) -> None:
    root = make_dataset()
    content = json.loads((root / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    (root / "dataset.json").write_text(json.dumps(content))
    for scan in (root / "imagesTr").iterdir():
        scan.write_bytes(b"")  # reading one would be another error
    with pytest.raises(UsageError, match=said):
        train(tiny(data__root=str(root), **options))


def add_votes(root: Path, readers: int | None = 3) -> None:
    """Votes of three readers: all agree inside the masks, one alone says a rim of one voxel more."""
    (root / "votesTr").mkdir()
    for path in (root / "labelsTr").iterdir():
        label = read_volume(path)
        inside = label.array > 0
        wider = inside | np.roll(inside, 1, 0) | np.roll(inside, -1, 0)
        write_nifti(root / "votesTr" / path.name, 2 * inside.astype(np.uint8) + wider, label.affine)
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(content | ({"readers": readers} if readers else {})))


def test_votes_train_as_shares_and_a_run_of_them_is_continued_bit_for_bit(
    make_dataset: MakeDataset, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(validation=1)
    add_votes(root)
    seen: list[Tensor] = []
    step = Session.train_step

    def watched(self: Session, at: int, images: Tensor, labels: Tensor) -> None:
        seen.append(labels.clone())
        step(self, at, images, labels)

    monkeypatch.setattr(Session, "train_step", watched)
    options: dict[str, Any] = {"data__root": str(root), "data__labels": "readers", "epochs": 2}
    result, whole = train(tiny(name="whole", **options))
    assert set(torch.cat(seen).unique().tolist()) == {0, 1, 3}
    assert "Readers' own Dice, tumour1: " in (result.run_folder / "validation.md").read_text()
    with (result.run_folder / "readers.csv").open(newline="") as file:
        levels = {row["label"]: row for row in csv.DictReader(file)}
    assert float(levels["tumour1, labels"]["dice"]) == result.table.rows[0].values["dice"]
    assert len(levels) == 4 and (result.run_folder / "calibration.json").is_file()
    trainer = Trainer(tiny(name="parts", **options), on_epoch_end=lambda row: trainer.stop())
    with pytest.raises(Interrupted):
        trainer.fit()
    parts = result.run_folder.parent / "parts"
    Trainer.from_run(parts).fit()
    resumed = load_checkpoint(parts / "checkpoints" / "last")
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())


def test_shares_of_an_unknown_number_of_readers_are_refused_at_once(
    make_dataset: MakeDataset, tiny: Tiny
) -> None:
    root = make_dataset()
    add_votes(root, readers=None)
    with pytest.raises(UsageError, match=r"how many readers there were; give --data\.readers"):
        train(tiny(data__root=str(root), data__labels="readers"))


def test_only_ignored_voxels_teach_nothing(
    make_dataset: MakeDataset, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Session.train_step
    norms: list[float] = []

    def all_ignored(self: Session, step: int, images: Tensor, labels: Tensor) -> None:
        batch(self, step, images, torch.full_like(labels, 255))
        norms.append(sum(float(p.grad.abs().sum()) for p in self.network.parameters() if p.grad is not None))

    monkeypatch.setattr(Session, "train_step", all_ignored)
    root = make_dataset(ignore=True, validation=1)
    train(tiny(data__root=str(root), augment=AugmentConfig.none(), epochs=1, steps_per_epoch=2))
    assert norms == [0.0, 0.0]


def test_a_plain_unet_trains_on_cross_entropy_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = steps_of(monkeypatch, "loss_sum", "network", "average.network")
    captured: list[tuple[Tensor, Tensor]] = []
    step = Session.train_step

    def capture(self: Session, at: int, images: Tensor, labels: Tensor) -> None:
        if at == 0:
            self.network.eval()
            captured.append((self.network(images).detach(), labels))
        step(self, at, images, labels)

    monkeypatch.setattr(Session, "train_step", capture)
    config = tiny(
        model__name="unet", loss__dice_weight=0.0, augment=AugmentConfig.none(), epochs=1, steps_per_epoch=1
    )
    result, _ = train(config)
    assert losses
    logits, labels = captured[0]
    expected = torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)
    with (result.run_folder / "metrics.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["train_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_gradients_are_clipped(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = Session.train_step

    def watched(self: Session, at: int, images: Tensor, labels: Tensor) -> None:
        step(self, at, images, labels)
        squares = [float(p.grad.square().sum()) for p in self.network.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(squares)))

    monkeypatch.setattr(Session, "train_step", watched)
    train(tiny(epochs=1, optimiser__clip_norm=0.01))
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    norms.clear()
    train(tiny(epochs=1, optimiser__clip_norm=None))
    assert min(norms) > 0.05


def test_the_learning_rate_of_every_step_follows_the_schedule(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = steps_of(monkeypatch, "learning_rate")
    config = tiny(
        epochs=2,
        steps_per_epoch=4,
        optimiser__schedule="cosine",
        optimiser__warmup_steps=3,
        optimiser__learning_rate=0.1,
    )
    train(config)
    expected = [0.1 * (1 + math.cos(math.pi * s / 8)) / 2 * min(1, (s + 1) / 4) for s in range(8)]
    assert [rate for (rate,) in seen] == pytest.approx(expected)


def test_sgd_has_nesterov_momentum(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = steps_of(monkeypatch, "optimiser.optimizer")
    train(tiny(epochs=1, optimiser__name="sgd", optimiser__momentum=0.9))
    group = seen[0][0].param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_what_is_validated_and_kept_is_the_average(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    averages: list[dict[str, Tensor]] = []
    expected: dict[str, Tensor] = {}
    step = Session.train_step

    def watched(self: Session, at: int, images: Tensor, labels: Tensor) -> None:
        if at == 0:
            expected.update({k: v.clone() for k, v in self.network.state_dict().items()})
        step(self, at, images, labels)
        decay = min(0.99, (1 + at) / (10 + at))
        for name, value in self.network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    validate = Session.validate

    def validated(self: Session, *arguments: Any, **options: Any) -> Any:
        table = validate(self, *arguments, **options)
        averages.append({name: value.clone() for name, value in self.average.network.state_dict().items()})
        return table

    monkeypatch.setattr(Session, "train_step", watched)
    monkeypatch.setattr(Session, "validate", validated)
    _, checkpoint = train(tiny(epochs=1, steps_per_epoch=5))
    for found in (averages[0], checkpoint.weights):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_deep_supervision_trains_every_level(tiny: Tiny) -> None:
    config = tiny(model__deep_supervision=True, model__features=(4, 8, 8), epochs=1, optimiser__ema_decay=0.0)
    _, checkpoint = train(config)
    start = build_model(**checkpoint.description["model"]).state_dict()
    heads = [name for name in start if name.startswith("heads.") and name.endswith("weight")]
    assert len(heads) == 2
    assert all(not torch.equal(checkpoint.weights[name], start[name]) for name in heads)


@pytest.mark.parametrize(
    "options",
    [
        {"input_pyramid": True, "deep_supervision": True},
        {"decoder_scse": True, "gate_signal": "global"},
        {"gate_signal": "both", "gate_heads": 2, "gate_combine": "concat", "gate_output_norm": "instance"},
    ],
    ids=lambda options: "+".join(options),
)
def test_parts_of_the_network_train_and_a_run_of_them_is_continued_bit_for_bit(
    tiny: Tiny, options: dict[str, Any]
) -> None:
    model = {f"model__{name}": value for name, value in options.items()}
    result, whole = train(tiny(epochs=2, name="whole", **model))
    assert 0 <= result.best_dice <= 1
    built = whole.description["model"]
    assert isinstance(built, dict)
    assert {name: built[name] for name in options} == options
    trainer = Trainer(tiny(epochs=2, name="parts", **model), on_epoch_end=lambda row: trainer.stop())
    with pytest.raises(Interrupted):
        trainer.fit()
    parts = result.run_folder.parent / "parts"
    Trainer.from_run(parts).fit()
    resumed = load_checkpoint(parts / "checkpoints" / "last")
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss__overlap": "focal_tversky", "loss__ce_weight": 0.0, "model__deep_supervision": True},
        {"loss__hard_negatives": 0.1, "loss__lesion_weight": 0.5},
    ],
    ids=["focal Tversky", "hard negatives and lesions"],
)
def test_a_run_of_another_loss_is_continued_bit_for_bit(
    tiny: Tiny, options: dict[str, Any], precision: str
) -> None:
    options = {**options, "engine__precision": precision, "model__features": (4, 8, 8), "epochs": 2}
    result, whole = train(tiny(name="whole", **options))
    trainer = Trainer(tiny(name="parts", **options), on_epoch_end=lambda row: trainer.stop())
    with pytest.raises(Interrupted):
        trainer.fit()
    parts = result.run_folder.parent / "parts"
    Trainer.from_run(parts).fit()
    resumed = load_checkpoint(parts / "checkpoints" / "last")
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())
    plain = tiny(name="plain", **{k: v for k, v in options.items() if not k.startswith("loss")})
    _, other = train(plain)
    assert any(not torch.equal(value, whole.weights[name]) for name, value in other.weights.items())


def test_background_patches_are_what_training_sees(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    foreground: list[bool] = []
    step = Session.train_step

    def watched(self: Session, at: int, images: Tensor, labels: Tensor) -> None:
        foreground.extend(bool(((label > 0) & (label < 255)).any()) for label in labels)
        step(self, at, images, labels)

    monkeypatch.setattr(Session, "train_step", watched)
    train(tiny(epochs=2, data__foreground_fraction=0.5, data__background_fraction=1.0))
    assert sum(foreground) == len(foreground) / 2


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_is_a_matter_of_speed(tiny: Tiny, channels_last: bool) -> None:
    result, checkpoint = train(tiny(epochs=1, engine__channels_last=channels_last))
    assert all(value.is_contiguous() for value in checkpoint.weights.values())
    assert 0 <= result.best_dice <= 1


def test_a_compiled_network_leaves_weights_for_a_plain_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    compile_module = torch.compile

    def eager(module: torch.nn.Module, **options: Any) -> Any:
        compiled.append(module)
        return compile_module(module, **{**options, "backend": "eager"})  # no C++ compiler needed, and fast

    monkeypatch.setattr(torch, "compile", eager)
    result, checkpoint = train(tiny(epochs=1, engine__compile=True))
    assert compiled
    build_model(**checkpoint.description["model"]).load_state_dict(checkpoint.weights)
    monkeypatch.undo()
    _, plain = train(tiny(epochs=1, name="plain"))
    for name, value in plain.weights.items():
        torch.testing.assert_close(checkpoint.weights[name], value, rtol=1e-3, atol=1e-5)
    assert Trainer.from_run(result.run_folder).fit().table.rows == result.table.rows


def test_deterministic_asks_torch_for_it(tiny: Tiny) -> None:
    try:
        train(tiny(epochs=1, steps_per_epoch=1, engine__deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        train(tiny(epochs=1, steps_per_epoch=1))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_validation_without_foreground_keeps_the_last_weights(
    make_dataset: MakeDataset, tiny: Tiny, pictures: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the network predicts there is wrong: no Dice tells one network from another."""
    root = make_dataset(cases=4, empty=(0,), validation=1)
    result, checkpoint = train(tiny(data__root=str(root), epochs=2, patience=1))
    assert math.isnan(result.best_dice)
    assert "no validation case of fold 0 has foreground" in caplog.text
    assert (result.best_epoch, result.epochs) == (2, 2)
    best = load_checkpoint(result.run_folder / "checkpoints" / "best")
    assert all(torch.equal(value, checkpoint.weights[name]) for name, value in best.weights.items())
    status = json.loads((result.run_folder / "status.json").read_text())
    assert (status["state"], status["best_dice"]) == ("finished", None)
    with (result.run_folder / "metrics.csv").open(newline="") as file:
        assert [row["val_dice"] for row in csv.DictReader(file)] == ["", ""]


def test_folds_that_were_made_are_written(make_dataset: MakeDataset, tiny: Tiny) -> None:
    root = make_dataset(cases=4)
    result, _ = train(tiny(data__root=str(root), epochs=1, steps_per_epoch=1, data__fold=1, data__folds=2))
    folds = json.loads((result.run_folder / "splits_final.json").read_text())
    split = json.loads((result.run_folder / "dataset.json").read_text())["split"]
    assert len(folds) == 2
    assert folds[1] == split
    assert sorted(folds[0]["val"] + folds[1]["val"]) == sorted(split["train"] + split["val"])


def test_folds_of_the_dataset_are_honoured(make_dataset: MakeDataset, tiny: Tiny) -> None:
    root = make_dataset(cases=4, validation=3)
    result, _ = train(tiny(data__root=str(root), epochs=1, steps_per_epoch=1))
    assert sorted(result.table.case_ids) == ["case_0", "case_1", "case_2"]
    assert json.loads((result.run_folder / "splits_final.json").read_text()) == json.loads(
        (root / "splits_final.json").read_text()
    )


def test_patients_are_not_divided(make_dataset: MakeDataset, tiny: Tiny) -> None:
    root = make_dataset(cases=4)
    for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        for number in range(4):
            (root / folder / f"case_{number}{end}").rename(
                root / folder / f"p{number // 2}_scan{number}{end}"
            )
    config = tiny(
        data__root=str(root), data__patient_pattern=r"^(p\d)_", data__folds=2, epochs=1, steps_per_epoch=1
    )
    result, _ = train(config)
    assert len({case.split("_")[0] for case in result.table.case_ids}) == 1


def test_a_run_from_python_keeps_its_log(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("lungkit")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    result, _ = train(tiny(epochs=1))
    log = (result.run_folder / "train.log").read_text()
    for words in ("reading scans", "foreground:", "epoch 1/1", "Sensitivity", "own grid"):
        assert words in log


def test_a_patch_larger_than_the_scans_is_padded(make_dataset: MakeDataset, tiny: Tiny) -> None:
    root = make_dataset(shape=(1, 20, 20), validation=1)
    result, _ = train(tiny(data__root=str(root), data__patch_size=(32, 32), epochs=1))
    assert np.isfinite(result.best_dice)


def test_the_network_can_be_used_without_the_run(make_dataset: MakeDataset, tiny: Tiny) -> None:
    root = make_dataset(shape=(1, 32, 32), validation=1)
    result, checkpoint = train(tiny(data__root=str(root), epochs=1))
    (result.run_folder / "checkpoints" / "last" / "trainer.pt").unlink()
    alone = load_checkpoint(result.run_folder / "checkpoints" / "last", with_trainer=False)
    assert alone.trainer is None
    assert all(torch.equal(value, checkpoint.weights[name]) for name, value in alone.weights.items())
