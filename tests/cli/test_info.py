from __future__ import annotations

import json
import os
import time

import pytest

from lungkit.cli.info import main
from lungkit.ops import _library


def test_json_lists_every_op_with_a_reason_where_it_is_not_native(capsys):
    assert main(["--json"]) == 0
    ops = json.loads(capsys.readouterr().out)["ops"]
    assert set(ops) == set(_library.defined_ops())
    for backends in ops.values():
        for status in backends.values():
            assert status["native"] or status["reason"]


def test_text_names_versions_and_the_instruction_set(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert f"instruction set: {_library.cpu_isa()}" in text


def test_the_cache_is_measured_and_pruned(tmp_path, capsys):
    for days, name in ((40, "old"), (1, "new")):
        entry = tmp_path / "cases" / name
        entry.mkdir(parents=True)
        (entry / "case.json").write_text("{}")
        moment = time.time() - days * 24 * 3600
        os.utime(entry / "case.json", (moment, moment))
    assert main(["--cache", str(tmp_path)]) == 0
    assert f"{tmp_path}: 2 preprocessed cases" in capsys.readouterr().out
    assert main(["--cache", str(tmp_path), "--prune-cache", "30"]) == 0
    assert "removed 1 cases" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["new"]
    assert main(["--cache", str(tmp_path), "--prune-cache", "-1"]) == 2


def test_an_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--jsn"])
    assert stop.value.code == 2
    assert "--jsn" in capsys.readouterr().err


def test_a_geometry_module_of_another_python_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "_native").mkdir()
    (tmp_path / "_native" / "_geometry.cpython-39-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr("lungkit.metrics.surface._native", None)
    monkeypatch.setattr("lungkit.__file__", str(tmp_path / "__init__.py"))
    assert main([]) == 0
    assert "_geometry.cpython-39-x86_64-linux-gnu.so is not for this Python" in capsys.readouterr().out
