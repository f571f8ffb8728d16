"""Loading of the native libraries, and what every op shares: definition, fallback to the twin, status."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_NATIVE_FOLDER = Path(__file__).resolve().parents[1] / "_native"
_OLDEST_TORCH = (2, 10)
_ISA_NAMES = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class LibraryStatus:
    """Whether a native library is in use and, where not, why and what to do."""

    backend: str
    loaded: bool
    reason: str = ""


def _load(backend: str) -> LibraryStatus:
    path = _NATIVE_FOLDER / f"lungkit_{backend}.so"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return LibraryStatus(
            backend, False, f"torch {torch.__version__} is older than {oldest}; upgrade torch"
        )
    if backend == "cuda" and torch.version.cuda is None:
        return LibraryStatus(backend, False, f"torch {torch.__version__} is a build without CUDA")
    if not path.exists():
        return LibraryStatus(backend, False, _why_absent(path))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return LibraryStatus(backend, False, f"{path.name} does not load: {error}; install lungkit again")
    return LibraryStatus(backend, True)


def checkout() -> Path | None:
    """The source tree that this lungkit is imported from, or None for an installed one."""
    root = _NATIVE_FOLDER.parents[1]
    return root if (root / "csrc").is_dir() and (root / "CMakeLists.txt").is_file() else None


def hidden_copy(library: str) -> Path | None:
    """Another lungkit on the import path that holds ``library`` and that this one hides."""
    ours = _NATIVE_FOLDER.parent
    for entry in sys.path:
        package = Path(entry or ".").resolve() / "lungkit"
        if package != ours and (package / "_native" / library).is_file():
            return package
    return None


def _why_absent(path: Path) -> str:
    tool = "nvcc" if "cuda" in path.name else "C++20 compiler"
    root, hidden = checkout(), hidden_copy(path.name)
    if hidden is not None:
        return (
            f"not built in {_NATIVE_FOLDER.parent}, which hides the lungkit in {hidden}, where it is; start Python in "
            f"another folder, and leave the former out of PYTHONPATH"
        )
    if not sys.platform.startswith("linux"):
        return f"lungkit has native libraries for Linux only, this is {sys.platform}"
    if root is not None:
        return (
            f"not built in the checkout {root}; build it with cmake -DLUNGKIT_IN_PLACE=ON, or install lungkit"
        )
    return (
        f"not built: no {tool} was found when lungkit was installed, or the build was told to leave it out; "
        "install it, then lungkit again"
    )


CPU_LIBRARY = _load("cpu")
CUDA_LIBRARY = (
    _load("cuda")
    if CPU_LIBRARY.loaded
    else LibraryStatus("cuda", False, "the CPU library, which it extends, is not loaded")
)


def _warn_of_hidden_kernels() -> None:
    """Say once, where everything would be slow without a word, that this copy hides another that has kernels."""
    library = "lungkit_cpu.so"
    hidden = None if (_NATIVE_FOLDER / library).exists() else hidden_copy(library)
    if hidden is not None:
        kind = "the checkout" if checkout() else "the copy of lungkit in"
        warnings.warn(
            f"{kind} {_NATIVE_FOLDER.parents[1]} holds no kernels and hides {hidden}, which does: EVERYTHING RUNS IN "
            "PLAIN PYTORCH. Start Python in another folder, and leave this one out of PYTHONPATH",
            RuntimeWarning,
            stacklevel=2,
        )


_warn_of_hidden_kernels()

_ops: dict[str, str] = {}


def define_op(schema: str, twin: Callable[..., object]) -> None:
    """Make ``torch.ops.lungkit.<name>`` callable on every device.

    The native libraries bring the schema and their kernels; ``schema`` is used where they are absent or lack the op,
    and ``twin``, plain PyTorch with the schema's arguments, runs on every device that has no native kernel.
    """
    name = schema.split("(", maxsplit=1)[0]
    _ops[name] = schema
    if not hasattr(torch.ops.lungkit, name):
        torch.library.define(f"lungkit::{name}", schema.removeprefix(name))
    torch.library.impl(f"lungkit::{name}", "CompositeExplicitAutograd", twin)


def defined_ops() -> dict[str, str]:
    """Name and schema of every op of lungkit."""
    return dict(_ops)


def is_native(name: str, backend: str) -> bool:
    """Whether op ``name`` has a native kernel on ``backend`` ("cpu" or "cuda"), or runs on its twin there."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lungkit::{name}", backend.upper())


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use: "baseline", "avx2", "avx512", or "none" on the twins."""
    if not CPU_LIBRARY.loaded:
        return "none"
    return _ISA_NAMES[_symbols().lungkit_cpu_isa()]


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this processor can run, narrowest first."""
    if not CPU_LIBRARY.loaded:
        return ()
    current = _symbols().lungkit_cpu_isa()
    available = tuple(name for isa, name in enumerate(_ISA_NAMES) if _symbols().lungkit_set_cpu_isa(isa))
    _symbols().lungkit_set_cpu_isa(current)
    return available


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels with a chosen instruction set inside a ``with`` block; not for concurrent threads.

    Raises:
        ValueError: this processor or build does not have it.
    """
    if name not in available_isas():
        raise ValueError(f"instruction set {name!r} is not available; this machine has {available_isas()}")
    before = _symbols().lungkit_cpu_isa()
    _symbols().lungkit_set_cpu_isa(_ISA_NAMES.index(name))
    try:
        yield
    finally:
        _symbols().lungkit_set_cpu_isa(before)


def _symbols() -> ctypes.CDLL:
    return ctypes.CDLL(str(_NATIVE_FOLDER / "lungkit_cpu.so"))
