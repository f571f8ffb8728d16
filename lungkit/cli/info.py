"""``lungkit-info``: versions, devices, and which ops run on native kernels."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lungkit
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.errors import UsageError
from lungkit.ops import _library

_PACKAGES = (
    "torch",
    "numpy",
    "nibabel",
    "isal",
    "safetensors",
    "lightning-fabric",
    "rich",
    "matplotlib",
    "cupy",
)
_BACKENDS = {"cpu": _library.CPU_LIBRARY, "cuda": _library.CUDA_LIBRARY}


def collect() -> dict[str, Any]:
    """What ``lungkit-info --json`` prints.

    Example:
        >>> info = collect()
        >>> sorted(info)
        ['checkout', 'devices', 'folder', 'libraries', 'lungkit', 'ops', 'platform', 'python', 'versions']
    """
    return {
        "lungkit": lungkit.__version__,
        "folder": str(Path(lungkit.__file__).parent),
        "checkout": _library.checkout() is not None,
        "libraries": {
            **{backend: library.reason or "loaded" for backend, library in _BACKENDS.items()},
            "geometry": _geometry(),
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "ops": {
            name: {backend: _op_status(name, backend) for backend in _BACKENDS}
            for name in sorted(_library.defined_ops())
        },
    }


def _geometry() -> str:
    """Whether surface distances are computed by the native module, or why not."""
    from lungkit.metrics import surface

    if surface.is_native():
        return "loaded"
    folder = Path(lungkit.__file__).parent / "_native"
    if built := sorted(folder.glob("_geometry*")):
        return f"{built[0].name} is not for this Python, {platform.python_version()}; install lungkit for it"
    return (
        "not built, so surface distances are computed in numpy: there were no Python headers or no pybind11"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    return {
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "kernel instruction set": _library.cpu_isa(),
            "instruction sets available": list(_library.available_isas()),
        },
        "cuda": [
            {
                "name": torch.cuda.get_device_name(i),
                "compute capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
                "memory GiB": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            }
            for i in range(torch.cuda.device_count())
        ],
    }


def _op_status(name: str, backend: str) -> dict[str, Any]:
    if _library.is_native(name, backend):
        return {"native": True}
    return {"native": False, "reason": _BACKENDS[backend].reason or "this op has no kernel for the backend"}


def _render(info: dict[str, Any]) -> str:
    source = "a checkout" if info["checkout"] else "installed"
    lines = [
        f"lungkit {info['lungkit']} from {info['folder']} ({source}), Python {info['python']}, {info['platform']}"
    ]
    if info["libraries"]["cpu"] != "loaded":
        lines += ["", f"NOT NATIVE, everything runs in plain PyTorch: {info['libraries']['cpu']}"]
    lines += ["", "Versions"]
    lines += [f"  {name:18} {version or 'not installed'}" for name, version in info["versions"].items()]
    lines += ["", "Libraries"]
    lines += [f"  {name:18} {state}" for name, state in info["libraries"].items()]
    lines += ["", "Devices"]
    lines += [f"  cpu: {key}: {_text(value)}" for key, value in info["devices"]["cpu"].items()]
    lines += [f"  cuda {i}: {_text(list(gpu.values()))}" for i, gpu in enumerate(info["devices"]["cuda"])]
    if not info["devices"]["cuda"]:
        lines.append("  cuda: none")
    lines += ["", "Ops (an op that is not native runs in plain PyTorch, with the same results)"]
    for name, backends in info["ops"].items():
        for backend, status in backends.items():
            state = "native" if status["native"] else f"plain PyTorch: {status['reason']}"
            lines.append(f"  {name:24} {backend:5} {state}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(
        prog="lungkit-info",
        description="Versions, devices, and which of lungkit's ops run on native kernels.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        nargs="?",
        const="",
        help="say how much room preprocessed cases take (default: where lungkit-train keeps them)",
    )
    parser.add_argument(
        "--prune-cache",
        type=float,
        metavar="DAYS",
        help="remove the preprocessed cases that no run has opened for so many days, of --cache DIR or the default",
    )
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return run_command(lambda: _run(parser.parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    if options.cache is not None or options.prune_cache is not None:
        return _manage_cache(options.cache, options.prune_cache)
    info = collect()
    sys.stdout.write((json.dumps(info, indent=2) if options.json else _render(info)) + "\n")
    return 0


def _manage_cache(named: str | None, unused_days: float | None) -> int:
    from lungkit.data.cache_folder import cache_use, default_cache_folder, prune_cache

    folder = Path(named) if named else default_cache_folder()
    if unused_days is not None:
        if not unused_days >= 0:
            raise UsageError(f"--prune-cache is {unused_days}; give days, 0 or more")
        removed = prune_cache(folder, unused_days=unused_days)
        sys.stdout.write(f"removed {removed.cases} cases, {removed.bytes / 2**30:.2f} GiB\n")
    held = cache_use(folder)
    sys.stdout.write(f"{folder}: {held.cases} preprocessed cases, {held.bytes / 2**30:.2f} GiB\n")
    return 0
