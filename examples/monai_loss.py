"""The fused loss in a MONAI script: one import changes, the numbers do not.

Two copies of a MONAI U-Net are trained on the same batches, one with MONAI's loss and one with lungkit's.
"""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from monai.networks.nets import UNet

from lungkit.data import make_phantom
from lungkit.losses import DiceCELoss


def batch(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Phantom slices (B, 1, Y, X), scaled from HU, and their labels."""
    phantoms = [make_phantom(seed, shape=(1, 64, 64)) for seed in seeds]
    images = torch.stack([torch.from_numpy(phantom.image / 500.0).float() for phantom in phantoms])
    return images, torch.stack([torch.from_numpy(phantom.label) for phantom in phantoms])


def train(criterion: torch.nn.Module, steps: int = 5) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    network = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for step in range(steps):
        images, labels = batch(range(4 * step, 4 * step + 4))
        loss = criterion(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    # MONAI makes a one-hot copy of the labels in int64; the fused loss reads uint8 class indices as they are.
    monai = train(MonaiDiceCELoss(softmax=True, to_onehot_y=True, include_background=False))
    fused = train(DiceCELoss(softmax=True, to_onehot_y=True, include_background=False))
    for step, (theirs, ours) in enumerate(zip(monai, fused, strict=True)):
        print(f"step {step}: MONAI {theirs:.6f}, lungkit {ours:.6f}")
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(monai), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
