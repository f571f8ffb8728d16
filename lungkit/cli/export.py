"""``lungkit-export``: write a trained network as a file that runs without lungkit."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import lungkit
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.errors import UsageError

_LOG = logging.getLogger("lungkit")

_EPILOG = """
The file takes normalised patches and gives logits; preprocessing, labels, patch size and the model's digest are JSON in
its metadata (lungkit.json). It is read back and compared with the network before it gets its name.
Examples:
  lungkit-export --model runs/NAME -o model.pt2      torch.export program: torch.export.load("model.pt2")
  lungkit-export --model runs/NAME -o model.onnx     ONNX; needs pip install 'lungkit[onnx]'
  lungkit-export --model runs/NAME --format monai -o bundle     a MONAI bundle: python -m monai.bundle run ...
A bundle is a folder for scans, not patches: monai.bundle runs it with lungkit, which must be installed beside MONAI.
Exit codes: 0 ok, 1 the file would differ from the network, 2 usage, 4 checkpoint, 5 disk full.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(
        prog="lungkit-export",
        description="Write a trained network as a torch.export program or as ONNX, checked and self-describing.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="RUN",
        help="run folder of lungkit-train (its best weights) or one checkpoint folder",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="ends with .pt2 or .onnx; of a MONAI bundle a new folder",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="cuda, cuda:1, ...: where the network runs that the file is compared with (default: cpu)",
    )
    parser.add_argument(
        "--format",
        choices=("torch", "onnx", "monai"),
        help="monai for a bundle (default: as the name of the file says)",
    )
    parser.add_argument(
        "--native-gate",
        action="store_true",
        help="keep the fused attention gate in a .pt2, which then loads only after import lungkit.ops "
        "(default: plain PyTorch operations of the same weights)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return run_command(lambda: _run(parser.parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    from lungkit.inference.export import export_model
    from lungkit.inference.predictor import usable_device
    from lungkit.inference.trained_model import TrainedModel

    if options.output.exists() and not options.overwrite:
        raise UsageError(
            f"--output {options.output} exists; name another file, or replace it with --overwrite"
        )
    if options.format == "monai":
        return _export_bundle(options)
    model = TrainedModel.load(options.model)
    model.network.to(usable_device(options.device))
    export = export_model(model, options.output, format=options.format, native_gate=options.native_gate)
    tensor = export.metadata["input"]
    _LOG.info(
        "%s: %.1f MiB, image (%s), free sizes in multiples of %s; logits differ from the network's by %.1g of the "
        "largest",
        export.path,
        export.path.stat().st_size / 2**20,
        ", ".join(map(str, tensor["shape"])),
        " x ".join(map(str, tensor["multiple_of"])),
        export.difference,
    )
    return 0


def _export_bundle(options: argparse.Namespace) -> int:
    from lungkit.inference.trained_model import TrainedModel, model_folders
    from lungkit.interop.monai_bundle import export_bundle

    if options.overwrite or options.native_gate:
        raise UsageError("--format monai writes a new folder; leave out --overwrite and --native-gate")
    models = [TrainedModel.load(folder) for folder in model_folders(options.model)]
    folder = export_bundle(models, options.output)
    _LOG.info(
        "%s: %d model%s; python -m monai.bundle run --bundle_root %s --config_file %s/configs/inference.json "
        "--meta_file %s/configs/metadata.json --dataset_dir SCANS --output_dir MASKS",
        folder,
        len(models),
        "" if len(models) == 1 else "s",
        folder,
        folder,
        folder,
    )
    return 0
