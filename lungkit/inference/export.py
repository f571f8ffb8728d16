r"""A trained network as a file that other programs run: a ``torch.export`` program or ONNX.

The file takes what the network takes, normalised patches, and gives logits. What leads from a scan to these patches and
from logits to a mask is JSON in its metadata, see :func:`describe_export`. In PyTorch::

    files = {"lungkit.json": ""}
    program = torch.export.load("model.pt2", extra_files=files)
    metadata = json.loads(files["lungkit.json"])
    logits = program.module()(patches)

and with a runtime for ONNX::

    session = onnxruntime.InferenceSession("model.onnx")
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["lungkit.json"])
    (logits,) = session.run(["logits"], {"image": patches})
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import lungkit
from lungkit._atomic import atomic_path
from lungkit.errors import LungkitError, UsageError
from lungkit.inference.sliding_window import device_of, evaluation_mode, first_output
from lungkit.inference.trained_model import TrainedModel
from lungkit.nn import UNet, build_model

METADATA = "lungkit.json"
"""Name of the metadata: an extra file of a .pt2, a metadata property of ONNX."""

TOLERANCE = 1e-4
"""How far the logits of a file may be from the network's, as a share of the largest."""

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
"""Suffix of the files of each format."""

_OPSET = 18
_MOST_ONNX_BYTES = 2**31 - 2**24  # a protobuf message holds 2 GiB, of which the graph needs a little


@dataclass(frozen=True)
class Export:
    """A file that was written, and by how much its logits differ from the network's, see :data:`TOLERANCE`."""

    path: Path
    format: str
    metadata: dict[str, Any]
    difference: float


def export_model(
    model: TrainedModel,
    path: str | os.PathLike[str],
    *,
    format: Literal["torch", "onnx"] | None = None,
    native_gate: bool = False,
) -> Export:
    """Write the network of ``model`` as a file that runs without lungkit.

    Attention gates become plain PyTorch operations of the same weights. Batch and size of the input are free: along
    each axis any multiple, from two times on, of the product of the network's strides; an axis along which the training
    patch is one such multiple or less stays at one. A network trained with deep supervision gives its logits at full
    resolution only. No path of this machine gets into the file.

    Before the file gets its name it is read back, and its logits are compared with the network's on random patches of
    two sizes and batch sizes; ONNX is run by onnxruntime, or by onnx's own evaluator where that is not installed.

    Args:
        model: what to export.
        path: ends with .pt2 or .onnx; an existing file is replaced.
        format: "torch" for a ``torch.export`` program, "onnx" for ONNX of opset 18; None follows the suffix.
        native_gate: keep the fused attention gate in a .pt2, which then needs ``import lungkit.ops`` to be loaded.

    Raises:
        UsageError: format, suffix and options do not fit together, the file cannot be written there, or the packages
            for ONNX are missing.
        LungkitError: the file's logits differ from the network's; nothing is written.
        ResourceError: the disk is full.

    Example:
        Write ONNX, and see how exact it is::

            model = TrainedModel.load("runs/phantom-attention-unet")
            print(export_model(model, "model.onnx").difference)
    """
    path = Path(path)
    chosen = _format(path, format)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: cannot be written; name a file in a folder that exists")
    if chosen == "onnx":
        _check_onnx(model, native_gate)
    network, axes = _network(model, native_gate), _axes(model)
    metadata = describe_export(model)
    with atomic_path(path) as temporary:
        program = _program(network, axes)
        write = _write_onnx if chosen == "onnx" else _write_torch
        run = write(program, axes, json.dumps(metadata, allow_nan=False), temporary)
        difference = max(_difference(model, run, batch, size) for batch, size in _probes(axes))
        if not difference <= TOLERANCE:
            raise LungkitError(
                f"{path}: not written, since its logits differ from the network's by {difference:.1g} of the largest "
                f"({TOLERANCE:g} is allowed); please report this together with what lungkit-info prints"
            )
    return Export(path, chosen, metadata, difference)


def describe_export(model: TrainedModel) -> dict[str, Any]:
    """The metadata of an exported file, plain values for JSON.

    ``input`` and ``output`` describe the tensors: an axis of ``shape`` is a size, or a name where the size is free;
    free sizes are multiples of ``multiple_of`` and at least twice that. The channels are those of ``channels``; with
    ``context_slices`` n all of slice z - n come first, up to those of z + n. ``preprocessing`` leads from a scan to the
    image, ``labels`` gives the value of each class in masks, in the order of the logits (one logit alone is that of the
    second class, by a sigmoid). With ``regions`` logit k is that of label k + 1 by its own sigmoid, and a mask is
    written region over region in their order. The other entries are those of :class:`TrainedModel`.
    """
    axes = _axes(model)
    extent = [axis.name if axis.is_free else axis.patch for axis in axes]
    network = cast(UNet, model.network)
    outputs = network.out_channels
    return {
        "lungkit": lungkit.__version__,
        "model": model.to_dict(),
        "input": {
            "name": "image",
            "type": "float32",
            "shape": ["batch", network.in_channels, *extent],
            "multiple_of": [axis.multiple for axis in axes],
        },
        "output": {
            "name": "logits",
            "type": "float32",
            "shape": ["batch", outputs, *extent],
            "probabilities": "sigmoid" if outputs == 1 or model.regions else "softmax",
        },
        "labels": model.labels,
        **(
            {"regions": [[name, list(values)] for name, values in model.regions.items()]}
            if model.regions
            else {}
        ),
        "channels": list(model.channels),
        "patch_size": list(model.patch_size),
        "context_slices": model.context_slices,
        "training_spacing_mm": model.spacing_range_mm,
        "preprocessing": model.preprocessing.to_dict(),
        "postprocessing": model.postprocessing.to_dict(),
    }


@dataclass(frozen=True)
class _Axis:
    """An axis of the input: ``multiple`` is the product of the strides, ``patch`` the training's, rounded up to it."""

    name: str
    multiple: int
    patch: int

    @property
    def is_free(self) -> bool:
        # At the coarsest level a size of 1 cannot be told apart from a fixed size while a network is traced.
        return self.patch >= 2 * self.multiple

    def times(self, count: int) -> int:
        return count * self.multiple if self.is_free else self.patch


def _axes(model: TrainedModel) -> list[_Axis]:
    multiples = cast(UNet, model.network).scales[-1]
    parts = zip("zyx"[-model.dims :], multiples, model.patch_size, strict=True)
    return [_Axis(name, multiple, -(-patch // multiple) * multiple) for name, multiple, patch in parts]


def _format(path: Path, asked: str | None) -> str:
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    found = by_suffix.get(path.suffix)
    if asked is not None and asked not in SUFFIXES:
        raise UsageError(f"format must be one of {', '.join(SUFFIXES)}, got {asked!r}")
    if found is None or asked not in (None, found):
        wanted = SUFFIXES[asked] if asked else " or ".join(SUFFIXES.values())
        raise UsageError(
            f"{path}: the name of {f'a file of format {asked}' if asked else 'the file'} must end with {wanted}"
        )
    return found


def _network(model: TrainedModel, native_gate: bool) -> UNet:
    """A copy on the CPU for evaluation, with the gates asked for."""
    config = dict(model.description["model"])
    if native_gate and not model.has_attention:
        raise UsageError(f"native_gate: {config['name']} has no attention gates; leave it out")
    if model.has_attention:
        config["gate"] = "auto" if native_gate else "reference"
    network = build_model(**config)
    network.load_state_dict(model.network.state_dict())
    return cast(UNet, network.eval().requires_grad_(False))


def _program(network: UNet, axes: list[_Axis]) -> ExportedProgram:
    free: dict[int, Any] = {0: Dim("batch", min=1)}
    for index, axis in enumerate(axes, start=2):
        if axis.is_free:
            count = Dim(f"{axis.name}_coarse", min=2)
            free[index] = count if axis.multiple == 1 else axis.multiple * count
    batch, size = _probes(axes)[1]
    example = torch.zeros(batch, network.in_channels, *size)
    program = torch.export.export(network, (example,), dynamic_shapes=(free,))
    for node in program.graph.nodes:  # where on this machine the source of each operation is
        node.meta.pop("stack_trace", None)
    return program


def _probes(axes: list[_Axis]) -> list[tuple[int, tuple[int, ...]]]:
    """Batch and size of the patches that are compared: the training's own, and one that differs in every free axis."""
    patch = tuple(axis.patch for axis in axes)
    small = (axis.times(count) for count, axis in enumerate(axes, start=2))
    other = [
        n + axis.multiple if axis.is_free and n == axis.patch else n
        for n, axis in zip(small, axes, strict=True)
    ]
    return [(1, patch), (2, tuple(other))]


def _difference(
    model: TrainedModel, run: Callable[[Tensor], Tensor], batch: int, size: tuple[int, ...]
) -> float:
    """Largest difference of the logits of random patches over the largest of the network's logits."""
    channels = cast(UNet, model.network).in_channels
    patches = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    with evaluation_mode(model.network.modules()):
        device = device_of(model.network, patches.device)
        expected = first_output(model.network(patches.to(device))).cpu()
        found = run(patches)
        if found.shape != expected.shape:
            return float("inf")
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _write_torch(
    program: ExportedProgram, axes: list[_Axis], metadata: str, path: Path
) -> Callable[[Tensor], Tensor]:
    content = io.BytesIO()  # torch's writer of files ends the process where the disk is full
    torch.export.save(program, content, extra_files={METADATA: metadata})
    path.write_bytes(content.getbuffer())
    return torch.export.load(path).module()


def _write_onnx(
    program: ExportedProgram, axes: list[_Axis], metadata: str, path: Path
) -> Callable[[Tensor], Tensor]:
    names = {0: "batch", **{index: axis.name for index, axis in enumerate(axes, 2) if axis.is_free}}
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits"],
            opset_version=_OPSET,
            dynamic_shapes=(names,),
            dynamo=True,
            verbose=False,
        )
    content: Any = cast(torch.onnx.ONNXProgram, exported).model_proto
    content.metadata_props.add(key=METADATA, value=metadata)
    path.write_bytes(content.SerializeToString())
    return _onnx_runner(path)


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(str(path))
    else:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        evaluator = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda patches: torch.from_numpy(evaluator.run(["logits"], {"image": patches.numpy()})[0])


def _check_onnx(model: TrainedModel, native_gate: bool) -> None:
    if native_gate:
        raise UsageError("native_gate: ONNX does not know the fused attention gate; leave it out")
    size = sum(value.nbytes for value in model.network.state_dict().values())
    if size > _MOST_ONNX_BYTES:
        raise UsageError(
            f"an ONNX file holds 2 GiB, but the weights of {model.name} take {size / 2**30:.1f}; use format torch"
        )
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"ONNX needs the package {name}, which is not installed: pip install 'lungkit[onnx]'"
            ) from error


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of packages that are not needed and of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
