"""Models by name."""

from __future__ import annotations

import json
import os

import pytest

from lungkit.errors import UsageError
from lungkit.inference import TrainedModel, known_models, model_folder


def test_every_model_of_the_package_loads_and_has_a_card_that_names_its_data_and_limits():
    models = known_models({})
    assert "lidc-nodules" in models
    for model in models.values():
        assert TrainedModel.load(model.folder).labels["background"] == 0
        card = model.card.read_text(encoding="utf-8")
        for word in (
            "LIDC-IDRI",
            "CC BY 3.0",
            "not a medical device",
            "Dice",
            TrainedModel.load(model.folder).digest,
        ):
            assert word in card, (model.name, word)


def test_registries_of_others_go_first_and_their_paths_are_relative_to_them(tmp_path):
    entry = {"folder": "mine", "summary": "ours", "licence": "MIT"}
    (tmp_path / "r.json").write_text(json.dumps({"models": {"lidc-nodules": entry, "own": entry}}))
    models = known_models({"LUNGKIT_MODELS": f"{tmp_path / 'r.json'}{os.pathsep}"})
    assert sorted(models) == ["lidc-nodules", "own"]
    assert models["lidc-nodules"].folder == tmp_path / "mine" and models["own"].card is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[]", "not a registry"),
        ('{"models": {"a": {"folder": "x"}}}', "a must have"),
    ],
)
def test_a_registry_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=f"r.json.*{message}"):
        known_models({"LUNGKIT_MODELS": str(path)})


def test_a_folder_on_disk_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("lidc-nodules").is_absolute()
    (tmp_path / "lidc-nodules").mkdir()
    assert not model_folder("lidc-nodules").is_absolute()


def test_an_unknown_name_lists_the_names_and_a_path_is_left_to_its_reader(tmp_path):
    with pytest.raises(UsageError, match="no model of that name; known are lidc-nodules"):
        model_folder("lidc-nodule")
    assert model_folder(tmp_path / "absent") == tmp_path / "absent"
