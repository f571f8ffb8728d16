"""YAML from elsewhere, looked through before anything is built of it."""

from __future__ import annotations

import os
from typing import Any

import yaml

from lungkit._reading import read_text

_MOST_BYTES = 1 << 20
_MOST_NODES = 20_000
_DEEPEST = 32
_LONGEST_PLAIN = 4096


def load_yaml(path: str | os.PathLike[str]) -> Any:
    """What a YAML file of at most 1 MiB holds; see :func:`parse_yaml`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, no regular file, no text, no YAML, or refused by :func:`parse_yaml`.
    """
    return parse_yaml(read_text(path, most_bytes=_MOST_BYTES))


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    A text may be short and yet stand for more than a machine holds: an alias repeats what it names, and a number in
    base 60 grows with every part. So the events are counted first, each alias for all that it repeats.

    Raises:
        ValueError: not YAML, or not of plain values; nested more than 32 levels deep, more than 20,000 nodes with
            aliases counted in, an alias within what it names, or a word of more than 4096 letters without quotes.

    Example:
        >>> parse_yaml("features: [16, 32]")
        {'features': [16, 32]}
    """
    try:
        _look_through(text)
        return yaml.safe_load(text)  # of a value that its tag does not fit it raises many kinds
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _look_through(text: str) -> None:
    open_nodes: list[
        tuple[str | None, int]
    ] = []  # anchor of each collection that is open, and nodes before it
    sizes: dict[str, int] = {}
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            event.value.encode()
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if (event.implicit[0] or event.tag) and len(event.value) > _LONGEST_PLAIN:
                raise ValueError(f"a word or number of {len(event.value)} letters; put text into quotes")
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise ValueError(f"the alias *{event.anchor} lies within what it names")
            nodes += sizes.get(event.anchor or "", 1)  # one that names nothing is an error of its own
        if nodes > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES} values, aliases counted in")
        if len(open_nodes) > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")
