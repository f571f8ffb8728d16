"""Configurations from YAML and command lines, and back; an unknown name is an error that suggests the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from lungkit.errors import UsageError
from lungkit.training.config import TrainConfig

_NUMBER = re.compile(r"[-+]?(\d|\.\d)")
# Where things lie does not change the weights, nor does what follows the last epoch: these may differ when a run is
# continued.
MOVABLE = ("data.root", "data.cache", "data.max_voxels", "choose_postprocessing")
# Short forms of options that are typed most.
_SHORTHANDS = {
    "data": "data.root",
    "model": "model.name",
    "max_voxels": "data.max_voxels",
    "deterministic": "engine.deterministic",
}


class ConfigParser(ArgumentParser):
    """jsonargparse's parser, whose errors are :class:`~lungkit.errors.UsageError` in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(" ".join(message.split())) from ex


def make_parser() -> ConfigParser:
    """Parser of ``TrainConfig``: dotted options and ``--config FILE``."""
    parser = ConfigParser(exit_on_error=True, add_help=False, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; options after it change what it says")
    parser.add_class_arguments(TrainConfig, nested_key=None, fail_untyped=False)
    return parser


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """A configuration from command-line arguments such as ``--config run.yaml --model.features 16 32``.

    Raises:
        UsageError: an unknown option or a value of the wrong type.

    Example:
        >>> config = parse_arguments(["--model", "unet", "--model.features", "8", "16", "--epochs", "2"])
        >>> config.model.name, config.model.features, config.epochs
        ('unet', (8, 16), 2)
        >>> parse_arguments(["--modle.features", "8"])
        Traceback (most recent call last):
        lungkit.errors.UsageError: unknown option 'modle.features'; did you mean 'model.features'?
    """
    parser = make_parser()
    return _build(parser, parser.parse_args(list(_normalise(arguments))))


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """A configuration from a YAML file.

    Raises:
        UsageError: the file cannot be read, is not YAML, or names an unknown option.
    """
    return parse_arguments(["--config", str(path)])


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values: tuples are lists."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def config_to_yaml(config: TrainConfig) -> str:
    """The configuration as ``config.yaml`` holds it."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None)


def option_names(cls: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options.

    Example:
        >>> "engine.precision" in set(option_names())
        True
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from option_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def config_differences(saved: TrainConfig, asked: TrainConfig) -> dict[str, str]:
    """Options that differ, by their dotted names, each with a sentence.

    Example:
        >>> config_differences(TrainConfig(), TrainConfig(epochs=3))
        {'epochs': 'epochs is None in the run, 3 asked for'}
    """
    before, after = _flat(config_to_dict(saved)), _flat(config_to_dict(asked))
    return {
        name: f"{name} is {value} in the run, {after[name]} asked for"
        for name, value in before.items()
        if value != after[name]
    }


def describe_options() -> str:
    """Every option with its default and its meaning, a line each."""
    lines = []
    for name, (default, meaning) in _described(TrainConfig, "").items():
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        lines.append(f"--{name}  ({'unset' if shown is None else shown})\n    {meaning}")
    return "\n".join(lines) + "\n"


def _described(cls: type, prefix: str) -> dict[str, tuple[Any, str]]:
    """Default and meaning of every option; the meaning is that of the class's docstring."""
    hints, documented = typing.get_type_hints(cls), inspect.getdoc(cls) or ""
    found: dict[str, tuple[Any, str]] = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _described(hints[field.name], f"{name}.")
            continue
        meaning = re.search(rf"^    {field.name}: (.+(?:\n      .+)*)", documented, re.MULTILINE)
        found[name] = (field.default, " ".join(meaning[1].split()) if meaning else "")
    return found


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _build(parser: ConfigParser, parsed: Namespace) -> TrainConfig:
    try:
        instantiate = (
            getattr(parser, "instantiate", None) or parser.instantiate_classes
        )  # its name before 4.49
        options: dict[str, Any] = instantiate(parsed).as_dict()  # nested dataclasses, flat top level
        options.pop("config", None)
        return TrainConfig(**options)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error


def _normalise(arguments: Sequence[str]) -> Iterator[str]:
    """Write shorthands out and turn ``--name 1 2 3`` into ``--name=[1, 2, 3]``."""
    known = {"config", *option_names()}
    lists, switches = set(_options_of(TrainConfig, _holds_tuple)), set(_options_of(TrainConfig, _is_switch))
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        index += 1
        if not argument.startswith("--"):
            raise UsageError(f"unexpected argument {argument!r}; options start with --")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        name = _SHORTHANDS.get(name, name)
        if name not in known:
            raise UsageError(_unknown(name))
        values = [value] if equals else []
        if not equals:
            while index < len(arguments) and _is_value(arguments[index]):
                values.append(arguments[index])
                index += 1
        if not values:
            if name not in switches:
                raise UsageError(f"--{name} needs a value")
            values = ["true"]
        if name in lists and not values[0].startswith("[") and (len(values) > 1 or _NUMBER.match(values[0])):
            values = [f"[{', '.join(values)}]"]
        if name == "config":
            _check_file(values[0])
        if len(values) > 1:
            raise UsageError(f"--{name} takes one value, got {' '.join(values)}")
        yield f"--{name}={values[0]}"


def _check_file(path: str) -> None:
    """Refuse a YAML file that cannot be read or names an unknown option, with the file's name."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected options and their values, as --print-config shows them")
    known = set(option_names())
    groups = {name.rpartition(".")[0] for name in known} - {""}
    for name, value in _keys(content, groups):
        if name not in known | groups:
            raise UsageError(f"{path}: {_unknown(name)}")
        if name in groups and not isinstance(value, dict):
            raise UsageError(f"{path}: {name} is {value!r}, but it is a group of options: {_members(name)}")


def _keys(content: dict[Any, Any], groups: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        yield name, value
        if isinstance(value, dict) and name in groups:
            yield from _keys(value, groups, f"{name}.")


def _unknown(name: str) -> str:
    known = list(option_names())
    known += sorted({option.rpartition(".")[0] for option in known} - {""})
    nearest = [option for option in known if option.startswith(name)]
    nearest += difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "--print-config shows all options"
    return f"unknown option {name!r}; {hint}"


def _members(group: str) -> str:
    return ", ".join(name for name in option_names() if name.startswith(f"{group}."))


def _is_value(argument: str) -> bool:
    return not argument.startswith("-") or _NUMBER.match(argument) is not None


def _options_of(cls: type, fits: Callable[[Any], bool], prefix: str = "") -> Iterator[str]:
    """Names of the options with a type that fits."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options_of(hint, fits, f"{prefix}{field.name}.")
        elif any(fits(part) for part in _alternatives(hint)):
            yield prefix + field.name


def _holds_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_switch(hint: Any) -> bool:
    return hint is bool


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
