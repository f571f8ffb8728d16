"""A training loop of your own on lungkit's parts; writes training_loop.png.

Dataset, preprocessing, cache, patches, augmentation and network are lungkit's; the loss is arithmetic on the sums of
the fused op, and the loop is plain PyTorch. It trains for some seconds and says what it reached on a held-out slice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from lungkit.data import (
    AugmentConfig,
    Augmenter,
    CachedCase,
    CaseCache,
    PatchSampler,
    fingerprint_dataset,
    open_dataset,
    plan_preprocessing,
    write_phantom_dataset,
)
from lungkit.inference import predict_label
from lungkit.metrics import measure_case
from lungkit.nn import AttentionUNet
from lungkit.ops.dice_ce import Statistics, dice_ce_statistics

STEPS, BATCH, PATCH = 60, 8, (64, 64)


def tversky_ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Tversky's overlap with false negatives that weigh more, and the cross-entropy, from one pass."""
    sums = Statistics(*dice_ce_statistics(logits, labels).sum(1, keepdim=True))  # of the whole batch
    overlap, predicted, true = (s[:, 1:] for s in (sums.intersection, sums.prediction, sums.label))
    tversky = overlap / (overlap + 0.3 * (predicted - overlap) + 0.7 * (true - overlap) + 1e-5)
    return (1 - tversky).mean() + sums.cross_entropy.sum() / sums.voxels[:, 0].sum()


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = write_phantom_dataset(Path(folder) / "scans", cases=30, shape=(1, 96, 96), dims=2)
        dataset = open_dataset(root)
        names = [case.case_id for case in dataset.cases]
        preprocessing = plan_preprocessing(fingerprint_dataset(dataset, names[:-1]))
        cases = CaseCache(Path(folder) / "cache", dataset, preprocessing).prepare_all(names)
        network, losses = train(cases[:-1])
        held_out = cases[-1]
        prediction = predict_label(network, torch.from_numpy(held_out.image_float()), PATCH).numpy()
        measured = measure_case(
            prediction, held_out.label, {"background": 0, "tumour": 1}, held_out.spacing_mm
        )["tumour"].values
        print(f"held-out slice: Dice {measured['dice']:.2f}, sensitivity {measured['sensitivity']:.2f}")
        save_picture(
            "training_loop.png", losses, held_out.image_float()[0, 0], held_out.label[0], prediction[0]
        )


def train(cases: Sequence[CachedCase]) -> tuple[AttentionUNet, list[float]]:
    """The network after STEPS steps, and the loss of each of them."""
    sampler = PatchSampler(cases, PATCH, foreground_fraction=0.5, seed=0)
    augment = Augmenter(AugmentConfig(), dims=2)
    network = AttentionUNet(dims=2, in_channels=1, out_channels=2, features=(8, 16, 32), seed=0)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for step in range(STEPS):
        images, labels = sampler.batch(range(step * BATCH, (step + 1) * BATCH))
        images, labels = augment(images, labels, generator=torch.Generator().manual_seed(step))
        loss = tversky_ce(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return network, losses


def save_picture(
    path: str, losses: list[float], image: np.ndarray, truth: np.ndarray, prediction: np.ndarray
) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
    left.plot(losses)
    left.set(xlabel="step", ylabel="loss", title="Tversky + cross-entropy")
    right.imshow(image[::-1, ::-1], cmap="gray")  # RAS to front up, the patient's right on the left
    right.contour(truth[::-1, ::-1], [0.5], colors="tab:green")
    right.contour(prediction[::-1, ::-1], [0.5], colors="tab:orange", linestyles="dashed")
    right.set_title("held out: truth and prediction (dashed)")
    right.set_axis_off()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print("wrote", path)


if __name__ == "__main__":
    main()
