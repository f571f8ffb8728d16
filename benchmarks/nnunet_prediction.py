"""Time and peak memory of one scan: nnU-Net's own predictor and lungkit, with one model, each in its own process.

Needs nnU-Net beside lungkit, a trained model of it and the run that ``lungkit-import nnunet`` made of that model::

    python benchmarks/nnunet_prediction.py MODEL RUN --shape 512 512 300 --spacing 0.75 0.75 1.0

The scan is a phantom on a fine grid. Seconds are wall and CPU; memory is the process's largest resident size, and its
share beyond that before the scan was there. Without mirror images unless ``--tta`` is given.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from lungkit.data import Volume, make_phantom
from lungkit.data.resampling import resample_nearest


def main() -> None:
    parser = argparse.ArgumentParser(description="nnU-Net and lungkit on one scan")
    parser.add_argument("model")
    parser.add_argument("run")
    parser.add_argument("--shape", nargs=3, type=int, default=(512, 512, 300))
    parser.add_argument("--spacing", nargs=3, type=float, default=(0.75, 0.75, 1.0))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tta", action="store_true")
    parser.add_argument("--only", choices=("nnunet", "lungkit"), help=argparse.SUPPRESS)
    parser.add_argument("--mask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return
    masks = []
    for program in ("nnunet", "lungkit"):
        path = f"{options.run.rstrip('/')}-{program}.npy"
        command = [sys.executable, "-W", "ignore", *sys.argv, "--only", program, "--mask", path]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        sys.stdout.write(f"{program} {lines[-1]}\n")
        sys.stdout.flush()
        masks.append(np.load(path))
    ours, theirs = masks
    for label in np.unique(ours):
        both = (ours == label).sum() + (theirs == label).sum()
        dice = 2 * float(((ours == label) & (theirs == label)).sum() / both)
        sys.stdout.write(f"label {label}: Dice {dice:.6f}\n")


def measure(options: argparse.Namespace) -> dict[str, float]:
    phantom = make_phantom(7, shape=(60, 128, 128))
    x, y, z = options.spacing
    array = resample_nearest(phantom.image.astype(np.int16), tuple(options.shape[::-1])).transpose(2, 1, 0)
    volume = Volume(np.asfortranarray(array), np.diag([-x, -y, z, 1.0]))
    predict = nnunet(options) if options.only == "nnunet" else lungkit_of(options)
    before = peak_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    mask = predict(volume)
    row = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_mib": peak_mib()}
    np.save(options.mask, mask)
    return {name: round(value, 1) for name, value in {**row, "more_mib": row["peak_mib"] - before}.items()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def nnunet(options: argparse.Namespace):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=options.tta,
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(options.model, None, "checkpoint_final.pth")

    def predict(volume: Volume) -> np.ndarray:
        image = volume.array.transpose(2, 1, 0)[None].astype(np.float32)
        properties = {"spacing": list(volume.spacing_mm[::-1])}
        return predictor.predict_single_npy_array(image, properties).transpose(2, 1, 0)

    return predict


def lungkit_of(options: argparse.Namespace):
    import lungkit

    lungkit.keep_freed_memory()
    predictor = lungkit.Predictor.from_run(options.run, device="cpu", mirror=options.tta)
    return lambda volume: predictor(volume).mask


if __name__ == "__main__":
    main()
