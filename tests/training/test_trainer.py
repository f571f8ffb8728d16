from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from pictures import has_colour
from safetensors.torch import load_file

from lungkit.checkpoint import save_checkpoint
from lungkit.data import AugmentConfig, Preprocessing, read_volume, write_nifti
from lungkit.errors import CheckpointError, DataError, Interrupted, ResourceError, UsageError
from lungkit.nn import build_model
from lungkit.training import Trainer, load_checkpoint, session
from lungkit.training.config_io import load_config
from lungkit.training.session import Session


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take most of the time of a tiny run; the tests of pictures ask for them."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
        monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


def state(run: Path, name: str = "last"):
    """Averaged weights, weights, optimiser state and rows of a checkpoint, without what was timed."""
    checkpoint = load_checkpoint(run / "checkpoints" / name)
    rows = [
        {key: value for key, value in row.items() if not key.startswith("seconds")}
        for row in checkpoint.trainer["position"]["rows"]
    ]
    moments = checkpoint.trainer["optimiser"]["state"]
    return checkpoint.weights, checkpoint.trainer["network"], moments, rows


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("last", "best"):
        (averages, weights, moments, rows), other = state(first, name), state(second, name)
        assert all(torch.equal(value, other[0][key]) for key, value in averages.items())
        assert all(torch.equal(value, other[1][key]) for key, value in weights.items())
        for index, moment in moments.items():
            assert all(torch.equal(value, other[2][index][key]) for key, value in moment.items())
        assert rows == other[3]


def stop_after(epoch):
    def build(config, **options):
        trainer = Trainer(
            config, on_epoch_end=lambda row: trainer.stop() if row["epoch"] == epoch else None, **options
        )
        return trainer

    return build


def stop_at_step(monkeypatch, trainer, step):
    train_step = Session.train_step

    def stopping(self, at, images, labels):
        train_step(self, at, images, labels)
        if at == step:
            trainer.stop()

    monkeypatch.setattr(Session, "train_step", stopping)


@pytest.fixture
def pictures():
    """Marks a test that needs the pictures of a run."""


def test_leaves_a_whole_run_folder(tiny, pictures):
    result = Trainer(tiny(epochs=2)).fit()
    names = {path.name for path in result.run_folder.iterdir()}
    assert names >= {
        "config.yaml",
        "env.json",
        "dataset.json",
        "metrics.csv",
        "metrics.jsonl",
        "train.log",
        "progress.png",
        "overlays",
        "checkpoints",
        "status.json",
        "validation.csv",
        "validation.json",
    }
    assert {path.name for path in (result.run_folder / "checkpoints").iterdir()} == {
        "last",
        "previous",
        "best",
    }
    overlays = list((result.run_folder / "overlays").glob("*.png"))
    assert overlays and all(has_colour(path, "#3ddc84") for path in overlays)  # the truth's outline
    assert has_colour(result.run_folder / "progress.png", "#1f6fb4")  # the first curve of a panel
    assert json.loads((result.run_folder / "status.json").read_text())["state"] == "finished"
    with (result.run_folder / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_measures_every_validation_case(tiny):
    result = Trainer(tiny(epochs=1)).fit()
    val = json.loads((result.run_folder / "dataset.json").read_text())["split"]["val"]
    assert sorted(result.table.case_ids) == val
    content = json.loads((result.run_folder / "validation.json").read_text())
    assert [row["case"] for row in content["cases"]] == list(result.table.case_ids)
    assert {"dice", "iou", "ppv", "sensitivity"} <= set(content["cases"][0])
    assert content["empty_policy"] == "nan"


def test_the_configuration_in_the_folder_is_resolved(tiny):
    result = Trainer(tiny(epochs=1, model__features=None)).fit()
    content = yaml.safe_load((result.run_folder / "config.yaml").read_text())
    assert content["model"]["features"] == [16, 32, 64, 128]
    assert content["data"]["dims"] == 2 and content["optimiser"]["learning_rate"] > 0


def test_a_checkpoint_needs_nothing_else(tiny):
    result = Trainer(tiny(epochs=1)).fit()
    alone = shutil.move(result.run_folder / "checkpoints" / "best", result.run_folder.parent / "alone")
    description = json.loads((alone / "manifest.json").read_text())
    network = build_model(**description["model"])
    network.load_state_dict(load_file(alone / "model.safetensors"))
    assert Preprocessing.from_dict(description["preprocessing"]).channels[0].units == "HU"
    assert description["labels"] == {"background": 0, "tumour": 1}
    assert description["patch_size"] == [16, 16]


def test_the_best_checkpoint_is_that_of_the_best_validation(tiny):
    result = Trainer(tiny(optimiser__learning_rate=0.02)).fit()
    rows = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_dice"])
    assert load_checkpoint(result.run_folder / "checkpoints" / "best").description["epoch"] == best["epoch"]
    assert result.best_dice == best["val_dice"] == result.table.mean("dice")


def test_the_same_configuration_gives_the_same_bits(tiny):
    first, second = Trainer(tiny(epochs=2)).fit(), Trainer(tiny(epochs=2)).fit()
    assert first.run_folder != second.run_folder
    assert_same_run(first.run_folder, second.run_folder)


def test_another_seed_gives_other_weights(tiny):
    runs = [Trainer(tiny(epochs=1, seed=seed)).fit().run_folder for seed in (0, 1)]
    first, second = (load_checkpoint(run / "checkpoints" / "last").weights for run in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model__dropout": 0.3, "model__norm": "batch", "augment": AugmentConfig(noise_probability=1.0)},
        {"optimiser__name": "sgd", "optimiser__schedule": "cosine", "model__deep_supervision": True,
         "model__features": (4, 8, 8), "engine__deterministic": True},
        {"engine__precision": "bf16"},
    ],
    ids=["defaults", "dropout, batch norm, noise", "sgd, cosine, deep supervision", "bf16"],
)  # fmt: skip
def test_three_epochs_and_three_more_are_six(tiny, options):
    whole = Trainer(tiny(**options)).fit()
    with pytest.raises(Interrupted, match=r"after epoch 3 of 6 and saved; continue with --resume"):
        stop_after(3)(tiny(name="parts", **options)).fit()
    parts = whole.run_folder.parent / "parts"
    assert json.loads((parts / "status.json").read_text())["state"] == "interrupted"
    resumed = Trainer.from_run(parts).fit()
    assert resumed.run_folder == parts and resumed.epochs == 6
    assert len((parts / "metrics.jsonl").read_text().splitlines()) == 6
    assert_same_run(whole.run_folder, parts)


@pytest.mark.parametrize("step", [4, 5], ids=["within an epoch", "at the end of an epoch"])
def test_a_run_stopped_at_any_step_goes_on_from_there(tiny, monkeypatch, step):
    whole = Trainer(tiny()).fit()
    trainer = Trainer(tiny(name="parts"))
    with monkeypatch.context() as patched:
        stop_at_step(patched, trainer, step)
        with pytest.raises(Interrupted, match=rf"after step {step + 1} of 12"):
            trainer.fit()
    parts = whole.run_folder.parent / "parts"
    Trainer.from_run(parts).fit()
    assert_same_run(whole.run_folder, parts)


def test_a_validation_that_was_stopped_is_made_up_for(tiny, monkeypatch):
    whole = Trainer(tiny()).fit()
    trainer = Trainer(tiny(name="parts"))
    validate = Session.validate

    def stopping(self, *args, **options):
        if self.position.step == 6:
            trainer.stop()
        return validate(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "validate", stopping)
        with pytest.raises(Interrupted, match="after step 6"):
            trainer.fit()
    parts = whole.run_folder.parent / "parts"
    assert len((parts / "metrics.jsonl").read_text().splitlines()) == 2
    Trainer.from_run(parts).fit()
    assert_same_run(whole.run_folder, parts)


def test_the_previous_checkpoint_can_be_continued(tiny):
    whole = Trainer(tiny()).fit()
    with pytest.raises(Interrupted):
        stop_after(3)(tiny(name="parts")).fit()
    parts = whole.run_folder.parent / "parts"
    (parts / "checkpoints" / "last" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*--checkpoint previous"):
        Trainer.from_run(parts).fit()
    Trainer.from_run(parts, checkpoint="previous").fit()
    assert_same_run(whole.run_folder, parts)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tiny):
    whole = Trainer(tiny(epochs=2)).fit()
    parts = Trainer(tiny(epochs=2, name="parts")).fit().run_folder
    for checkpoint in (parts / "checkpoints" / "last", parts / "checkpoints" / "previous"):
        shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="last: not a usable checkpoint"):
        Trainer.from_run(parts).fit()  # its table says that it had saved something
    (parts / "metrics.csv").unlink()
    assert Trainer.from_run(parts).fit().run_folder == parts
    assert_same_run(whole.run_folder, parts)


def test_a_row_that_a_kill_kept_from_the_table_is_there_after_resuming(tiny):
    folder = Trainer(tiny(epochs=2)).fit().run_folder
    tables = [folder / "metrics.csv", folder / "metrics.jsonl"]
    whole = [path.read_text() for path in tables]
    for path in tables:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    Trainer.from_run(folder).fit()
    assert [path.read_text() for path in tables] == whole


def test_a_finished_run_is_only_evaluated_again(tiny):
    first = Trainer(tiny(epochs=2)).fit()
    again = Trainer.from_run(first.run_folder).fit()
    assert again.table.rows == first.table.rows
    assert len((first.run_folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_changed_scans_are_noticed_on_resume(tiny, phantom_root, tmp_path):
    copy = Path(shutil.copytree(phantom_root, tmp_path / "scans"))
    with pytest.raises(Interrupted):
        stop_after(1)(tiny(data__root=str(copy))).fit()
    label = sorted((copy / "labelsTr").iterdir())[1]
    volume = read_volume(label)
    write_nifti(label, 1 - volume.array, volume.affine)
    with pytest.raises(DataError, match="not those that the run was started on"):
        Trainer.from_run(tmp_path / "runs" / "run").fit()


def test_a_checkpoint_of_another_configuration_is_refused(tiny, tmp_path):
    with pytest.raises(Interrupted):
        stop_after(1)(tiny()).fit()
    path = tmp_path / "runs" / "run" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    with pytest.raises(CheckpointError, match="another configuration"):
        Trainer.from_run(tmp_path / "runs" / "run").fit()


def test_a_run_begun_before_an_option_existed_goes_on(tiny, monkeypatch):
    options_of = session._options_that_shape_weights

    def of_an_older_version(config):
        content = options_of(config)
        del content["model"]["decoder_scse"], content["init"]
        return content | {"epochs": config.epochs, "patience": config.patience}  # which were compared

    with monkeypatch.context() as patched:
        patched.setattr(session, "_options_that_shape_weights", of_an_older_version)
        with pytest.raises(Interrupted):
            stop_after(1)(tiny(epochs=2)).fit()
    assert Trainer.from_run(Path(tiny().runs) / "run").fit().epochs == 2


def test_a_checkpoint_of_another_network_is_refused(tiny, tmp_path):
    with pytest.raises(Interrupted):
        stop_after(1)(tiny()).fit()
    folder = tmp_path / "runs" / "run" / "checkpoints" / "last"
    found = load_checkpoint(folder)
    description = {key: found.description[key] for key in ("epoch", "step", "model", "patch_size")}
    trainer = {**found.trainer, "network": {"other": torch.zeros(1)}}
    save_checkpoint(folder, weights=found.weights, description=description, trainer=trainer)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        Trainer.from_run(tmp_path / "runs" / "run").fit()


def test_running_out_of_memory_says_what_helps(tiny, monkeypatch):
    def greedy(self, step, images, labels):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e15"
        )

    monkeypatch.setattr(Session, "train_step", greedy)
    with pytest.raises(ResourceError, match="out of memory: use a smaller batch_size"):
        Trainer(tiny()).fit()


def test_a_dry_run_leaves_nothing_behind(tiny, tmp_path):
    plan = Trainer(tiny()).dry_run()
    assert plan.patch_size == (16, 16)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_trains_one_step(tiny, monkeypatch):
    steps = []
    train_step = Session.train_step
    monkeypatch.setattr(
        Session, "train_step", lambda self, step, *batch: (steps.append(step), train_step(self, step, *batch))
    )
    Trainer(tiny()).dry_run()
    assert steps == [0]


def test_weights_move_and_the_loss_is_reported(tiny):
    result = Trainer(tiny(epochs=1)).fit()
    checkpoint = load_checkpoint(result.run_folder / "checkpoints" / "last")
    start = build_model(**checkpoint.description["model"]).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in checkpoint.trainer["network"].items())
    row = json.loads((result.run_folder / "metrics.jsonl").read_text())
    assert 0 < row["train_loss"] < 10


def test_without_averaging_the_weights_themselves_are_kept(tiny):
    result = Trainer(tiny(epochs=1, optimiser__ema_decay=0.0)).fit()
    checkpoint = load_checkpoint(result.run_folder / "checkpoints" / "last")
    assert all(
        torch.equal(value, checkpoint.trainer["network"][name]) for name, value in checkpoint.weights.items()
    )


def test_trains_in_bfloat16(tiny):
    result = Trainer(tiny(epochs=1, engine__precision="bf16")).fit()
    weights = load_checkpoint(result.run_folder / "checkpoints" / "last").weights
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert weights["heads.0.weight"].dtype == torch.float32


def test_learns_the_phantom(tiny):
    """The loss of a few steps falls: data, loss, gradient and optimiser fit together."""
    result = Trainer(
        tiny(steps_per_epoch=12, epochs=4, optimiser__learning_rate=0.02, augment=AugmentConfig.none())
    ).fit()
    rows = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]


def test_pictures_that_fail_fail_no_training(tiny, pictures, monkeypatch, caplog):
    def no_fonts(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("lungkit.training.run.save_curves", no_fonts)
    monkeypatch.setattr("lungkit.pipeline.labelled.save_overlays", no_fonts)
    result = Trainer(tiny()).fit()
    assert json.loads((result.run_folder / "status.json").read_text())["state"] == "finished"
    warned = [record.getMessage() for record in caplog.records if "was not drawn" in record.getMessage()]
    assert all(message.endswith("the picture was not drawn (RuntimeError: no fonts)") for message in warned)
    for name in ("progress.png", "overlays"):
        assert any(message.startswith(str(result.run_folder / name)) for message in warned)


def test_a_finished_run_trained_on_is_a_longer_run_where_the_rate_is_constant(tiny):
    config = tiny(optimiser__schedule="constant", report=False)
    whole = Trainer(replace(config, name="whole")).fit()
    short = Trainer(replace(config, name="short", epochs=2)).fit()
    longer = Trainer.from_run(short.run_folder, epochs=6).fit()
    assert (short.epochs, longer.epochs) == (2, 6)
    assert_same_run(whole.run_folder, longer.run_folder)
    assert load_config(longer.run_folder / "config.yaml").epochs == 6


def test_the_rate_of_a_run_trained_on_is_that_of_the_longer_run(tiny):
    short = Trainer(tiny(epochs=2, report=False)).fit()
    longer = Trainer.from_run(short.run_folder, epochs=4).fit()
    rates = [row["learning_rate"] for row in state(longer.run_folder)[3]]
    whole = Trainer(tiny(epochs=4, name="whole", report=False)).fit()
    expected = [row["learning_rate"] for row in state(whole.run_folder)[3]]
    assert rates[2:] == expected[2:] and rates[:2] != expected[:2]


def test_an_extension_that_was_interrupted_goes_on_bit_for_bit(tiny):
    runs = []
    for name in ("straight", "stopped"):
        short = Trainer(tiny(epochs=1, name=name, report=False)).fit()
        runs.append(short.run_folder)
    Trainer.from_run(runs[0], epochs=3).fit()
    trainer = stop_after(2)(replace(load_config(runs[1] / "config.yaml"), epochs=3), resume=runs[1])
    with pytest.raises(Interrupted):
        trainer.fit()
    Trainer.from_run(runs[1]).fit()
    assert_same_run(*runs)


def test_patience_can_be_extended_with_the_epochs(tiny, monkeypatch):
    monkeypatch.setattr("lungkit.training.run.has_foreground", lambda cases: True)
    stopped = Trainer(tiny(patience=1, optimiser__learning_rate=1e-12, report=False)).fit()
    assert stopped.epochs < 6
    config = replace(load_config(stopped.run_folder / "config.yaml"), patience=10)
    assert Trainer(config, resume=stopped.run_folder).fit().epochs == 6


@pytest.mark.parametrize("epochs", [1, None])
def test_a_run_is_not_cut_shorter_than_it_is(tiny, epochs):
    run = Trainer(tiny(epochs=2, report=False)).fit().run_folder
    config = replace(load_config(run / "config.yaml"), epochs=epochs)
    with pytest.raises(UsageError, match="counted from its start" if epochs else "epochs is None"):
        Trainer(config, resume=run).fit()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_run_of_limited_time_is_not_given_more_epochs(tiny):
    run = Trainer(tiny(epochs=1, max_minutes=5.0, report=False)).fit().run_folder
    with pytest.raises(UsageError, match="trains for 5 minutes"):
        Trainer.from_run(run, epochs=3).fit()


def test_a_state_from_another_device_is_gone_on_with_in_this_ones_way():
    layer = torch.nn.Linear(2, 1)
    saved = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True).state_dict()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    optimiser.load_state_dict(session._computed_as(optimiser, saved))
    (group,) = optimiser.param_groups
    assert (group["fused"], group["lr"]) == (None, 0.5)
