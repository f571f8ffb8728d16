"""Normalise and check the constructor arguments of the networks, with errors that name the argument."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lungkit.errors import UsageError

LevelValue = int | Sequence[int | Sequence[int]]
"""One integer, or a sequence with an entry per level, each an integer or one integer per axis."""


def check_dims(dims: int) -> int:
    """``dims`` if it is 2 or 3."""
    if not _is_integer(dims) or dims not in (2, 3):
        raise UsageError(f"dims must be 2 or 3, got {dims!r}")
    return int(dims)


def check_integer(name: str, value: int, *, minimum: int = 1) -> int:
    """``value`` if it is an integer of at least ``minimum``."""
    if not _is_integer(value) or value < minimum:
        raise UsageError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """``value`` if it is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")
    return value


def check_probability(name: str, value: float) -> float:
    """``value`` if it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < 1:
        raise UsageError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def check_features(features: Sequence[int]) -> list[int]:
    """Channels per level, finest first: two levels or more."""
    values = _as_list(features)
    if values is None or len(values) < 2 or not all(_is_integer(v) and v >= 1 for v in values):
        raise UsageError(
            f"features must hold the channels of two levels or more, finest first, e.g. (16, 32, 64, 128); "
            f"got {features!r}"
        )
    return [int(v) for v in values]


def per_level(name: str, value: int | Sequence[int], *, levels: int) -> list[int]:
    """One integer per level from one integer or a sequence of ``levels``."""
    values = [value] * levels if _is_integer(value) else _as_list(value)
    if values is None or len(values) != levels:
        raise UsageError(f"{name} must be an integer or {levels} of them, one per level; got {value!r}")
    return [check_integer(f"{name}[{i}]", v) for i, v in enumerate(values)]


def per_axis(
    name: str,
    value: int | Sequence[int],
    *,
    dims: int,
    fits: Callable[[int], bool] = lambda n: n >= 1,
    rule: str = "an integer of at least 1",
) -> tuple[int, ...]:
    """One integer per axis from one integer or a sequence of ``dims``; ``rule`` says in words what ``fits``."""
    axes: list[Any] | None = [value] * dims if _is_integer(value) else _as_list(value)
    if axes is None or len(axes) != dims:
        raise UsageError(f"{name} must be an integer or {dims} of them, one per axis; got {value!r}")
    if not all(_is_integer(n) and fits(n) for n in axes):
        raise UsageError(f"{name} must be {rule} along every axis; got {value!r}")
    return tuple(int(n) for n in axes)


def per_level_per_axis(
    name: str,
    value: LevelValue,
    *,
    levels: int,
    dims: int,
    fits: Callable[[int], bool] = lambda n: n >= 1,
    rule: str = "an integer of at least 1",
) -> list[tuple[int, ...]]:
    """A tuple, one integer per axis, for each level, from one integer, one integer per level, or one tuple per level.

    A flat sequence always means levels, never axes: (2, 2, 2) is stride 2 on three levels.
    """
    entries = [value] * levels if _is_integer(value) else _as_list(value)
    if entries is None or len(entries) != levels:
        raise UsageError(
            f"{name} must be an integer or a sequence of {levels}, one entry per level "
            f"(an integer, or {dims} integers, one per axis); got {value!r}"
        )
    return [
        per_axis(f"{name}[{index}]", entry, dims=dims, fits=fits, rule=rule)
        for index, entry in enumerate(entries)
    ]


def is_odd(n: int) -> bool:
    """Whether n can be the size of a kernel that keeps the grid."""
    return n >= 1 and n % 2 == 1


def plain(value: Any) -> Any:
    """``value`` with tuples as lists, so that it equals itself after a round trip through JSON."""
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _as_list(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else None
