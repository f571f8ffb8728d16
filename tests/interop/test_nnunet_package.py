"""Against nnU-Net itself, where it is installed: networks, logits in fp32, masks, the trainer and its loss.

nnU-Net adds logits up in half precision; for the comparison of logits it is made to use fp32.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_cases import write_nnunet_model

import lungkit
from lungkit.data import Volume, make_phantom
from lungkit.data.phantom import write_phantom_dataset
from lungkit.inference.scan_scores import ensemble_scores
from lungkit.interop import import_nnunet

pytest.importorskip("nnunetv2")
pytest.importorskip("dynamic_network_architectures")


class _Float(types.ModuleType):
    """torch, but where half is asked for it gives float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float32 if name == "half" else getattr(torch, name)


def predictor_of(folder: Path, folds: tuple[int, ...], *, mirror: bool) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=mirror,
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    return predictor


def scan(spacing: tuple[float, float, float]) -> Volume:
    from scipy.ndimage import gaussian_filter

    array = gaussian_filter(np.random.default_rng(0).normal(size=(22, 26, 12)), 1.5)
    array = np.round(array / array.std() * 300 - 350).astype(np.int16)
    array[:2] = 0
    return Volume(array, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))


@pytest.mark.parametrize(
    ("dims", "residual", "spacing", "folds"),
    [
        (2, False, (1.0, 1.0, 2.5), (0, 1)),
        (2, True, (0.8, 0.9, 2.0), (0,)),
        (3, False, (0.8, 0.9, 2.0), (0, 1)),
        (3, True, (0.7, 0.7, 3.5), (0,)),
    ],
)
def test_logits_and_masks_are_nnunets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dims: int,
    residual: bool,
    spacing: tuple[float, float, float],
    folds: tuple[int, ...],
) -> None:
    folder = write_nnunet_model(tmp_path, dims=dims, residual=residual, folds=[str(fold) for fold in folds])
    # Half cannot tell some voxels apart that random weights leave undecided, least of all in the corners, where weights
    # are smaller than half resolves.
    same_in_half = check_agreement(folder, tmp_path / "run", scan(spacing), folds, monkeypatch)
    assert same_in_half > 0.99


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("planner", "plans"),
    [("ExperimentPlanner", "nnUNetPlans"), ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans")],
)
def test_what_nnunet_trains_with_the_fused_loss_predicts_the_same_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planner: str, plans: str
) -> None:
    import lungkit.interop.nnunet_trainer as folder_of_trainers

    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "short.py").write_text(SHORT_TRAINER)
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = {
        **os.environ,
        **{name: str(path) for name, path in folders.items()},
        "nnUNet_extTrainer": os.pathsep.join([str(folder_of_trainers.__path__[0]), str(trainers)]),
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }

    def nnunet(command: str) -> None:
        program, *options = command.split()
        subprocess.run([Path(sys.executable).parent / program, *options], env=environment, check=True)

    dataset = folders["nnUNet_raw"] / "Dataset001_Phantom"
    write_phantom_dataset(dataset, cases=5, shape=(10, 64, 64), seed=5, labels="organs")
    nnunet(f"nnUNetv2_plan_and_preprocess -d 1 -pl {planner} -c 2d -np 1 -npfp 1")
    narrow = folders["nnUNet_preprocessed"] / dataset.name / f"{plans}.json"
    content = json.loads(narrow.read_text())
    settings = content["configurations"]["2d"]
    widths = settings["architecture"]["arch_kwargs"]["features_per_stage"]
    settings["architecture"]["arch_kwargs"]["features_per_stage"] = [min(width // 4, 32) for width in widths]
    settings["batch_size"] = 2
    narrow.write_text(json.dumps(content))
    nnunet(f"nnUNetv2_train 1 2d 0 -p {plans} -tr nnUNetTrainerLungkitShort -device cpu")

    monkeypatch.setenv("nnUNet_extTrainer", environment["nnUNet_extTrainer"])
    phantom = make_phantom(7, shape=(12, 64, 64))
    volume = Volume(phantom.image.transpose(2, 1, 0), np.diag([-4.0, -4.2, 6.0, 1.0]))
    model = folders["nnUNet_results"] / dataset.name / f"nnUNetTrainerLungkitShort__{plans}__2d"
    assert check_agreement(model, tmp_path / "run", volume, (0,), monkeypatch) > 0.999


SHORT_TRAINER = """
import torch
from lungkit.interop.nnunet_trainer.lungkit_trainer import nnUNetTrainerLungkit

class nnUNetTrainerLungkitShort(nnUNetTrainerLungkit):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 25, 1
"""


def check_agreement(
    folder: Path, run: Path, volume: Volume, folds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> float:
    """Logits and masks of a model in nnU-Net and here; the share of voxels equal to nnU-Net's in half precision."""
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    import_nnunet(folder, run)
    ours = lungkit.Predictor.from_run(run, device="cpu")
    theirs = predictor_of(folder, folds, mirror=True)
    array = volume.array.transpose(2, 1, 0)[None].astype(np.float32)
    properties = {"spacing": list(volume.spacing_mm[::-1])}
    in_half = theirs.predict_single_npy_array(array, dict(properties))
    found = ours(volume).mask.transpose(2, 1, 0)

    gaussian = predict_from_raw_data.compute_gaussian
    monkeypatch.setattr(predict_from_raw_data, "torch", _Float("torch"))
    exact = lambda *args, **options: gaussian(*args, **{**options, "dtype": torch.float32})  # noqa: E731
    exact.cache_clear = gaussian.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(predict_from_raw_data, "compute_gaussian", exact)
    settings = theirs.configuration_manager
    image, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        array, None, properties, theirs.plans_manager, settings, theirs.dataset_json
    )
    logits = theirs.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    axes = theirs.plans_manager.transpose_forward
    own = [properties["spacing"][axis] for axis in axes]
    expected = settings.resampling_fn_probabilities(
        logits.clone(),
        properties["shape_after_cropping_and_before_resampling"],
        [own[0], *settings.spacing][-3:],
        own,
    )
    parts = ensemble_scores(ours.models, [volume], torch.device("cpu"), "fp32", mirror=True, as_logits=True)
    scores = torch.cat([part.clone() for _, _, part in parts], 1)
    place = tuple(slice(*side) for side in properties["bbox_used_for_cropping"])
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(scores[(slice(None), *place)], expected, rtol=0, atol=1e-4)
    mask = np.zeros_like(found)
    mask.transpose(axes)[place] = expected.argmax(0)
    labels = np.unique(mask)
    assert len(labels) > 1
    for label in labels:
        both = (found == label).sum() + (mask == label).sum()
        assert 2 * ((found == label) & (mask == label)).sum() / both > 0.999
    return float((found == in_half).mean())


@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("batch", [False, True])
def test_the_trainer_is_found_and_its_loss_is_nnunets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: bool, ignore: int | None
) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import lungkit.interop.nnunet_trainer as folder_of_trainers

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv("nnUNet_extTrainer", str(folder_of_trainers.__path__[0]))
    found = recursive_find_trainer_class_by_name("nnUNetTrainerLungkit")
    labels = {"background": 0, "lung": 1, "tumour": 2, **({"ignore": ignore} if ignore else {})}
    folder = write_nnunet_model(tmp_path, labels=labels, configuration={"batch_dice": batch})
    init = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["init_args"]
    losses = []
    for kind in (nnUNetTrainer, found):
        plans = {**copy.deepcopy(init["plans"]), "continue_training": False}
        trainer = kind(plans, "2d", 0, init["dataset_json"], device=torch.device("cpu"))
        losses.append(trainer._build_loss())
    torch.manual_seed(0)
    sizes = [(16, 16), (8, 8), (8, 4)][: len(losses[0].weight_factors)]
    targets = [torch.randint(0, 4 if ignore else 3, (2, 1, *size)).float() for size in sizes]
    results = []
    for loss in losses:
        torch.manual_seed(1)
        outputs = [torch.randn(2, 3, *size, requires_grad=True) for size in sizes]
        value = loss(outputs, targets)
        value.backward()
        results.append([value, *(output.grad for output in outputs if output.grad is not None)])
    for expected, own in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert type(losses[1].loss).__name__ == "FusedDiceCE"
