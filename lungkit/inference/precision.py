"""Which number format a device computes fast with."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def automatic_precision(device_type: str) -> Precision:
    """The fastest format that a "cuda" or "cpu" device multiplies in hardware; "fp32" for any other device.

    bf16 on GPUs from Ampere on and CPUs with AVX-512 BF16 or AMX, fp16 on older GPUs.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device_type == "cpu" and cpu_computes_bf16() else "fp32"


def choose_precision(device_type: str, recorded: Precision | None) -> Precision:
    """``recorded``, the format that a network was validated in, where the device computes with it in hardware.

    Else :func:`automatic_precision`. Every device computes with fp32, a GPU with fp16.

    Example:
        >>> choose_precision("cpu", "fp32"), choose_precision("cuda", "fp16"), choose_precision("mps", "bf16")
        ('fp32', 'fp16', 'fp32')
    """
    if recorded == "fp32" or (recorded == "fp16" and device_type == "cuda"):
        return recorded
    return automatic_precision(device_type)


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; torch emulates it elsewhere, slower than fp32."""
    find = getattr(torch.cpu, "get_capabilities", dict)  # older releases do not tell
    found: dict[str, Any] = find()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def autocast(device_type: str, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision inside the block; nothing changes for "fp32"."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=_AUTOCAST[precision])
