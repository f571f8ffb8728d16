"""Random arguments of every op, as a caller of ``torch.ops.lungkit`` may give them: right ones, and spoilt ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDICES = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
OTHERS = (torch.int8, torch.complex64)
NUMBERS = (0, 1, -1, 2, 3, 255, 256, -(2**31), 2**31, 2**40, 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))


class Draw:
    """Draws that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.random.random() < share)

    def between(self, least: int, most: int) -> int:
        return int(self.random.integers(least, most + 1))

    def one_of(self, options: Any) -> Any:
        return options[self.between(0, len(options) - 1)]

    def floating(self) -> torch.dtype:
        return self.one_of(FLOATING)

    def grid(self, axes: int) -> tuple[int, ...]:
        """Mostly small; at times empty, at times longer than a vector or a tile."""
        sizes = [self.between(1, 7) for _ in range(axes)]
        if self.chance(0.2):
            sizes[-1] = self.between(8, 200)
        if self.chance(0.05):
            sizes[self.between(0, axes - 1)] = 0
        return tuple(sizes)

    def shape(self, *, axes: tuple[int, int]) -> tuple[int, ...]:
        channels = self.between(17, 70) if self.chance(0.15) else self.between(1, 9)
        if self.chance(0.03):
            channels = 0
        batch = self.between(1, 3) if self.chance(0.95) else 0
        return (batch, channels, *self.grid(self.between(*axes)))

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._laid_out(torch.from_numpy(self.random.normal(size=shape)).to(dtype))

    def indices(self, shape: tuple[int, ...], dtype: torch.dtype, classes: int) -> Tensor:
        found = self.random.integers(0, min(max(1, classes), 2 if dtype == torch.bool else 256), size=shape)
        return self._laid_out(torch.from_numpy(found).to(dtype))

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """The same values in another order of memory, with gaps, an offset, or strides of zero."""
        kind = self.between(0, 7)
        if kind == 0 and tensor.dim() in (4, 5):
            return tensor.contiguous(
                memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            )
        if kind == 1 and tensor.dim():
            axis = self.between(0, tensor.dim() - 1)
            return torch.stack([tensor, tensor], axis + 1).flatten(axis, axis + 1)[
                (slice(None),) * axis + (slice(None, None, 2),)
            ]
        if kind == 2 and tensor.dim() > 1:
            first, second = self.between(0, tensor.dim() - 1), self.between(0, tensor.dim() - 1)
            return tensor.transpose(first, second).contiguous().transpose(first, second)
        if kind == 3 and tensor.dim() and tensor.numel():
            axis = self.between(0, tensor.dim() - 1)
            return tensor.narrow(axis, 0, 1).expand_as(tensor)
        if kind == 4:
            whole = tensor.new_zeros(tensor.numel() + 3)
            whole[3:] = tensor.reshape(-1)
            return whole[3:].view(tensor.shape)
        return tensor

    def spoilt(self, arguments: list[Any]) -> list[Any]:
        """With one of them changed to what may no longer fit: every other time a tensor, of which there are few."""
        changed = list(arguments)
        tensors = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
        position = self.one_of(tensors if self.chance() else range(len(arguments)))
        value = changed[position]
        if isinstance(value, Tensor):
            changed[position] = self._spoilt_tensor(value)
        elif isinstance(value, bool):
            changed[position] = not value
        elif isinstance(value, int):
            changed[position] = self.one_of(NUMBERS)
        elif isinstance(value, float):
            changed[position] = self.one_of(REALS)
        elif isinstance(value, str):
            changed[position] = self.one_of(("softmax", "sigmoid", "binary", "none", "", "Softmax"))
        return changed

    def _spoilt_tensor(self, tensor: Tensor) -> Any:
        kind, sizes = self.between(0, 8), list(tensor.shape)
        if kind == 0:
            return tensor.to(self.one_of((*FLOATING, *INDICES, *OTHERS)))
        if kind == 1:
            return tensor.to("meta")
        if kind == 2:
            return tensor[..., None] if self.chance() else tensor.reshape(-1)
        if kind == 3 and sizes:
            return tensor[0] if sizes[0] else tensor.reshape(0)
        if kind == 4:
            return tensor.new_zeros(())
        if kind == 5 and sizes:
            return tensor.transpose(0, -1)
        axis = self.between(0, max(0, len(sizes) - 1))
        if sizes:
            sizes[axis] = self.one_of((0, 1, max(0, sizes[axis] - 1), sizes[axis] + 1, 2 * sizes[axis]))
        # Of no memory: however large an op takes it to be, it is not.
        return tensor.new_zeros(sizes)


def _parameter_dtype(draw: Draw, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype != torch.float64 and draw.chance() else dtype


def _gate(draw: Draw) -> list[Any]:
    dtype = draw.floating()
    shape = draw.shape(axes=(2, 3))
    inner = draw.between(17, 40) if draw.chance(0.1) else draw.between(1, 6)
    coarse = tuple(draw.between(min(1, size), size) for size in shape[2:])
    if draw.chance():
        coarse = tuple(-(-size // 2) for size in shape[2:])
    of_weights = _parameter_dtype(draw, dtype)
    return [
        draw.values(shape, dtype),
        draw.values((shape[0], inner, *coarse), dtype),
        draw.values((inner, shape[1]), of_weights),
        draw.values((inner,), of_weights),
        draw.values((1,), of_weights),
    ]


def _gate_backward(draw: Draw) -> list[Any]:
    x, *others = _gate(draw)
    grad_out = draw.values(tuple(x.shape), x.dtype) if draw.chance(0.8) else None
    grad_alpha = draw.values((x.shape[0], 1, *x.shape[2:]), x.dtype) if draw.chance(0.8) else None
    return [grad_out, grad_alpha, x, *others, *(draw.chance(0.8) for _ in range(4))]


def _counts(draw: Draw) -> list[Any]:
    shape = (draw.between(0, 3), *draw.grid(draw.between(1, 3)))
    classes = draw.between(200, 300) if draw.chance(0.1) else draw.between(2, 9)

    def indices() -> Tensor:
        form = (shape[0], 1, *shape[1:]) if draw.chance(0.3) else shape
        return draw.indices(form, draw.one_of(INDICES), classes)

    if draw.chance():
        channels = 1 if classes == 2 and draw.chance() else classes
        pred = draw.values((shape[0], channels, *shape[1:]), draw.floating())
    else:
        pred = indices()
    return [pred, indices(), classes, draw.one_of((None, 0, 1, 255, 256, -1))]


def _voxels(draw: Draw) -> list[Any]:
    shape = (draw.between(0, 3), *draw.grid(draw.between(1, 3)))
    classes = draw.between(17, 140) if draw.chance(0.1) else draw.between(1, 6)
    logits = draw.values((shape[0], classes, *shape[1:]), draw.floating())
    form = (shape[0], 1, *shape[1:]) if draw.chance(0.3) else shape
    if draw.chance(0.7):
        labels = draw.indices(form, draw.one_of(INDICES), max(2, classes))
        if draw.chance(0.3):
            labels = labels.to(draw.one_of((torch.float32, torch.float64)))
    else:
        labels = draw.values((shape[0], classes, *shape[1:]), draw.floating()).sigmoid()
    mask = None
    if draw.chance(0.3):
        mask = draw.indices(form, draw.one_of((torch.bool, torch.uint8)), 2)
    return [logits, labels, mask]


def _of_statistics(draw: Draw, logits: Tensor) -> list[Any]:
    several = logits.shape[1] > 1
    return [
        draw.one_of(("softmax", "sigmoid", "none") if several else ("sigmoid", "none")),
        draw.one_of(("softmax", "binary", "none") if several else ("binary", "none")),
        draw.chance(),
        draw.one_of((0.0, 1.0, 2.0, 1.5)),
        draw.one_of((None, None, 0, 1, 255, 256, -1)),
        draw.chance(),
    ]


def _statistics(draw: Draw) -> list[Any]:
    voxels = _voxels(draw)
    return [*voxels, *_of_statistics(draw, voxels[0])]


def _statistics_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _loss(draw: Draw) -> list[Any]:
    logits, *others = _voxels(draw)
    weight = draw.values((logits.shape[1],), _statistics_dtype(logits)).abs() if draw.chance(0.3) else None
    flags = [draw.chance() for _ in range(4)]
    return [
        *(logits, *others, weight),
        *_of_statistics(draw, logits),
        *flags,
        *(1e-3, 1e-3, 1.0, 0.5, draw.one_of((0.0, 0.1))),
    ]


def _loss_backward(draw: Draw) -> list[Any]:
    logits, *others = _voxels(draw)
    slopes = draw.values((6, logits.shape[0], logits.shape[1]), _statistics_dtype(logits))
    scale = draw.values(() if draw.chance() else (1,), slopes.dtype) if draw.chance() else None
    return [slopes, scale, logits, *others, *_of_statistics(draw, logits)]


def _norm(draw: Draw, *, distinct: bool = False) -> list[Any]:
    dtype, shape = draw.floating(), draw.shape(axes=(1, 3))
    channels = shape[1]
    divisors = [n for n in range(1, channels + 1) if channels % n == 0] or [1]
    parameter = [
        draw.values((channels,), _parameter_dtype(draw, dtype)) if draw.chance(0.7) else None
        for _ in range(2)
    ]
    residual = draw.values(shape, dtype) if draw.chance(0.3) else None
    x = draw.values(shape, dtype)
    return [
        x.clone() if distinct else x,
        *parameter,
        residual,
        draw.one_of(divisors),
        1e-3,
        draw.one_of((0.0, 0.1, 1.0, 2.0)),
    ]


def _norm_in_place(draw: Draw) -> list[Any]:
    return _norm(draw, distinct=draw.chance(0.8))


def _norm_backward(draw: Draw) -> list[Any]:
    x, weight, bias, residual, groups, _, slope = _norm(draw)
    sums = _statistics_dtype(x)
    y = draw.values(tuple(x.shape), x.dtype) if residual is not None else None
    return [
        *(draw.values(tuple(x.shape), x.dtype), x, y),
        *(draw.values((x.shape[0], groups), sums), draw.values((x.shape[0], groups), sums).abs()),
        *(weight, bias, slope, y is not None and draw.chance()),
    ]


def _psi(draw: Draw) -> list[Any]:
    dtype, shape = draw.floating(), draw.shape(axes=(2, 3))
    weight = draw.values((shape[1],), _parameter_dtype(draw, dtype))
    return [draw.values(shape, dtype), draw.values(shape, dtype), weight]


def _psi_backward(draw: Draw) -> list[Any]:
    q, _, weight = _psi(draw)
    grad = draw.values((q.shape[0], 1, *q.shape[2:]), q.dtype)
    return [grad, q.relu(), weight, draw.chance(0.8), draw.chance(0.8)]


def _scale(draw: Draw) -> list[Any]:
    dtype, shape = draw.floating(), draw.shape(axes=(2, 3))
    return [draw.values(shape, dtype), draw.values((shape[0], 1, *shape[2:]), dtype)]


def _scale_backward(draw: Draw) -> list[Any]:
    x, alpha = _scale(draw)
    return [draw.values(tuple(x.shape), x.dtype), x, alpha, draw.chance(0.8), draw.chance(0.8)]


ARGUMENTS: dict[str, Callable[[Draw], list[Any]]] = {
    "attention_gate": _gate,
    "attention_gate_backward": _gate_backward,
    "confusion_counts": _counts,
    "dice_ce_statistics": _statistics,
    "dice_ce_loss": _loss,
    "dice_ce_backward": _loss_backward,
    "gate_psi": _psi,
    "gate_psi_backward": _psi_backward,
    "gate_scale": _scale,
    "gate_scale_backward": _scale_backward,
    "norm_act": _norm,
    "norm_act_": _norm_in_place,
    "norm_act_backward": _norm_backward,
}
"""The right arguments of every op."""
