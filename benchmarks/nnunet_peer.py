"""nnU-Net for nodule_peers.py: its own plan, trainer and predictor, in the environment that has nnunetv2.

The calling half needs no nnunetv2. The other half is this file as a program (``PYTHON nnunet_peer.py SETTINGS.json``):
it takes nnUNetTrainer's network, loss, augmentation and steps, and lets minutes take the place of its 1000 epochs. The
learning rate is that of its PolyLRScheduler at the share of the minutes used, set before every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

DATASET = "Dataset001_Nodules"
NOTE = "{mirroring}; the learning rate follows its polynomial over the minutes in place of epochs"


def train_nnunet(
    options: argparse.Namespace, val: Sequence[str], masks: Path, dice_of: Callable[[Path], float]
) -> dict[str, Any]:
    """Plan and preprocess where that is not done yet, train, and predict into ``masks``."""
    folder = (options.nnunet_folder or options.output / "nnunet").resolve()
    results = options.output.resolve() / "results"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(results),
        "nnUNet_n_proc_DA": str(options.workers),
    }
    splits = folder / "preprocessed" / DATASET / "splits_final.json"
    if not splits.exists():
        raw = folder / "raw" / DATASET
        raw.mkdir(parents=True, exist_ok=True)
        for name in ("imagesTr", "labelsTr", "dataset.json"):
            if not (raw / name).exists():
                (raw / name).symlink_to((options.data / name).resolve())
        planner = options.nnunet_python.with_name("nnUNetv2_plan_and_preprocess")
        command = [planner, "-d", "1", "-c", "2d", "-npfp", "1", "-np", "1", "--no_pbar"]
        subprocess.run(command, env=environment, check=True)
        # Written last: where it lies, preprocessing was finished.
        splits.write_bytes((options.data / "splits_final.json").read_bytes())
    settings = {
        "preprocessed": str(splits.parent),
        "images": str((options.data / "imagesTr").resolve()),
        "cases": list(val),
        "fold": options.fold,
        "seconds": 60 * options.minutes,
        "checkpoints": options.checkpoints,
        "batch_size": options.batch_size,
        "mirrored": not options.no_mirroring,
        "masks": str(masks.resolve()),
        "curve": str(options.output.resolve() / "curve"),
        "result": str(options.output.resolve() / "trained.json"),
    }
    written = options.output / "settings.json"
    written.write_text(json.dumps(settings), encoding="utf-8")
    subprocess.run([options.nnunet_python, __file__, written], env=environment, check=True)
    found = json.loads(Path(settings["result"]).read_text(encoding="utf-8"))
    curve = [(round(seconds, 2), dice_of(Path(at))) for seconds, at in found.pop("checkpoints")]
    mirroring = "the masks at the end are those with mirroring, its predictor's default, the curve's without"
    note = NOTE.format(mirroring="no mirroring" if options.no_mirroring else mirroring)
    return {"tool": "nnU-Net", **found, "workers": options.workers, "curve": curve, "note": note}


def run_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """Train until the time is up and predict the held-out cases on the way and at the end."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    preprocessed = Path(settings["preprocessed"])
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["continue_training"] = False
    plan = plans["configurations"]["2d"]
    planned = plan["batch_size"]
    plan["batch_size"] = settings["batch_size"] or planned
    described = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
    trainer = nnUNetTrainer(plans, "2d", settings["fold"], described, device=torch.device("cpu"))
    trainer.on_train_start()
    trainer.network.train()
    budget, seconds, steps = settings["seconds"], 0.0, 0
    checkpoints: list[tuple[float, str]] = []
    while seconds < budget:
        started = time.perf_counter()
        trainer.lr_scheduler.step(trainer.num_epochs * seconds / budget)
        trainer.train_step(next(trainer.dataloader_train))
        seconds, steps = seconds + time.perf_counter() - started, steps + 1
        if seconds >= min(budget, budget * (len(checkpoints) + 1) / settings["checkpoints"]):
            sys.stdout.write(f"{seconds:.0f} s, step {steps}: predicting\n")
            sys.stdout.flush()
            target = Path(settings["curve"], f"{len(checkpoints) + 1:02d}")
            predict(trainer, settings, target, mirrored=False)
            checkpoints.append((seconds, str(target)))
    if settings["mirrored"]:
        predict(trainer, settings, Path(settings["masks"]), mirrored=True)
    else:
        shutil.copytree(target, settings["masks"], dirs_exist_ok=True)
    trainer.on_train_end()
    name = type(trainer.network).__name__
    if plan["batch_size"] != planned:
        name += f" (its plan's batch: {planned})"
    return {
        "network": f"{name}, 2D, single slices",
        "versions": {name: metadata.version(name) for name in ("nnunetv2", "torch")},
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "patch_size": plan["patch_size"],
        "batch_size": plan["batch_size"],
        "batch_size_of_plan": planned,
        "steps": steps,
        "seconds": round(seconds, 2),
        "seconds_per_step": seconds / steps,
        "checkpoints": checkpoints,
    }


def predict(trainer: Any, settings: dict[str, Any], target: Path, *, mirrored: bool) -> None:
    """Masks of the held-out cases by nnU-Net's own predictor."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    target.mkdir(parents=True, exist_ok=True)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=mirrored, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    scans = [[str(Path(settings["images"], f"{case}_0000.nii.gz"))] for case in settings["cases"]]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        predictor.predict_from_files_sequential(scans, [str(target / case) for case in settings["cases"]])
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["result"]).write_text(json.dumps(run_trainer(asked), indent=1) + "\n", encoding="utf-8")
