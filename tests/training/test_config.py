from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace

import pytest
import yaml

from lungkit.data import AugmentConfig
from lungkit.errors import UsageError
from lungkit.training import (
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
    load_config,
)
from lungkit.training.config_io import config_to_dict, config_to_yaml, options, parse_arguments


def test_without_arguments_the_defaults_hold():
    assert parse_arguments([]) == TrainConfig()


@pytest.mark.parametrize(
    ("arguments", "get", "value"),
    [
        (["--model", "unet"], lambda c: c.model.name, "unet"),
        (["--model=unet"], lambda c: c.model.name, "unet"),
        (["--data", "some/folder"], lambda c: c.data.root, "some/folder"),
        (["--max-voxels", "1000"], lambda c: c.data.max_voxels, 1000),
        (["--device", "cuda:1"], lambda c: c.engine.accelerator, "cuda:1"),
        (["--deterministic"], lambda c: c.engine.deterministic, True),
        (["--model.features", "16", "32", "64"], lambda c: c.model.features, (16, 32, 64)),
        (["--model.features", "[16, 32]"], lambda c: c.model.features, (16, 32)),
        (["--model.strides", "[[1, 2, 2], [2, 2, 2]]"], lambda c: c.model.strides, ((1, 2, 2), (2, 2, 2))),
        (["--data.patch_size", "96", "96"], lambda c: c.data.patch_size, (96, 96)),
        (["--data.window", "lung"], lambda c: c.data.window, "lung"),
        (["--data.window", "-1000", "400"], lambda c: c.data.window, (-1000, 400)),
        (["--data.spacing_mm", "2.5", "0.7", "0.7"], lambda c: c.data.spacing_mm, (2.5, 0.7, 0.7)),
        (["--optimiser.learning_rate", "1e-3"], lambda c: c.optimiser.learning_rate, 1e-3),
        (["--optimiser.clip_norm", "null"], lambda c: c.optimiser.clip_norm, None),
        (["--loss.dice_weight", "0"], lambda c: c.loss.dice_weight, 0),
        (["--loss.overlap", "focal_tversky"], lambda c: c.loss.overlap, "focal_tversky"),
        (["--model.input_pyramid"], lambda c: c.model.input_pyramid, True),
        (["--model.gate_output_norm", "batch"], lambda c: c.model.gate_output_norm, "batch"),
        (["--model.gate_signal", "both"], lambda c: c.model.gate_signal, "both"),
        (["--engine.compile"], lambda c: c.engine.compile, True),
        (["--engine.channels_last", "false"], lambda c: c.engine.channels_last, False),
        (["--augment.noise_std", "0", "0.3"], lambda c: c.augment.noise_std, (0.0, 0.3)),
        (["--augment.enabled", "false"], lambda c: c.augment.enabled, False),
        (["--data", "2024"], lambda c: c.data.root, "2024"),
        (["--model.strides", "[[1, 2, 2], 2]"], lambda c: c.model.strides, ((1, 2, 2), 2)),
        (["--data.patch-size", "8", "16", "16"], lambda c: c.data.patch_size, (8, 16, 16)),
        (["--patience", "null"], lambda c: c.patience, None),
        (["--augment.rotation_degrees", "-5", "5"], lambda c: c.augment.rotation_degrees, (-5.0, 5.0)),
        (["--epochs", "7", "--seed", "3"], lambda c: (c.epochs, c.seed), (7, 3)),
    ],
)
def test_an_option_reaches_its_place(arguments, get, value):
    assert get(parse_arguments(arguments)) == value


@pytest.mark.parametrize(
    ("arguments", "found", "nearest"),
    [
        (["--modle.features", "8"], "modle.features", "model.features"),
        (["--model.featurs", "8"], "model.featurs", "model.features"),
        (["--engine.devcies", "2"], "engine.devcies", "engine.devices"),
        (["--epoch", "2"], "epoch", "epochs"),
        (["--augment.noise", "0"], "augment.noise", "augment.noise_"),
        (["--modle", "unet"], "modle", "model"),
        (["--data.patchsize", "3", "3"], "data.patchsize", "data.patch_size"),
        (["--optimizer.learning_rate", "0.1"], "optimizer.learning_rate", "optimiser.learning_rate"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(arguments, found, nearest):
    with pytest.raises(UsageError) as raised:
        parse_arguments(arguments)
    assert f"unknown option {found!r}; did you mean '{nearest}" in str(raised.value)


def test_an_option_unlike_any_points_to_all_of_them():
    with pytest.raises(UsageError, match="unknown option 'zzzz'; --print-config shows all"):
        parse_arguments(["--zzzz", "1"])


@pytest.mark.parametrize(
    ("content", "found", "nearest"),
    [
        ({"modle": {"name": "unet"}}, "modle", "model"),
        ({"model": {"featurs": [8]}}, "model.featurs", "model.features"),
        ({"epoch": 3}, "epoch", "epochs"),
        ({"optimizer": {"name": "sgd"}}, "optimizer", "optimiser"),
        ({"augment": {"noise_sd": [0.0, 0.1]}}, "augment.noise_sd", "augment.noise_std"),
    ],
)
def test_an_unknown_key_of_a_file_suggests_the_nearest(tmp_path, content, found, nearest):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError) as raised:
        load_config(path)
    assert "run.yaml" in str(raised.value)
    assert repr(found) in str(raised.value) and repr(nearest) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--epochs", "many"], "epochs"),
        (["--model.features", "a", "b"], "model.features"),
        (["--engine.precision", "fp8"], "engine.precision"),
        (["--optimiser.name", "adam"], "optimiser.name"),
        (["--data.dims", "4"], "data.dims"),
        (["--epochs", "2.5"], "epochs"),
        (["--augment.flip_probability", "2"], "flip_probability is 2"),
        (["--epochs", "2", "3"], "--epochs takes one value, got 2 3"),
        (["--data", "--epochs", "2"], r"--data\.root needs a value"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_option(arguments, name):
    with pytest.raises(UsageError, match=name):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "many"], "epochs is 'many'; give a whole number or null"),
        (["--engine.precision", "fp8"], "engine.precision is 'fp8'; give auto, fp32, bf16, fp16"),
        (["--augment.enabled", "3"], "augment.enabled is 3; give true or false"),
        (["--data.window", "1", "2", "3"], "data.window is [1, 2, 3]; give text or 2 numbers"),
        (
            ["--model.strides", "fine"],
            "model.strides is 'fine'; give a list of whole numbers or lists of whole numbers or null",
        ),
        (["--loss.ce_weight", ".nan"], "loss.ce_weight is nan; give a number"),
        (["--loss.ce_weight", "9" * 400], "give a number"),
    ],
)
def test_a_message_says_types_in_words(arguments, message):
    with pytest.raises(UsageError) as raised:
        parse_arguments(arguments)
    assert message in str(raised.value)
    assert not any(word in str(raised.value) for word in ("Union", "Optional", "<class", "Literal"))


@pytest.mark.parametrize("value", ["2024", "true", "[x]", "2001-99-99", "a: b", "["])
def test_text_stays_the_text_that_was_typed(value):
    assert parse_arguments(["--data", value]).data.root == value


def test_the_yaml_says_what_each_option_means_and_keeps_one_on_a_line():
    lines = config_to_yaml(TrainConfig(model=ModelConfig(features=(8, 16)))).splitlines()
    place = lines.index("  features: [8, 16]")
    assert lines[place - 1] == "  # channels per level; null is decided by the fingerprint."
    assert "model:" in lines[:place]


def test_what_a_run_of_an_older_version_wrote_is_read(tmp_path):
    config = TrainConfig(model=ModelConfig(strides=(2, (1, 2, 2))), data=DataConfig(window=(-1000.0, 400.0)))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None))
    assert load_config(path) == config


def test_a_damaged_file_is_read_right_or_refused_in_one_line(tmp_path):
    draw = random.Random(0)
    text = config_to_yaml(TrainConfig(epochs=3, data=DataConfig(window=(-1000.0, 400.0)))).encode()
    path = tmp_path / "run.yaml"
    for _ in range(60):
        damaged = bytearray(text)
        for _ in range(draw.randint(1, 8)):
            place = draw.randrange(len(damaged))
            damaged[place : place + draw.randint(0, 3)] = draw.choice(
                [
                    b"",
                    b"[",
                    b"{",
                    b": ",
                    b"\n",
                    b"&a *a",
                    b"!!python/name:os",
                    b"\xff",
                    b"\0",
                    b"9" * 5000,
                    b"-",
                ]
            )
        path.write_bytes(damaged)
        try:
            assert isinstance(load_config(path), TrainConfig)
        except UsageError as error:
            assert str(path) in str(error) or "augment" in str(error) or "_" in str(error)


@pytest.mark.parametrize(
    ("content", "words"), [("- 1\n- 2\n", "--print-config"), ("model: unet\n", "model.name")]
)
def test_a_file_of_another_shape_says_what_is_expected(tmp_path, content, words):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UsageError, match=words) as raised:
        load_config(tmp_path / "run.yaml")
    assert "run.yaml" in str(raised.value)


def test_a_bare_word_is_refused():
    with pytest.raises(UsageError, match="unexpected argument 'unet'"):
        parse_arguments(["unet"])


def test_options_after_a_file_change_what_it_says(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: unet, features: [4, 8]}\nepochs: 9\n")
    config = parse_arguments(["--config", str(path), "--epochs", "3"])
    assert (config.model.name, config.model.features, config.epochs) == ("unet", (4, 8), 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: [unclosed")
    with pytest.raises(UsageError, match=r"run\.yaml"):
        load_config(path)


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(
        model=ModelConfig(name="unet", features=(8, 16, 32), strides=((1, 2, 2), (2, 2, 2))),
        loss=LossConfig(ce_weight=0.5),
        augment=AugmentConfig(noise_probability=0.7, blur_sigma=(0.1, 0.2)),
        epochs=3,
    )
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    assert config_to_dict(load_config(path)) == config_to_dict(config)


def test_every_option_can_be_named():
    names = set(options())
    assert {"data.root", "model.features", "loss.dice_weight", "optimiser.ema_decay", "seed"} <= names
    assert {"augment.rotation_probability", "engine.deterministic"} <= names


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"loss": LossConfig(dice_weight=0, ce_weight=0)}, "loss.dice_weight and loss.ce_weight"),
        ({"loss": LossConfig(dice_weight=-1)}, "loss.dice_weight"),
        ({"loss": LossConfig(lesion_weight=-1)}, "loss.lesion_weight"),
        ({"loss": LossConfig(hard_negatives=0)}, "loss.hard_negatives is 0"),
        ({"loss": LossConfig(hard_negatives=0.1, ce_weight=0)}, "loss.hard_negatives .* loss.ce_weight"),
        ({"loss": LossConfig(tversky_beta=1.5)}, "loss.tversky_beta"),
        ({"loss": LossConfig(tversky_gamma=0)}, "loss.tversky_gamma"),
        ({"loss": LossConfig(overlap="focal_tversky", dice_weight=0)}, "loss.overlap .* loss.dice_weight"),
        ({"loss": LossConfig(lesion_weight=1), "data": DataConfig(labels="readers")}, "loss.lesion_weight"),
        ({"model": ModelConfig(dropout=1.0)}, "model.dropout"),
        ({"model": ModelConfig(name="unett")}, "did you mean 'unet'"),
        ({"optimiser": OptimiserConfig(learning_rate=0.0)}, "optimiser.learning_rate"),
        ({"optimiser": OptimiserConfig(learning_rate=float("nan"))}, "optimiser.learning_rate"),
        ({"optimiser": OptimiserConfig(ema_decay=1.0)}, "optimiser.ema_decay"),
        ({"optimiser": OptimiserConfig(learning_rate=float("inf"))}, "optimiser.learning_rate"),
        ({"optimiser": OptimiserConfig(clip_norm=-1.0)}, "optimiser.clip_norm"),
        ({"optimiser": OptimiserConfig(weight_decay=-0.1)}, "optimiser.weight_decay"),
        ({"data": DataConfig(fold=-1)}, r"data\.fold is -1; give at least 0"),
        ({"data": DataConfig(folds=1)}, r"data\.folds is 1; give at least 2"),
        ({"data": DataConfig(max_voxels=0)}, "data.max_voxels"),
        ({"data": DataConfig(phantom_cases=3)}, "data.phantom_cases is 3; give at least 10"),
        (
            {"data": DataConfig(foreground_fraction=1.5)},
            "data.foreground_fraction is 1.5; give a share from 0 to 1",
        ),
        ({"data": DataConfig(patch_size=(16,))}, r"data.patch_size is \(16,\)"),
        ({"data": DataConfig(patch_size=(16, 0))}, r"data.patch_size is \(16, 0\)"),
        (
            {"data": DataConfig(window="bone")},
            "data.window is 'bone'; give auto, percentiles, lung, mediastinum",
        ),
        ({"data": DataConfig(window="[1, 2, 3]")}, r"data.window is '\[1, 2, 3\]'"),
        (
            {"data": DataConfig(spacing_mm="fine")},
            "data.spacing_mm is 'fine'; give auto, native, or z, y and x",
        ),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"batch_size": 0}, "batch_size"),
        ({"validate_every": 0}, "validate_every"),
        ({"patience": 0}, "patience"),
        ({"engine": EngineConfig(devices=0)}, "engine.devices"),
        (
            {"engine": EngineConfig(accelerator="cpu:1")},
            "engine.accelerator is 'cpu:1'; give cpu, cuda, or cuda:1",
        ),
        ({"engine": EngineConfig(accelerator="cuda:x")}, "engine.accelerator is 'cuda:x'"),
        (
            {"engine": EngineConfig(accelerator="cuda:1", devices=2)},
            "names one device, but engine.devices is 2",
        ),
        ({"name": "../elsewhere"}, "name is '../elsewhere'"),
        ({"name": ".."}, "name is '..'"),
    ],
)
def test_a_value_out_of_range_names_its_option(change, name):
    with pytest.raises(UsageError, match=name):
        replace(TrainConfig(), **change).validate()


def test_the_default_is_valid():
    TrainConfig().validate()


def test_every_patch_may_be_a_foreground_patch():
    TrainConfig(data=DataConfig(foreground_fraction=1.0)).validate()


def test_patch_and_dims_must_agree():
    config = parse_arguments(["--data.dims", "3", "--data.patch_size", "32", "32"])
    with pytest.raises(UsageError, match=r"data\.patch_size.*data\.dims"):
        config.validate()


def test_every_option_is_told_in_a_docstring():
    for field in fields(TrainConfig):
        part = getattr(TrainConfig(), field.name)
        told = type(part).__doc__ if is_dataclass(part) else TrainConfig.__doc__
        for name in [f.name for f in fields(part)] if is_dataclass(part) else [field.name]:
            assert f"{name}:" in told, f"{field.name}.{name}"


def test_a_configuration_needs_no_engine():
    script = (
        "import sys; from lungkit.training import TrainConfig; TrainConfig();"
        "print([m for m in ('lightning_fabric', 'matplotlib', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "unet", "gate_heads": 2}, r"model\.gate_heads is 2, but a unet has no gates"),
        ({"name": "unet", "gate_signal": "both"}, r"model\.gate_signal is 'both', .* choose attention-unet"),
        ({"gate_combine": "concat"}, r"model\.gate_combine is 'concat', but one head has nothing to combine"),
        ({"gate_heads": 0}, r"model\.gate_heads is 0; give at least 1"),
    ],
)
def test_options_of_gates_that_do_nothing_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig(model=ModelConfig(**options)).validate()
