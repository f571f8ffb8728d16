"""Networks by name: every one is rebuilt from its own configuration, and what is unknown is answered with a hint."""

from __future__ import annotations

import pytest

from lungkit.errors import UsageError
from lungkit.nn import build_model
from lungkit.nn.registry import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_name_gives_its_class_and_the_config_the_name(name):
    network = build_model(name, dims=2, features=(4, 8))
    assert type(network) is MODELS[name]
    assert network.config["name"] == name
    assert build_model(**network.config).config == network.config


def test_build_model_suggests_the_nearest_name():
    with pytest.raises(
        UsageError, match=r"unknown network 'atention-unet' \(did you mean 'attention-unet'\?\)"
    ):
        build_model("atention-unet")


def test_build_model_suggests_the_nearest_option():
    with pytest.raises(UsageError, match=r"'unet' has no option 'feature' \(did you mean 'features'\?\)"):
        build_model("unet", feature=(4, 8))


def test_build_model_lists_the_names_where_none_is_near():
    with pytest.raises(UsageError, match="unknown network 'resnet50'; there are unet, attention-unet"):
        build_model("resnet50")
