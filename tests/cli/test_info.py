from __future__ import annotations

import json

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


def test_an_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--jsn"])
    assert stop.value.code == 2
    assert "--jsn" in capsys.readouterr().err
