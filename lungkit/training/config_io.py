"""Configurations from YAML and command lines, and back; an unknown name is an error that suggests the nearest one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import reprlib
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import yaml

from lungkit.errors import UsageError
from lungkit.training.config import MODEL_NAMES, TrainConfig
from lungkit.training.safe_yaml import load_yaml, parse_yaml

# Where things lie does not change the weights, nor does how steps are launched, nor what follows the last epoch: these
# may differ when a run is continued.
MOVABLE = (
    "data.root",
    "data.cache",
    "data.max_voxels",
    "engine.cuda_graph",
    "choose_postprocessing",
    "choose_postprocessing_by",
    "save_validation",
    "report",
    "logger",
)
# How long a run trains decides its weights, but not those that it has: a run may be told to train on.
EXTENSIBLE = ("epochs", "patience")
# Short forms of options that are typed most.
_SHORTHANDS = {
    "data": "data.root",
    "model": "model.name",
    "init": "init.model",
    "max_voxels": "data.max_voxels",
    "deterministic": "engine.deterministic",
    "device": "engine.accelerator",
}
_NUMBER = re.compile(r"[-+]?(\d|\.\d)")
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
}


class Option(NamedTuple):
    """One field of the configuration; the docstring of its class tells the meaning."""

    type: Any
    default: Any
    meaning: str

    def takes(self, kind: type) -> bool:
        """Whether ``kind`` is its type or one of several."""
        return any(
            kind in (part, typing.get_origin(part)) for part in (self.type, *typing.get_args(self.type))
        )


@cache
def options(cls: type = TrainConfig, prefix: str = "") -> Mapping[str, Option]:
    """Every option by its dotted name."""
    hints, documented = typing.get_type_hints(cls), inspect.getdoc(cls) or ""
    found: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= options(typing.cast(type, hint), f"{name}.")
            continue
        told = re.search(rf"^    {field.name}: (.+(?:\n      .+)*)", documented, re.MULTILINE)
        meaning = re.sub(r"\s+", " ", told[1].replace("None", "null")) if told else ""
        found[name] = Option(hint, field.default, meaning)
    return found


_GROUPS = tuple(dict.fromkeys(name.partition(".")[0] for name in options() if "." in name))


def parse_arguments(arguments: Sequence[str], *, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A configuration from command-line arguments such as ``--config run.yaml --model.features 16 32``.

    Later arguments change what earlier ones and the files of ``--config`` say, and ``overrides``, options and values as
    YAML gives them, change all of these.

    Raises:
        UsageError: an unknown option, a value of the wrong type, or a file that is no configuration.

    Example:
        >>> config = parse_arguments(["--model", "unet", "--model.features", "8", "16", "--epochs", "2"])
        >>> config.model.name, config.model.features, config.epochs
        ('unet', (8, 16), 2)
        >>> parse_arguments(["--modle.features", "8"])
        Traceback (most recent call last):
        lungkit.errors.UsageError: unknown option 'modle.features'; did you mean 'model.features'?
    """
    values: dict[str, Any] = {}
    for name, words in _split(arguments):
        values |= _read_file(words[0]) if name == "config" else {name: _from_words(name, words)}
    values |= {name: _checked(name, value) for name, value in _full_names(overrides or {}).items()}
    config = TrainConfig()
    given: dict[str, dict[str, Any]] = {group: {} for group in ("", *_GROUPS)}
    for name, value in values.items():
        group, _, field = name.rpartition(".")
        given[group][field] = value
    parts = {group: dataclasses.replace(getattr(config, group), **given[group]) for group in _GROUPS}
    return dataclasses.replace(config, **parts, **given[""])


def named_options(arguments: Sequence[str], overrides: Mapping[str, Any] | None = None) -> set[str]:
    """Full names of the options that :func:`parse_arguments` would be told of, those in files left out.

    Example:
        >>> sorted(named_options(["--model", "unet"], {"loss": {"ce_weight": 0}}))
        ['loss.ce_weight', 'model.name']
    """
    return {name for name, _ in _split(arguments) if name != "config"} | set(_full_names(overrides or {}))


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """A configuration from a YAML file.

    Raises:
        UsageError: the file cannot be read, is not YAML, or names an unknown option.
    """
    return parse_arguments([f"--config={os.fspath(path)}"])


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values: tuples are lists."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def flat_options(config: TrainConfig) -> dict[str, Any]:
    """Every option by its dotted name.

    Example:
        >>> flat_options(TrainConfig(epochs=3))["epochs"]
        3
    """
    return _flat(config_to_dict(config))


def config_to_yaml(config: TrainConfig) -> str:
    """The configuration as ``config.yaml`` holds it: every option below a comment that says what it means."""
    text, group = "", ""
    values = flat_options(config)
    for name in sorted(
        values, key=lambda name: "." in name
    ):  # after a group, the top level would be its part
        head, _, field = name.rpartition(".")
        if head != group:
            group, text = head, f"{text}\n{head}:\n"
        value = yaml.safe_dump(values[name], default_flow_style=True, width=math.inf).removesuffix("...\n")
        comment = [f"# {line}" for line in textwrap.wrap(options()[name].meaning, 100)]
        text += textwrap.indent("\n".join([*comment, f"{field}: {value.strip()}\n"]), "  " if head else "")
    return text


def config_differences(saved: TrainConfig, asked: TrainConfig) -> dict[str, str]:
    """Options that differ, by their dotted names, each with a sentence.

    Example:
        >>> config_differences(TrainConfig(), TrainConfig(epochs=3))
        {'epochs': 'epochs is None in the run, 3 asked for'}
    """
    before, after = flat_options(saved), flat_options(asked)
    return {
        name: f"{name} is {value} in the run, {after[name]} asked for"
        for name, value in before.items()
        if value != after[name]
    }


def option_choices() -> dict[str, list[str]]:
    """Every option as it is written on a command line, short forms among them, with the words that it takes.

    Example:
        >>> option_choices()["--engine.precision"]
        ['auto', 'fp32', 'bf16', 'fp16']
    """
    found: dict[str, list[str]] = {"--config": []}
    for name, option in options().items():
        words = [word for kind in (option.type, *typing.get_args(option.type)) for word in _literals(kind)]
        found[f"--{name}"] = ["true", "false"] if option.takes(bool) else words
    found["--model.name"] = list(MODEL_NAMES)
    return found | {f"--{short}": found[f"--{name}"] for short, name in _SHORTHANDS.items()}


def _literals(kind: Any) -> list[str]:
    return [str(word) for word in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []


def describe_options() -> str:
    """Every option with its type and default on one line, its meaning on the next."""
    text = ""
    for name, (kind, default, meaning) in options().items():
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f"--{name}  {_describe(kind)} ({'unset' if shown is None else shown})\n    {meaning}\n"
    return text


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The full name of each option and the words that follow it."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UsageError(f"unexpected argument {argument!r}; options start with --")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        name = _SHORTHANDS.get(name, name)
        option = Option(str, None, "") if name == "config" else options().get(name)
        if option is None:
            raise UsageError(_unknown(name))
        words = [value] if equals else []
        while not equals and rest and (not rest[0].startswith("-") or _NUMBER.match(rest[0])):
            words.append(rest.pop(0))
        if not words and not option.takes(bool):
            raise UsageError(f"--{name} needs a value")
        if len(words) > 1 and not option.takes(tuple):
            raise UsageError(f"--{name} takes one value, got {' '.join(words)}")
        yield name, words or ["true"]


def _full_names(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {_SHORTHANDS.get(name, name): value for name, value in _flat(overrides).items()}


def _from_words(name: str, words: list[str]) -> Any:
    """The value that words of a command line stand for: YAML, or text where the option takes text."""
    values: list[Any] = list(words)
    for index, word in enumerate(words):
        with contextlib.suppress(ValueError):  # "[", a date that does not exist
            values[index] = parse_yaml(word) if word else word
    option, value = options()[name], values[0]
    if len(words) > 1 or (option.takes(tuple) and isinstance(value, (int, float))):
        return _checked(name, values)
    is_text = (
        option.takes(str) and value is not None and not (option.takes(tuple) and isinstance(value, list))
    )
    return _checked(name, words[0] if is_text else value)


def _read_file(path: str) -> dict[str, Any]:
    """The options that a YAML file sets, by their dotted names; errors begin with the file's name."""
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected options and their values, as --print-config shows them")
    try:
        return {name: _checked(name, value) for name, value in _flat(content).items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _checked(name: str, value: Any) -> Any:
    """``value`` in the type of option ``name``."""
    if name in _GROUPS:
        members = ", ".join(option for option in options() if option.startswith(f"{name}."))
        raise UsageError(f"{name} is {reprlib.repr(value)}, but it is a group of options: {members}")
    if name not in options():
        raise UsageError(_unknown(name))
    kind = options()[name].type
    try:
        return _converted(kind, value)
    except (ValueError, OverflowError):
        raise UsageError(f"{name} is {reprlib.repr(value)}; give {_describe(kind)}") from None


def _converted(kind: Any, value: Any) -> Any:
    """``value``, as YAML gives it, in the type ``kind``; a ``ValueError`` where it is of another."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for alternative in of:
            with contextlib.suppress(ValueError, OverflowError):
                return _converted(alternative, value)
    elif origin is tuple and isinstance(value, list) and (of[-1] is ... or len(of) == len(value)):
        return tuple(_converted(of[0], entry) for entry in value)
    elif kind is float:
        if type(value) in (int, float, str) and math.isfinite(float(value)):
            return float(value)  # YAML reads 1e-3 as text
    elif type(value) is kind or (
        origin is Literal and (type(value), value) in [(type(word), word) for word in of]
    ):
        return value
    raise ValueError


def _describe(kind: Any, plural: bool = False) -> str:
    """A type in words."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, of))
    if origin is tuple:
        count = len(of) if of[-1] is not ... else "lists of" if plural else "a list of"
        return f"{count} {_describe(of[0], plural=True)}"
    return _WORDS[kind][plural] if kind in _WORDS else " or ".join(_describe(part, plural) for part in of)


def _unknown(name: str) -> str:
    known = [*options(), *_GROUPS]
    nearest = [option for option in known if option.startswith(name)]
    nearest += difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "--print-config shows all options"
    return f"unknown option {name!r}; {hint}"


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The options of a group or of all, by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if name in _GROUPS and isinstance(value, dict) else {name: value}
    return flat
