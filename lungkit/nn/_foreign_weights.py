"""Weights under the names of another program."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lungkit.errors import CheckpointError

_LISTED = 8


def check_fits(
    own: Mapping[str, Tensor],
    names: Mapping[str, str],
    state_dict: Mapping[str, Tensor],
    complaint: str,
    advice: str,
) -> None:
    """Refuse a state dict that does not hold exactly the weights of a network.

    Args:
        own: state dict of the network.
        names: the other program's name of each of its entries.
        state_dict: of the other program.
        complaint: what the error says of the state dict.
        advice: what to do about it.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ; the message lists them.
    """
    missing = [theirs for theirs in names.values() if theirs not in state_dict]
    known = set(names.values())
    unexpected = [key for key in state_dict if key not in known]
    differing = [
        f"{theirs} is {tuple(state_dict[theirs].shape)}, the network has {tuple(own[ours].shape)}"
        for ours, theirs in names.items()
        if theirs in state_dict and state_dict[theirs].shape != own[ours].shape
    ]
    problems = [
        f"{title} ({len(entries)}): {', '.join(entries[:_LISTED])}{', ...' if len(entries) > _LISTED else ''}"
        for title, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", differing),
        )
        if entries
    ]
    if problems:
        raise CheckpointError(f"the state dict {complaint}; {'; '.join(problems)}. {advice}")
