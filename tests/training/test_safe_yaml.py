"""YAML that is short and stands for more than a machine holds."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from lungkit.errors import UsageError
from lungkit.training.config_io import load_config
from lungkit.training.safe_yaml import load_yaml, parse_yaml

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join(9 * [f'*{before}'])}]\n"
    for before, after in itertools.pairwise("abcdefghij")
)
BOMBS = {
    "laughs": (LAUGHS, "more than 20000 values"),
    "merged": (
        "k0: &k0 {a: 1}\n" + "\n".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}" for n in range(1, 40)),
        "more than 20000 values",
    ),
    "flow": ("[" * 100_000, "nested more than 32"),
    "block": ("- " * 100_000, "nested more than 32"),
    "loop": ("&a [*a]", r"alias \*a lies within"),
    "base 60": ("epochs: 1" + ":1" * 400_000, "word or number of 800001 letters"),
    "tagged base 60": ('epochs: !!int "1' + ":1" * 400_000 + '"', "word or number of 800001 letters"),
    "list": ("[" + "1," * 300_000 + "]", "more than 20000 values"),
    "tag": ("epochs: !!timestamp soon", "groupdict"),
    "float": ("epochs: !!float '1" + ":1" * 2000 + "'", "too large"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_words(tmp_path: Path, name: str) -> None:
    text, problem = BOMBS[name]
    with pytest.raises(ValueError, match=problem):
        parse_yaml(text)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"config\.yaml: cannot be read as YAML") as found:
        load_config(path)
    assert len(str(found.value)) < 1000


def test_aliases_and_merges_of_a_usual_size_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }
    assert parse_yaml("a: '" + "long " * 2000 + "'")["a"].startswith("long")
    assert parse_yaml("") is None


def test_pipes_devices_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "zeros", "large"):
        with pytest.raises(ValueError, match=r"regular file|more than the 1048576"):
            load_yaml(tmp_path / f"{name}.yaml")
        with pytest.raises(UsageError, match=f"{name}.yaml: cannot be read as YAML"):
            load_config(tmp_path / f"{name}.yaml")
