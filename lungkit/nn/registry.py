"""Networks by name, for configurations and checkpoints."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from lungkit.errors import UsageError
from lungkit.nn.attention_unet import AttentionUNet
from lungkit.nn.monai import MonaiAttentionUNet
from lungkit.nn.unet import UNet

MODELS: dict[str, type[nn.Module]] = {
    model.name: model for model in (UNet, AttentionUNet, MonaiAttentionUNet)
}
"""Network classes by name; each has a ``config`` from which :func:`build_model` rebuilds it."""


def build_model(name: str, **options: Any) -> nn.Module:
    """Build the network called ``name``; ``build_model(**network.config)`` rebuilds a network (not its weights).

    Args:
        name: a key of :data:`MODELS`.
        **options: arguments of the class.

    Raises:
        UsageError: unknown name or option (the nearest known one is suggested), or a bad value.

    Example:
        >>> from lungkit.nn import build_model
        >>> network = build_model("attention-unet", dims=3, features=(8, 16))
        >>> type(build_model(**network.config)).__name__
        'AttentionUNet'
    """
    if name not in MODELS:
        raise UsageError(f"unknown network {name!r}{_suggest(name, MODELS)}; there are {', '.join(MODELS)}")
    known = _option_names(MODELS[name])
    for option in options:
        if option not in known:
            raise UsageError(
                f"network {name!r} has no option {option!r}{_suggest(option, known)}; it takes {', '.join(known)}"
            )
    return MODELS[name](**options)


def _option_names(model: type) -> list[str]:
    """Argument names of the constructor, and of its base's where it passes options on."""
    names: list[str] = []
    for cls in model.__mro__:
        if cls is nn.Module:
            break
        parameters = inspect.signature(cls).parameters.values()
        names += [p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in names]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names


def _suggest(word: Any, known: Any) -> str:
    nearest = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
