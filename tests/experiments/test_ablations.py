"""Experiments as data: the built-in ones are valid, files say the same, options that make no sense are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lungkit.errors import UsageError
from lungkit.experiments.ablations import ABLATIONS, ablation_arms
from lungkit.experiments.arms import check_arms
from lungkit.training.config_io import parse_arguments


@pytest.mark.parametrize("name", ABLATIONS)
def test_built_in_arms_are_valid_and_differ(name: str) -> None:
    arms = ablation_arms(name)
    check_arms(arms)
    for arm in arms:
        arm.config.validate()
    assert len({str(arm.config) for arm in arms}) == len(arms)


def test_the_papers_changes_are_told_apart() -> None:
    arms = ablation_arms("paper", ["--epochs", "2"])
    *papers, default = [
        (
            arm.config.model.name,
            arm.config.loss.dice_weight,
            arm.config.model.input_pyramid,
            arm.config.epochs,
        )
        for arm in arms
    ]
    assert papers == [
        ("unet", 0, False, 2),
        ("unet", 1, False, 2),
        ("attention-unet", 0, False, 2),
        ("attention-unet", 1, False, 2),
    ]
    assert {arm.config.model.deep_supervision for arm in arms[:-1]} == {False}
    assert arms[-1].config == parse_arguments(["--epochs", "2"])
    assert default == ("attention-unet", 1, True, 2)


def test_a_file_names_arms_and_what_they_share(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(
        "options: {epochs: 7}\narms:\n  plain: {model: unet}\n  small:\n    model: {features: [8, 16]}\n"
    )
    plain, small = ablation_arms(str(path), ["--batch_size", "2"])
    assert (plain.name, plain.config.model.name, plain.config.epochs) == ("plain", "unet", 7)
    assert (small.config.model.features, small.config.batch_size) == ((8, 16), 2)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("arms: {a: {modle.name: unet}}", [], "model.name"),
        ("arms: {a: {seed: 3}}", [], "--seeds"),
        ("arms: {a: {model: unet}}", ["--model", "unet"], "what the arms differ in"),
        ("arms: [a, b]", [], "expected arms"),
        ("arms: {a: 3}", [], "give options"),
        ("arm: {a: {}}", [], "expected arms"),
        ("[", [], "YAML"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(
    tmp_path: Path, content: str, options: list[str], message: str
) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        ablation_arms(str(path), options)
    assert str(path) in str(error.value)


def test_an_unknown_ablation_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="paper, recipe"):
        ablation_arms("papre")
