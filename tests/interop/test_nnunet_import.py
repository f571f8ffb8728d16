"""Models of nnU-Net become runs that predict as nnU-Net does; what cannot be imported is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_cases import write_nnunet_model
from nnunet_oracle import network_logits, predict

import lungkit
from lungkit.cli.import_data import main
from lungkit.cli.predict import main as predict_command
from lungkit.data import Volume, read_volume
from lungkit.data.geometry import orient
from lungkit.data.preprocessing import ScanSlices
from lungkit.data.scan_statistics import cropped, nonzero_box
from lungkit.data.volume import write_nifti
from lungkit.errors import CheckpointError, UnsupportedModelError, UsageError
from lungkit.inference import TrainedModel
from lungkit.inference.scan_scores import ensemble_scores
from lungkit.interop import import_nnunet


def scan(spacing: tuple[float, float, float], *, zeros: bool = False, channels: int = 1) -> list[Volume]:
    """Smooth noise in HU, its axes stored as ITK writes them (x to the left, y to the back)."""
    from scipy.ndimage import gaussian_filter

    volumes = []
    for seed in range(channels):
        array = gaussian_filter(np.random.default_rng(seed).normal(size=(22, 26, 12)), 1.5)
        array = np.round(array / array.std() * 300 - 350).astype(np.int16)
        if zeros:
            array[:4], array[:, -5:], array[..., :2], array[10, 10, 6] = 0, 0, 0, 0
        volumes.append(Volume(array, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])))
    return volumes


def logits_of(predictor: lungkit.Predictor, volumes: list[Volume]) -> torch.Tensor:
    parts = ensemble_scores(
        predictor.models, volumes, torch.device("cpu"), "fp32", mirror=predictor.mirror, as_logits=True
    )
    return torch.cat([part.clone() for _, _, part in parts], 1)


def check_against_oracle(folder: Path, run: Path, volumes: list[Volume], *, mirror: bool = False) -> None:
    predictor = lungkit.Predictor.from_run(run, device="cpu", mirror=mirror)
    model, first = predictor.models[0], volumes[0]
    box = nonzero_box(volumes)
    inner = [cropped(volume, box) for volume in volumes]
    geometry = model.geometry_of(inner[0])
    image = ScanSlices(inner, model.preprocessing, geometry).read(0, geometry.shape[0])
    stacked = np.stack([volume.array.transpose(2, 1, 0) for volume in volumes])
    expected_image, expected = predict(folder, stacked, first.spacing_mm[::-1], mirror=mirror)
    np.testing.assert_allclose(image, expected_image, rtol=2e-6, atol=2e-5)
    whole = model.own_grid_of(first)
    mask = np.zeros(first.array.shape, np.uint8)
    orient(mask[box], model.own_grid_of(inner[0]))[...] = expected.argmax(0)
    found = logits_of(predictor, volumes)
    place = orient(np.arange(mask.size).reshape(mask.shape), whole)
    corner = orient(np.arange(mask.size).reshape(mask.shape)[box], model.own_grid_of(inner[0]))
    inside = np.isin(place, corner)
    np.testing.assert_allclose(
        found.numpy()[:, inside], expected.reshape(len(expected), -1), rtol=0, atol=1e-4
    )
    assert (predictor(volumes).mask == mask).mean() > 0.999 and 0 < mask.mean() < 1


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_network_gives_nnunets_logits(tmp_path: Path, dims: int, residual: bool) -> None:
    folder = write_nnunet_model(tmp_path, dims=dims, residual=residual)
    content = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    import_nnunet(folder, tmp_path / "run")
    model = TrainedModel.load(tmp_path / "run")
    (settings,) = content["init_args"]["plans"]["configurations"].values()
    arch = settings["architecture"]["arch_kwargs"]
    x = torch.randn(2, 1, *[8, 16, 16][-dims:])
    with torch.no_grad():
        found = model.network(x)
    torch.testing.assert_close(
        found, network_logits(content["network_weights"], arch, x), rtol=1e-4, atol=1e-4
    )
    assert (
        model.labels == {"background": 0, "tumour": 1} and model.description["source"]["program"] == "nnU-Net"
    )


@pytest.mark.parametrize(
    "spacing",
    [(1.0, 1.0, 2.5), (0.8, 0.9, 2.0), (0.7, 0.7, 3.5)],
    ids=["training's", "finer", "slice by slice"],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_scan_is_predicted_as_by_nnunet(
    tmp_path: Path, dims: int, spacing: tuple[float, float, float]
) -> None:
    folder = write_nnunet_model(tmp_path, dims=dims)
    import_nnunet(folder, tmp_path / "run")
    check_against_oracle(folder, tmp_path / "run", scan(spacing))


def test_mirror_images_are_averaged_unless_told_otherwise(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path)
    import_nnunet(folder, tmp_path / "run")
    assert lungkit.Predictor.from_run(tmp_path / "run", device="cpu").mirror
    check_against_oracle(folder, tmp_path / "run", scan((1.0, 1.0, 2.5)), mirror=True)


def test_a_model_trained_without_mirror_images_is_used_without(tmp_path: Path) -> None:
    import_nnunet(write_nnunet_model(tmp_path, mirror_axes=None), tmp_path / "run")
    assert not lungkit.Predictor.from_run(tmp_path / "run", device="cpu").mirror


@pytest.mark.parametrize("use_mask", [False, True])
def test_every_normalisation_and_the_crop_of_zeros(tmp_path: Path, use_mask: bool) -> None:
    schemes = ["ZScoreNormalization", "RescaleTo01Normalization", "NoNormalization", "RGBTo01Normalization"]
    folder = write_nnunet_model(
        tmp_path,
        channels={str(index): f"MR{index}" for index in range(4)},
        configuration={
            "normalization_schemes": schemes,
            "use_mask_for_norm": [use_mask, False, False, False],
        },
    )
    import_nnunet(folder, tmp_path / "run")
    check_against_oracle(folder, tmp_path / "run", scan((0.8, 0.9, 2.0), zeros=True, channels=4))


def test_transposed_axes(tmp_path: Path) -> None:
    plans = {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    folder = write_nnunet_model(tmp_path, dims=3, plans=plans, spacing=[1.2, 2.5, 1.0])
    import_nnunet(folder, tmp_path / "run")
    check_against_oracle(folder, tmp_path / "run", scan((0.9, 1.0, 2.2), zeros=True))


def test_folds_are_the_mean_of_their_logits(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path, folds=("0", "1", "all"))
    assert import_nnunet(folder, tmp_path / "run").folds == ("fold_0", "fold_1")
    volumes = scan((0.8, 0.9, 2.0))
    stacked = np.stack([volume.array.transpose(2, 1, 0) for volume in volumes])
    expected = np.mean([predict(folder, stacked, (2.0, 0.9, 0.8), fold=fold)[1] for fold in "01"], axis=0)
    predictor = lungkit.Predictor.from_run(tmp_path / "run", device="cpu", mirror=False)
    np.testing.assert_allclose(logits_of(predictor, volumes), expected, rtol=0, atol=1e-4)
    probabilities = predictor(volumes, probabilities=True).probabilities["tumour"].transpose(2, 1, 0)
    np.testing.assert_allclose(probabilities, torch.from_numpy(expected).softmax(0)[1], rtol=0, atol=1e-4)


def test_regions_are_written_in_nnunets_order(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "masses": [2, 3], "core": [2], "ignore": 4}
    folder = write_nnunet_model(tmp_path, labels=labels, regions_class_order=[1, 3, 2])
    import_nnunet(folder, tmp_path / "run")
    volumes = scan((1.0, 1.0, 2.5))
    _, logits = predict(folder, volumes[0].array.transpose(2, 1, 0)[None], (2.5, 1.0, 1.0))
    expected = np.zeros(logits.shape[1:], np.uint8)
    for region, value in zip(logits, (1, 3, 2), strict=True):
        expected[region > 0] = value
    predictor = lungkit.Predictor.from_run(tmp_path / "run", device="cpu", mirror=False)
    assert (predictor(volumes).mask.transpose(2, 1, 0) == expected).mean() > 0.999
    assert set(np.unique(expected)) == {0, 1, 2, 3}


def test_plans_of_the_first_versions_are_read(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path, arch={"features_per_stage": [4, 8, 8]})
    plans = folder / "plans.json"
    content = json.loads(plans.read_text())
    settings = content["configurations"]["2d"]
    arch = settings.pop("architecture")["arch_kwargs"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": arch["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arch["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": arch["kernel_sizes"],
        "pool_op_kernel_sizes": arch["strides"],
    }
    content["configurations"] = {"2d": {"inherits_from": "base"}, "base": settings}
    plans.write_text(json.dumps(content))
    import_nnunet(folder, tmp_path / "run")
    assert TrainedModel.load(tmp_path / "run").network.config["features"] == [4, 8, 8]


def test_pickled_code_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    folder = write_nnunet_model(tmp_path)
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "logging": Bomb()}, path)
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        import_nnunet(folder, tmp_path / "run")
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="checkpoint_final"):
        import_nnunet(folder, tmp_path / "run")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configuration": {"previous_stage": "3d_lowres"}}, "second stage of a cascade"),
        ({"configuration": {"normalization_schemes": ["MyNormalization"]}}, "normalisation MyNormalization"),
        ({"configuration": {"preprocessor_name": "Mine"}}, "preprocessor Mine"),
        ({"configuration": {"resampling_fn_data": "resample_torch_fornnunet"}}, "resample_torch_fornnunet"),
        ({"plans": {"image_reader_writer": "NaturalImage2DIO"}}, "image reader NaturalImage2DIO"),
        ({"arch": {"pool": "max"}}, "pool = 'max'"),
        ({"arch": {"attention": True}}, "unknown option attention"),
        ({"arch": {"nonlin": "torch.nn.GELU"}}, "activation torch.nn.GELU"),
        ({"arch": {"norm_op": "torch.nn.BatchNorm2d"}}, "norm torch.nn.BatchNorm2d"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = write_nnunet_model(tmp_path, **options)
    with pytest.raises(UnsupportedModelError, match=message):
        import_nnunet(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_architecture_is_named(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path)
    plans = folder / "plans.json"
    plans.write_text(plans.read_text().replace("unet.PlainConvUNet", "primus.Primus"))
    with pytest.raises(UnsupportedModelError, match="architecture Primus"):
        import_nnunet(folder, tmp_path / "run")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path)
    plans = folder / "plans.json"
    plans.write_text(
        plans.read_text().replace('"features_per_stage": [4, 6, 6]', '"features_per_stage": [4, 6, 8]')
    )
    with pytest.raises(CheckpointError, match="of another shape"):
        import_nnunet(folder, tmp_path / "run")


def test_missing_files_and_folds_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"plans\.json"):
        import_nnunet(tmp_path, tmp_path / "run")
    folder = write_nnunet_model(tmp_path)
    with pytest.raises(UsageError, match="fold_3"):
        import_nnunet(folder, tmp_path / "run", folds=["3"])
    with pytest.raises(CheckpointError, match=r"checkpoint_best\.pth"):
        import_nnunet(folder, tmp_path / "run", checkpoint="best")
    with pytest.raises(UsageError, match="exists"):
        import_nnunet(folder, tmp_path)


def test_the_command_imports_what_the_next_one_predicts_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_nnunet_model(tmp_path)
    assert main(["nnunet", str(folder), "-o", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folds"] == ["fold_0"]
    volume = scan((1.0, 1.0, 2.5))[0]
    write_nifti(tmp_path / "scan.nii.gz", volume.array, volume.affine)
    arguments = ["-i", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")]
    assert predict_command([*arguments, "--model", str(tmp_path / "run"), "--device", "cpu", "--no-tta"]) == 0
    expected = lungkit.Predictor.from_run(tmp_path / "run", device="cpu", mirror=False)(volume).mask
    assert (read_volume(tmp_path / "mask.nii.gz").array == expected).all()
