"""Lightning Fabric: precision, devices and processes. Imported where a run starts, not with lungkit."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed

from lungkit._leaving import become_one_of_several
from lungkit.errors import ResourceError, UsageError
from lungkit.inference.precision import automatic_precision
from lungkit.training.config import EngineConfig
from lungkit.training.sharding import shard_network

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")

T = TypeVar("T")

_SECONDS_BETWEEN_LOOKS = 2.0

_PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def resolve_engine(config: EngineConfig) -> EngineConfig:
    """``config`` with precision and memory format decided for the device that it will run on.

    Example:
        >>> resolve_engine(EngineConfig(accelerator="cpu", precision="bf16")).channels_last
        True
        >>> resolve_engine(EngineConfig(accelerator="cpu", channels_last=False)).channels_last
        False
    """
    accelerator = config.accelerator.partition(":")[0]
    on_gpu = accelerator in ("cuda", "gpu", "auto") and torch.cuda.is_available()
    precision = config.precision
    if precision == "auto":
        known = accelerator in ("cpu", "auto") or on_gpu
        precision = automatic_precision("cuda" if on_gpu else "cpu") if known else "fp32"
    return replace(config, precision=precision, channels_last=config.channels_last is not False)


def start_engine(config: EngineConfig) -> Fabric:
    """Fabric for ``config``, launched: with several processes each of them returns from here.

    Raises:
        UsageError: the accelerator is unknown or not on this machine, or cannot do the precision or CUDA graphs.
    """
    from lightning_fabric import Fabric

    config = resolve_engine(config)
    if config.precision == "fp16" and config.accelerator == "cpu":
        raise UsageError("engine.precision is 'fp16', which needs a GPU; use 'bf16' or 'fp32' on the CPU")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    devices, nodes = _processes(config)
    accelerator, _, number = config.accelerator.partition(":")
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=[int(number)] if number else devices,
            num_nodes=nodes,
            precision=_PRECISIONS[config.precision],
            strategy=_strategy(config, devices * nodes),
        )
        if config.precision == "fp16" and fabric.device.type == "cpu":
            raise UsageError("engine.precision is 'fp16', which needs a GPU; use 'bf16' or 'fp32' on the CPU")
        _join_restarted_group(fabric.device)
        fabric.launch()
    except UsageError:
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(
            f"engine.accelerator {config.accelerator!r} with {devices} devices cannot be used: {error}"
        ) from error
    obstacle = why_no_cuda_graph(config, fabric)
    if config.cuda_graph and obstacle is not None:
        raise UsageError(f"engine.cuda_graph is true, but {obstacle}; change that or leave the option out")
    if fabric.local_rank > 0 and not _started_by_others(fabric):
        _watch_parent()
    if fabric.global_rank > 0:
        _LOG.setLevel(logging.ERROR)  # every process comes to the same lines; one of them says them
    if fabric.world_size > 1:
        become_one_of_several()
        # Channels-last gradients of 1 x 1 convolutions: the strides differ in name only.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if config.deterministic:
        # cuBLAS reads it when it is first used; without it, deterministic algorithms are refused there.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    return fabric


def why_no_cuda_graph(config: EngineConfig, fabric: Fabric) -> str | None:
    """What keeps the training steps of ``config`` from being CUDA graphs; None where they can be."""
    if fabric.device.type != "cuda":
        return f"the device is {fabric.device}, and only CUDA has graphs"
    if fabric.world_size > 1:
        return f"{fabric.world_size} processes exchange gradients during the step"
    if config.compile:
        return "engine.compile is on"
    if config.precision == "fp16":
        return "engine.precision is 'fp16', whose scale of the loss is decided on the host"
    return None


def describe_engine(fabric: Fabric, config: EngineConfig) -> str:
    """Device, number format and threads, for people."""
    device = str(fabric.device)
    if fabric.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(fabric.device)})"
    threads = torch.get_num_threads()
    return ", ".join(
        [
            f"{fabric.world_size} x {device}" if fabric.world_size > 1 else device,
            resolve_engine(config).precision,
            f"{threads} thread{'s' if threads != 1 else ''}",
        ]
    )


def on_first_process(fabric: Fabric, work: Callable[[], T]) -> T:
    """``work()``, done by the first process alone; its result reaches all of them.

    Where ``work`` raises, the first process raises it and the others leave with exit code 0: they neither wait for
    one that has gone, nor is their end taken for a failure of its own.
    """
    if fabric.world_size == 1:
        return work()
    result: T | None = None
    failure: BaseException | None = None
    if fabric.is_global_zero:
        try:
            result = work()
        except BaseException as error:
            failure = error
    result, failed = fabric.broadcast((result, failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(0)
    return result  # type: ignore[return-value]


def on_every_process(fabric: Fabric, work: Callable[[], T]) -> T:
    """``work()``, done by every process, each its own part; where it raises in one, all end.

    The first process raises the error, whoever met it, and the others leave with exit code 0.
    """
    if fabric.world_size == 1:
        return work()
    result: T | None = None
    failure: BaseException | None = None
    try:
        result = work()
    except BaseException as error:
        failure = error
    failures = [found for found in gather_objects(failure, fabric.world_size) if found is not None]
    if failures and fabric.is_global_zero:
        raise failures[0]
    if failures:
        raise SystemExit(0)
    return result  # type: ignore[return-value]


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
        return ResourceError(f"out of memory: {advice}" + (f" ({error})" if str(error) else ""))
    return None


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise :class:`~lungkit.errors.ResourceError` where memory runs out in the block; then end the process group.

    A group that is alive when the interpreter exits has threads of its own, and now and then aborts the process.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        translated = as_resource_error(error)
        if translated is not None:
            raise translated from error
        raise
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _strategy(config: EngineConfig, processes: int) -> Any:
    if processes == 1:
        return "auto"
    if config.strategy == "ddp":
        return "ddp"
    if config.precision == "fp16":  # of engine.precision auto on a GPU without bf16
        raise UsageError("engine.strategy is 'fsdp', which scales no fp16 losses; use engine.precision fp32")
    from lightning_fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(shard_network, data_parallel_size=processes, tensor_parallel_size=1)


def _join_restarted_group(device: torch.device) -> None:
    """Where torchrun has started the processes again, have them meet under another name than before.

    They meet at a store that outlives them, and would call each other at the addresses of those that are gone.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or not torch.distributed.is_torchelastic_launched():
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world_size,
    )


def _started_by_others(fabric: Fabric) -> bool:
    """Whether torchrun, Slurm or the like started this process, and not the first process itself."""
    environment = getattr(fabric.strategy, "cluster_environment", None)
    return environment is None or bool(environment.creates_processes_externally)


def _watch_parent() -> None:
    """End this process within seconds of the one that started it: on its own it would wait for it without an end.

    A collective on GPUs notices a process that is gone after minutes only. The first process of a machine is watched by
    the others here, they are watched by it (Fabric), and torchrun watches all.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        _LOG.error("the first process has ended, so this one does")
        os._exit(1)

    threading.Thread(target=watch, name="lungkit-parent", daemon=True).start()


def _processes(config: EngineConfig) -> tuple[int, int]:
    """Processes per machine, and machines: torchrun has started them where it was used."""
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return config.devices, config.nodes
    per_machine, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if config.devices not in (1, per_machine):
        raise UsageError(
            f"engine.devices is {config.devices}, but torchrun started {per_machine} processes here; leave it out"
        )
    return per_machine, all_of_them // per_machine
