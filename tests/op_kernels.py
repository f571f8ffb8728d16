"""The native kernels behind ``lungkit.ops``: each instruction set of the CPU, CUDA on the emulator, CUDA on a device.

A test that takes the fixture ``kernels`` (or is parametrized by :func:`on_kernels`) calls the public functions with
CPU tensors; while it runs, whatever reaches an op on the CPU goes to one set of kernels. So a test states a behaviour
once, and all kernels must show it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu.emulator import Emulator
from torch import Tensor

from lungkit.ops import _library

CPU = ("baseline", "avx2", "avx512")
EMULATED = ("emulated-forward", "emulated-reverse", "emulated-random")
CUDA = ("cuda",)


def kernel_param(kernel: str, *case: Any) -> Any:
    """A set of parameters whose kernel needs a device where that is "cuda"."""
    return pytest.param(kernel, *case, marks=pytest.mark.cuda if kernel == "cuda" else ())


def on_kernels(
    names: str,
    cpu: Iterable[Any],
    *,
    emulated: Iterable[Any] | None = None,
    cuda: Iterable[Any] | None = None,
    ids: Callable[[Any], object] | None = None,
) -> pytest.MarkDecorator:
    """Parametrizes a test over ``kernels`` and its own arguments ``names``, with a table of cases for each backend.

    The emulator runs a kernel thread by thread and may have a table of smaller cases, or of cases that aim at other
    tiles. A backend without a table of its own takes the CPU's, CUDA the emulator's too.
    """
    arguments = names.replace(" ", "").split(",")
    cpu = list(cpu)
    emulated = cpu if emulated is None else list(emulated)
    cuda = [*cpu, *(case for case in emulated if case not in cpu)] if cuda is None else list(cuda)
    rows = [
        kernel_param(kernel, *(case if len(arguments) > 1 else (case,)))
        for kernels, cases in ((CPU, cpu), (EMULATED, emulated), (CUDA, cuda))
        for kernel in kernels
        for case in cases
    ]
    return pytest.mark.parametrize(("kernels", *arguments), rows, indirect=["kernels"], ids=ids)


on_the_cpu = pytest.mark.parametrize("kernels", CPU, indirect=True)
on_the_emulator = pytest.mark.parametrize("kernels", EMULATED, indirect=True)
on_cuda_kernels = pytest.mark.parametrize(
    "kernels", [kernel_param(k) for k in (*EMULATED, *CUDA)], indirect=True
)


@contextmanager
def rerouted(replacement: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    """Inside, op ``name`` on CPU tensors is ``replacement(name)``, below its checks, its autograd and its casts."""
    with torch.library._scoped_library("lungkit", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name in _library.defined_ops():
                library.impl(name, replacement(name), "CPU")
        yield


def emulated_op(name: str) -> Callable[..., Any]:
    """The CUDA kernels of an op, run by the emulator; its library has to be loaded."""
    return lambda *arguments: getattr(torch.ops.lungkit_emulated, name)(*arguments)


def device_op(name: str) -> Callable[..., Any]:
    """The CUDA kernels of an op, run on a device; the results come back, and so does what the op writes in place."""
    op = getattr(torch.ops.lungkit, name).default
    written = [
        number
        for number, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def call(*arguments: Any) -> Any:
        moved = [_moved(value) if isinstance(value, Tensor) else value for value in arguments]
        results = op(*moved)
        for number in written:  # gaps included, into which nothing may be written
            arguments[number].untyped_storage().copy_(moved[number].untyped_storage())
        if results is None:
            return None
        return results.cpu() if isinstance(results, Tensor) else tuple(part.cpu() for part in results)

    return call


def _moved(tensor: Tensor) -> Tensor:
    """On the device, with the strides, gaps and offset that it has here; ``.cuda()`` would pack it."""
    storage = tensor.untyped_storage().cuda()
    there = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


class Schedules(NamedTuple):
    """Ways in which a backend may come to run the parts of a kernel: numbers of threads, thread orders, repetitions."""

    backend: str  # "cpu", "emulated" or "cuda"
    contexts: Mapping[str, Callable[[], AbstractContextManager[None]]]

    def assert_same_bits(self, call: Callable[[], Sequence[Tensor]]) -> None:
        """The results of ``call`` have the same bits in each of them."""
        first: list[bytes] | None = None
        for name, context in self.contexts.items():
            with context():
                found = [_bits(result) for result in call()]
            first = found if first is None else first
            assert found == first, f"other bits {name} than {next(iter(self.contexts))}"


def _bits(tensor: Tensor) -> bytes:
    """Its bytes: NaN equals itself, -0 is not 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def schedules_of(backend: str, emulator: Emulator | None = None) -> Schedules:
    """Those of "cpu", "cuda", or "emulated", which needs the emulator's control."""
    if emulator is not None:
        orders = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
        return Schedules(
            backend, {f"in order {o} (seed {s})": partial(emulator.order, o, s) for o, s in orders}
        )
    if backend == "cpu":
        return Schedules(backend, {f"on {n} threads": partial(threads, n) for n in (1, 2, 3)})
    return Schedules(backend, {f"in run {k}": nullcontext for k in range(5)})
