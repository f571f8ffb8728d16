"""Exported networks: the same logits, free sizes, metadata that suffice, nothing written where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from model_cases import save_model
from torch import nn

import lungkit
from lungkit.data import ChannelNormalisation, Preprocessing
from lungkit.errors import LungkitError, UsageError
from lungkit.inference import Postprocessing, TrainedModel
from lungkit.inference import export as exporting
from lungkit.inference.export import METADATA, export_model
from lungkit.nn import build_model

SMALL = {"features": (4, 8), "seed": 0}
# Network, training patch, and the first free size of the exported file.
CASES = {
    "unet 2D": ({"name": "unet", "dims": 2, "deep_supervision": True}, (16, 24), (4, 6)),
    "attention-unet 3D": ({"name": "attention-unet", "dims": 3, "deep_supervision": True}, (8, 16, 16), (4, 6, 8)),
    "thick slices": (
        {"name": "attention-unet", "dims": 3, "features": (4, 8, 8), "strides": ((1, 2, 2), (2, 2, 2)),
         "kernel_size": ((1, 3, 3), 3, 3), "gate_heads": 2, "norm": "batch", "upsampling": "interpolate"},
        (2, 16, 16), (2, 8, 12),
    ),
    "MONAI 2D": ({"name": "monai-attention-unet", "dims": 2, "in_channels": 3}, (16, 16), (4, 6)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder: Path, network: nn.Module, patch_size: tuple[int, ...], **description) -> TrainedModel:
    return TrainedModel.load(save_model(folder, network, patch_size=patch_size, **description))


def model_of(case: str, folder: Path) -> tuple[TrainedModel, tuple[int, ...]]:
    options, patch, size = CASES[case]
    network = build_model(**{**SMALL, **options})
    context = 1 if network.in_channels == 3 else 0
    return trained(folder / "m", network, patch, context_slices=context), size


@pytest.fixture
def model(tmp_path) -> TrainedModel:
    """The cheapest one to export."""
    return trained(tmp_path / "m", build_model("unet", dims=2, features=(2, 2), seed=0), (8, 8))


def read_pt2(path: Path):
    files = {METADATA: ""}
    program = torch.export.load(path, extra_files=files)
    return program.module(), json.loads(files[METADATA])


def assert_equal(run, network, size, batch=3):
    patches = torch.randn(batch, network.in_channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.eval()(patches)
    found = run(patches)
    assert isinstance(found, torch.Tensor) and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_a_torch_program_gives_the_networks_logits_at_other_sizes(tmp_path, case):
    model, size = model_of(case, tmp_path)
    export = export_model(model, tmp_path / "m.pt2")
    run, metadata = read_pt2(export.path)
    assert metadata == json.loads(json.dumps(export.metadata))
    assert export.difference < 1e-5
    assert_equal(run, model.network, size)


@pytest.mark.parametrize("case", ["attention-unet 3D", "MONAI 2D"])
def test_onnx_gives_the_networks_logits_at_other_sizes(tmp_path, case):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra 'onnx')")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'onnx')")
    model, size = model_of(case, tmp_path)
    export = export_model(model, tmp_path / "m.onnx")
    session = runtime.InferenceSession(export.path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map[METADATA]) == json.loads(
        json.dumps(export.metadata)
    )
    assert_equal(
        lambda patches: torch.from_numpy(session.run(["logits"], {"image": patches.numpy()})[0]),
        model.network,
        size,
    )
    content = onnx.load(export.path)
    onnx.checker.check_model(content, full_check=True)
    assert [(opset.domain, opset.version >= 18) for opset in content.opset_import] == [("", True)]
    assert str(Path(lungkit.__file__).parent).encode() not in export.path.read_bytes()


def test_without_onnxruntime_the_file_is_checked_by_onnx(tmp_path, model, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra 'onnx')")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_model(model, tmp_path / "m.onnx").difference < 1e-5


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(tmp_path, model, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "onnx", sys)  # only whether it can be imported counts
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"{missing}.*lungkit\[onnx\]"):
        export_model(model, tmp_path / "m.onnx")


def test_a_torch_program_needs_no_lungkit_and_holds_no_paths(tmp_path):
    model, _ = model_of("attention-unet 3D", tmp_path)
    path = export_model(model, tmp_path / "m.pt2").path
    script = (
        "import sys, torch; sys.modules['lungkit'] = None; "
        "program = torch.export.load(sys.argv[1]); print(tuple(program.module()(torch.zeros(1, 1, 4, 8, 6)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 2, 4, 8, 6)", done.stderr
    with zipfile.ZipFile(path) as archive:
        package = str(Path(lungkit.__file__).parent).encode()
        assert not any(package in archive.read(name) for name in archive.namelist())


def test_native_gate_keeps_the_op(tmp_path):
    model, size = model_of("attention-unet 3D", tmp_path)
    path = export_model(model, tmp_path / "m.pt2", native_gate=True).path
    program = torch.export.load(path)
    assert any("lungkit.attention_gate" in str(node.target) for node in program.graph.nodes)
    assert_equal(program.module(), model.network, size)


def test_metadata_hold_what_prediction_needs(tmp_path):
    preprocessing = Preprocessing(
        (ChannelNormalisation((-900.0, 300.0), -400.0, 250.0, "HU"),), {0: 0, 7: 1}, (2.0, 0.8, 0.8)
    )
    spacing = {"min": (2.0, 0.6, 0.6), "median": (2.5, 0.7, 0.7), "max": (3.0, 0.9, 0.9)}
    network = build_model("unet", dims=2, in_channels=3, features=(2, 2), seed=0)
    model = trained(
        tmp_path / "m",
        network,
        (8, 10),
        preprocessing=preprocessing,
        label_values={"air": 0, "tumour": 7},
        context_slices=1,
        training_spacing_mm=spacing,
        postprocessing=Postprocessing(threshold=0.3).to_dict(),
    )
    metadata = exporting.describe_export(model)
    plain = json.loads(json.dumps(metadata))
    assert Preprocessing.from_dict(plain["preprocessing"]) == preprocessing
    assert Postprocessing.from_dict(plain["postprocessing"]) == Postprocessing(threshold=0.3)
    assert list(plain["labels"].items()) == [("air", 0), ("tumour", 7)]
    assert plain["training_spacing_mm"]["median"] == [2.5, 0.7, 0.7]
    assert plain["model"]["sha256"] == model.digest and plain["lungkit"] == lungkit.__version__
    assert (plain["channels"], plain["context_slices"], plain["patch_size"]) == (["CT"], 1, [8, 10])
    assert plain["input"]["shape"] == ["batch", 3, "y", "x"] and plain["input"]["multiple_of"] == [2, 2]
    assert (
        plain["output"]["shape"] == ["batch", 2, "y", "x"] and plain["output"]["probabilities"] == "softmax"
    )


def test_an_axis_along_which_the_patch_is_a_single_coarse_voxel_is_fixed(tmp_path):
    model, _ = model_of("thick slices", tmp_path)
    assert exporting.describe_export(model)["input"]["shape"] == ["batch", 1, 2, "y", "x"]


def test_another_output_than_the_networks_is_an_error_and_no_file(tmp_path, model, monkeypatch):
    other = build_model("unet", dims=2, features=(2, 2), seed=1).eval()
    monkeypatch.setattr(exporting, "_network", lambda *_: other)
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(LungkitError, match="differ from the network's"):
        export_model(model, tmp_path / "m.pt2")
    assert (tmp_path / "m.pt2").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.pt2"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.pt2", {"format": "onnx"}, "must end with .onnx"),
        ("m.onnx", {"format": "torch"}, "must end with .pt2"),
        ("m.pth", {}, "must end with .pt2 or .onnx"),
        ("m.pt2", {"format": "tensorrt"}, "torch, onnx"),
        ("none/m.pt2", {}, "a folder that exists"),
        ("m.onnx", {"native_gate": True}, "does not know the fused attention gate"),
        ("m.pt2", {"native_gate": True}, "unet has no attention gates"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, model, name, options, message):
    with pytest.raises(UsageError, match=message):
        export_model(model, tmp_path / name, **options)


def test_onnx_refuses_weights_that_its_files_cannot_hold(tmp_path, model, monkeypatch):
    monkeypatch.setattr(exporting, "_MOST_ONNX_BYTES", 100)
    with pytest.raises(UsageError, match="2 GiB"):
        export_model(model, tmp_path / "m.onnx")


_FULL_DISK = """
import resource, signal, sys
from lungkit.errors import ResourceError
from lungkit.inference import TrainedModel
from lungkit.inference.export import export_model

model = TrainedModel.load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    export_model(model, sys.argv[2])
except ResourceError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files, which only Linux does so")
def test_a_full_disk_leaves_no_file(tmp_path, model):
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(model.path), str(tmp_path / "m.pt2")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "m.pt2: not written" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_a_usage_error(model):
    with pytest.raises(UsageError, match="cannot be written"):
        export_model(model, "/proc/m.pt2")
