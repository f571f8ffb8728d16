"""Lightning Fabric: precision, devices and processes. Imported where a run starts, not with lungkit."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from lungkit.errors import ResourceError, UsageError
from lungkit.training.config import EngineConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")

_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def start_engine(config: EngineConfig) -> Fabric:
    """Fabric for ``config``, launched: with several processes each of them returns from here.

    Raises:
        UsageError: the accelerator is unknown or not on this machine, or cannot do the precision.
    """
    from lightning_fabric import Fabric

    if config.precision == "fp16" and config.accelerator == "cpu":
        raise UsageError("engine.precision is 'fp16', which needs a GPU; use 'bf16' or 'fp32' on the CPU")
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            precision=_PRECISIONS[config.precision],  # type: ignore[arg-type]
            strategy="ddp" if config.devices * config.nodes > 1 else "auto",
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(
            f"engine.accelerator {config.accelerator!r} with {config.devices} devices cannot be used: {error}"
        ) from error
    if config.precision == "fp16" and fabric.device.type == "cpu":
        raise UsageError("engine.precision is 'fp16', which needs a GPU; use 'bf16' or 'fp32' on the CPU")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric.launch()
    if fabric.global_rank > 0:
        _LOG.setLevel(logging.ERROR)  # every process comes to the same lines; one of them says them
    if fabric.world_size > 1:
        # Channels-last gradients of 1 x 1 convolutions: the strides differ in name only.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if config.deterministic:
        # cuBLAS reads it when it is first used; without it, deterministic algorithms are refused there.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    return fabric


def gather_objects(value: Any, world_size: int) -> list[Any]:
    """``value`` of every process, in the order of their ranks."""
    if world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def as_resource_error(error: BaseException) -> ResourceError | None:
    """The error to raise where memory ran out, or None where ``error`` is about something else."""
    advice = "use a smaller batch_size, data.patch_size or model.features"
    if isinstance(error, torch.OutOfMemoryError):
        return ResourceError(f"the GPU is out of memory: {advice} ({error})")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return ResourceError(f"out of memory: {advice} ({error})")
    return None
