"""The examples in the docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import lungkit

MODULES = sorted(module.name for module in pkgutil.walk_packages(lungkit.__path__, "lungkit."))
MODULES = [name for name in MODULES if "._native" not in name]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    if name.startswith("lungkit.interop.nnunet_trainer."):
        pytest.importorskip("nnunetv2")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
