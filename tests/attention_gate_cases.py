"""Shapes, inputs and the comparison with the twin in the tests of attention_gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lungkit.ops.attention_gate import attention_gate, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF_DTYPES = [torch.bfloat16, torch.float16]

# Largest difference from the fp64 twin, as a share of the largest value of the same tensor. Half types round once, on
# the way out; the bias' gradient is a sum of large numbers of both signs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    fine: tuple[int, ...]
    coarse: tuple[int, ...]
    x_channels: int
    inner: int
    batch: int = 1

    def __str__(self) -> str:
        grids = ["x".join(map(str, grid)) for grid in (self.fine, self.coarse)]
        return f"{self.batch}x{self.x_channels}x{grids[0]}-{self.inner}x{grids[1]}"


CASES = [
    Case((1, 1), (1, 1), 1, 1),
    Case((1, 1, 1), (1, 1, 1), 3, 2, batch=2),
    Case((5, 7), (3, 4), 3, 2, batch=2),
    Case((4, 6, 5), (4, 6, 5), 17, 33),
    Case((4, 6, 5), (2, 3, 5), 5, 7, batch=2),
    Case((40, 36), (10, 9), 16, 40),
    Case((13, 9, 35), (4, 5, 9), 20, 24, batch=2),
    Case((1, 20, 30), (1, 10, 15), 8, 4, batch=3),
    Case((9, 20, 20), (1, 10, 10), 16, 8),
    Case((6, 5, 150), (6, 5, 75), 33, 8),
    Case((16, 16, 16), (8, 8, 8), 32, 16),
]
# More channels, fewer voxels; enough voxels for several chunks of every kind.
WIDE_CASES = [
    Case((3, 5), (2, 3), 512, 3),
    Case((3, 5), (2, 3), 3, 512),
    Case((4, 4, 3), (2, 2, 2), 130, 257),
    Case((6, 6, 6), (3, 3, 3), 256, 128),
]
LARGE_CASES = [
    Case((40, 40, 40), (20, 20, 20), 32, 16),
    Case((200, 120), (100, 60), 16, 8, batch=2),
    Case((30, 40, 40), (30, 40, 40), 16, 8),
]

# What the CUDA kernels themselves take: their sizes of channels, tiles that end inside a row, boxes cut along x.
CUDA_DTYPES = [torch.float32, *HALF_DTYPES]
CUDA_CASES = [
    *(case for case in CASES if case.inner <= 32 and case.x_channels <= 64),
    Case((2, 3, 70), (2, 3, 35), 33, 17),
    Case((2, 2, 9), (1, 1, 5), 64, 32),
    Case((3, 300), (3, 150), 2, 32),
    Case((4, 6, 64), (2, 3, 32), 64, 32),  # pieces of 16 bytes, channels-first and channels-last
    Case((6, 6, 48), (3, 3, 24), 24, 16, batch=2),
    Case((8, 8, 16), (1, 2, 2), 8, 8),  # weights that bfloat16 does not hold
    Case((5, 6, 40), (4, 5, 30), 16, 8),  # 8 voxels that read more than 8 columns
]
SMALL = Case((4, 6, 5), (2, 3, 3), 5, 4, batch=2)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_inputs(case: Case, dtype: torch.dtype, *, channels_last: bool = False, seed: int = 0) -> Inputs:
    """x, phi, w_x, w_psi, b_psi: all in ``dtype``, or weights of float32 that ``dtype`` holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x = draw(case.batch, case.x_channels, *case.fine)
    phi = draw(case.batch, case.inner, *case.coarse)
    if channels_last:
        order = torch.channels_last if len(case.fine) == 2 else torch.channels_last_3d
        x, phi = x.contiguous(memory_format=order), phi.contiguous(memory_format=order)
    return (
        x,
        phi,
        draw(case.inner, case.x_channels) / case.x_channels**0.5,
        draw(case.inner) / case.inner**0.5,
        draw(1),
    )


def random_gradients(x: Tensor, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of out, in x's order of memory, and of alpha."""
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))
    return grad_out, torch.randn((x.shape[0], 1, *x.shape[2:]), generator=generator).to(x.dtype)


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs that require gradients."""
    return [tensor.requires_grad_() for tensor in random_inputs(case, dtype)]


def gate_and_gradients(inputs: list[Tensor], gate: Callable = attention_gate) -> list[Tensor]:
    """The results, and the gradients of the inputs for gradients of both results."""
    results = gate(*inputs)
    return [*results, *torch.autograd.grad(results, inputs, random_gradients(inputs[0]))]


def assert_matches_twin(
    inputs: Inputs,
    gradients: tuple[Tensor | None, Tensor | None],
    *,
    multiplied_as: torch.dtype | None = None,
) -> None:
    """The ops' results, forward and backward, are those of the twin in fp64; NaN and infinity would not pass.

    ``multiplied_as`` is the dtype that products are taken of where the weights' own is finer.
    """
    found = [
        *torch.ops.lungkit.attention_gate(*inputs),
        *torch.ops.lungkit.attention_gate_backward(*gradients, *inputs, True, True, True, True),
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    results = reference(*exact)
    expected = [
        *results,
        *torch.autograd.grad(
            [r for r, g in zip(results, gradients, strict=True) if g is not None],
            exact,
            [g.double() for g in gradients if g is not None],
        ),
    ]
    names = ("out", "alpha", "grad_x", "grad_phi", "grad_w_x", "grad_w_psi", "grad_b_psi")
    for name, actual, exact_value in zip(names, found, expected, strict=True):
        wanted = exact_value.detach()
        limit = TOLERANCE[multiplied_as or actual.dtype]
        scale = float(wanted.abs().max())
        if (
            name == "grad_b_psi"
        ):  # a sum of both signs: its terms are what rounding follows, and the sum where it is large
            scale = max(scale, 30.0)
        assert actual.shape == wanted.shape, name
        difference = float((actual.double() - wanted).abs().max())
        assert difference <= limit * max(scale, 1e-6), (
            f"{name}: differs by {difference}, largest value {scale}"
        )
