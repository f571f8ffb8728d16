from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lungkit.errors import CheckpointError, UsageError
from lungkit.inference import TrainedModel
from lungkit.training import Trainer, load_checkpoint
from lungkit.training.config import InitConfig
from lungkit.training.initialisation import load_initial


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


@pytest.fixture
def trained(tiny) -> Path:
    """A run of one epoch: one channel, background and tumour."""
    return Trainer(tiny(epochs=1, name="trained", report=False)).fit().run_folder


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / name / "model.safetensors")


def untrained(config) -> Path:
    """Run folder of ``config`` after one step at a rate of nearly zero: it holds the initial weights."""
    options = replace(config.optimiser, learning_rate=1e-12, weight_decay=0.0, ema_decay=0.0)
    return (
        Trainer(replace(config, optimiser=options, epochs=1, steps_per_epoch=1, report=False))
        .fit()
        .run_folder
    )


def on(root: Path, config, **data):
    return replace(config, data=replace(config.data, root=str(root), **data), name="fine")


def assert_close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def test_the_same_kind_of_data_begins_with_all_weights(tiny, trained, caplog):
    caplog.set_level(logging.INFO, "lungkit")
    run = untrained(tiny(name="fine", init__model=str(trained), model__features=None))
    before = weights(trained, "best")
    for name, value in weights(run).items():
        assert_close(value, before[name])
    assert "initialised from trained" in caplog.text and "new: nothing" in caplog.text
    assert "initialised from trained" in (run / "train.log").read_text()


def test_classes_go_by_their_names_and_new_ones_are_said(tiny, trained, make_dataset, caplog):
    caplog.set_level(logging.INFO, "lungkit")
    root = make_dataset(cases=10, classes=3)
    content = json.loads((root / "dataset.json").read_text())
    content["labels"] = {"background": 0, "lymph node": 1, "tumour": 2}
    (root / "dataset.json").write_text(json.dumps(content))
    run = untrained(on(root, tiny(init__model=str(trained), model__features=None)))
    before, after = weights(trained, "best"), weights(run)
    assert_close(after["heads.0.weight"][0], before["heads.0.weight"][0])
    assert_close(after["heads.0.weight"][2], before["heads.0.weight"][1])
    assert not torch.allclose(after["heads.0.weight"][1], before["heads.0.weight"][1])
    assert "new: output weights of lymph node" in caplog.text
    described = TrainedModel.load(run).description["initialised_from"]
    assert described["name"] == "trained" and described["new"] == ["output weights of lymph node"]


def test_a_single_foreground_class_is_taken_for_another(tiny, trained, make_dataset):
    root = make_dataset(cases=10, classes=2)  # its foreground is "tumour1"
    run = untrained(on(root, tiny(init__model=str(trained), model__features=None)))
    assert_close(weights(run)["heads.0.bias"], weights(trained, "best")["heads.0.bias"])


def test_a_further_channel_is_new_and_the_known_one_is_copied(tiny, trained, make_dataset, caplog):
    caplog.set_level(logging.INFO, "lungkit")
    root = make_dataset(cases=10, channels=2)
    run = untrained(on(root, tiny(init__model=str(trained), model__features=None)))
    first = next(name for name in weights(run) if name.startswith("encoder.0") and name.endswith("weight"))
    before, after = weights(trained, "best")[first], weights(run)[first]
    assert after.shape[1] == 2 * before.shape[1]
    assert_close(after[:, :1], before)
    assert "new: input weights of channel CT1" in caplog.text


def test_slices_on_either_side_keep_their_place_beside_a_further_channel(tiny, make_dataset, tmp_path):
    one = make_dataset(cases=6, shape=(4, 32, 32)).rename(tmp_path / "one")
    start = Trainer(on(one, tiny(epochs=1, report=False), context_slices=1)).fit().run_folder
    two = make_dataset(cases=6, shape=(4, 32, 32), channels=2)
    run = untrained(on(two, tiny(init__model=str(start), model__features=None)))
    first = next(name for name in weights(run) if name.startswith("encoder.0") and name.endswith("weight"))
    assert_close(weights(run)[first][:, ::2], weights(start, "best")[first])


def test_a_frozen_encoder_stays_and_the_decoder_moves(tiny, trained):
    run = (
        Trainer(
            tiny(
                name="fine",
                init__model=str(trained),
                init__freeze="encoder",
                model__features=None,
                report=False,
            )
        )
        .fit()
        .run_folder
    )
    before, after = weights(trained, "best"), weights(run)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith(("encoder.", "pyramid.")), name


def test_a_frozen_batch_norm_keeps_its_statistics(tiny):
    start = Trainer(tiny(epochs=1, name="start", model__norm="batch", report=False)).fit().run_folder
    run = (
        Trainer(
            tiny(
                name="fine",
                init__model=str(start),
                init__freeze="encoder",
                model__features=None,
                epochs=1,
                report=False,
            )
        )
        .fit()
        .run_folder
    )
    before, after = weights(start, "best"), weights(run)
    for name, value in after.items():
        if name.startswith("encoder.") and "running" in name:
            assert torch.equal(value, before[name]), name


def test_the_rate_is_a_tenth_by_default(tiny, trained):
    plan = Trainer(tiny(init__model=str(trained), model__features=None)).dry_run()
    assert plan.learning_rate == pytest.approx(2e-4)
    assert plan.model["features"] == [4, 8]
    own = tiny(init__model=str(trained), model__features=None, optimiser__learning_rate=1e-2)
    assert Trainer(own).dry_run().learning_rate == 1e-2


def test_an_interrupted_fine_tuning_goes_on_bit_for_bit_without_the_model_that_it_began_with(tiny, trained):
    config = tiny(
        init__model=str(trained), init__freeze="encoder", model__features=None, epochs=2, report=False
    )
    whole = Trainer(replace(config, name="whole")).fit().run_folder
    trainer = Trainer(replace(config, name="parts"), on_epoch_end=lambda row: trainer.stop())
    with pytest.raises(Exception, match="continue with --resume"):
        trainer.fit()
    parts = whole.parent / "parts"
    trained.rename(trained.with_name("gone"))
    Trainer.from_run(parts).fit()
    after = weights(parts)
    for name, value in weights(whole).items():
        assert torch.equal(value, after[name])
    assert (
        load_checkpoint(parts / "checkpoints" / "last").description["initialised_from"]["name"] == "trained"
    )


def test_normalisation_is_that_of_the_model_where_the_units_are_the_same(tiny, make_dataset, tmp_path):
    one = make_dataset(cases=6).rename(tmp_path / "one")
    start = Trainer(on(one, tiny(epochs=1, report=False), window=(-900.0, 100.0))).fit().run_folder
    two = make_dataset(cases=10)
    prepared = TrainedModel.load(untrained(on(two, tiny(init__model=str(start), model__features=None))))
    assert prepared.preprocessing.channels == TrainedModel.load(start).preprocessing.channels


def test_a_packaged_model_begins_a_run_by_its_name(tiny):
    plan = Trainer(tiny(init__model="lidc-nodules", model__features=None)).dry_run()
    assert (plan.model["features"], plan.context_slices) == ([16, 32, 64, 128], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__features": (8, 16)}, "model.features is"),
        ({"model__residual": True}, "model.residual is True"),
        ({"data__context_slices": 3}, "data.context_slices is 3"),
        ({"data__patch_size": (8, 16, 16)}, "has 3 axes"),
        ({"init__model": "no-such-model"}, "lungkit-models list"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny, trained, options, message):
    options = {"init__model": str(trained), "model__features": None} | options
    with pytest.raises(UsageError, match=message):
        Trainer(tiny(**options)).dry_run()


def test_an_encoder_with_new_weights_is_not_frozen(tiny, trained, make_dataset):
    root = make_dataset(cases=10, channels=2)
    config = tiny(init__model=str(trained), init__freeze="encoder", model__features=None)
    with pytest.raises(UsageError, match="would keep random weights"):
        Trainer(on(root, config)).dry_run()


def test_freezing_needs_a_model(tiny):
    with pytest.raises(UsageError, match="give --init MODEL"):
        Trainer(tiny(init__freeze="encoder"))


def test_the_folder_of_all_folds_is_no_single_model(tmp_path):
    (tmp_path / "folds.json").write_text("{}")
    with pytest.raises(UsageError, match="name one of them"):
        load_initial(InitConfig(model=str(tmp_path)))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run folder"):
        load_initial(InitConfig(model=str(tmp_path)))


def test_a_checkpoint_file_is_its_folder(trained):
    found = load_initial(InitConfig(model=str(trained / "checkpoints" / "best" / "model.safetensors")))
    assert found is not None and found.path == trained / "checkpoints" / "best"


def test_deep_supervision_adds_heads_that_are_new(tiny, caplog):
    caplog.set_level(logging.INFO, "lungkit")
    plain = tiny(
        epochs=1, name="start", model__features=(4, 8, 8), model__deep_supervision=False, report=False
    )
    start = Trainer(plain).fit().run_folder
    Trainer(tiny(init__model=str(start), model__features=None)).dry_run()
    assert "new: nothing" in caplog.text
    Trainer(tiny(init__model=str(start), model__features=None, model__deep_supervision=True)).dry_run()
    assert "new: heads.1" in caplog.text
