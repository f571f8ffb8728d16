"""The fused attention gate in a network of your own; writes own_network.png.

A small encoder and decoder whose one skip connection is gated. After some steps on phantom slices the map of the gate,
which nobody has supervised, says where the network looks.
"""

from __future__ import annotations

import matplotlib
import torch
from torch import Tensor, nn

from lungkit.data import make_phantom
from lungkit.losses import DiceCELoss
from lungkit.nn import AttentionGate


def convolutions(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1),
        nn.InstanceNorm2d(channels, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels, affine=True),
        nn.LeakyReLU(0.01),
    )


class GatedNetwork(nn.Module):
    """Two levels; the coarse one drives the gate on the fine one's features."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.fine = convolutions(1, channels)
        self.coarse = convolutions(channels, 2 * channels)
        self.gate = AttentionGate(2, x_channels=channels, g_channels=2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=4)
        self.merge = convolutions(2 * channels, channels)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(image)
        coarse = self.coarse(nn.functional.avg_pool2d(fine, 4))
        gated, attention = self.gate(fine, coarse, return_attention=True)
        return self.head(self.merge(torch.cat([gated, self.up(coarse)], 1))), attention


def phantoms(seeds: range) -> tuple[Tensor, Tensor]:
    drawn = [make_phantom(seed, shape=(1, 96, 96)) for seed in seeds]
    images = torch.stack([torch.from_numpy((p.image + 600) / 400.0).float().clamp(-1, 2) for p in drawn])
    return images, torch.stack([torch.from_numpy(p.label) for p in drawn])


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    images, labels = phantoms(range(24))
    network, criterion = GatedNetwork(), DiceCELoss(softmax=True, include_background=False)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    for step in range(steps):
        chosen = torch.randint(len(images), (4,))
        loss = criterion(network(images[chosen])[0], labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    image, label = phantoms(range(102, 103))
    with torch.no_grad():
        _, attention = network(image)
    save_picture("own_network.png", image[0, 0], label[0, 0], attention[0, 0])


def save_picture(path: str, image: Tensor, label: Tensor, attention: Tensor) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.3), layout="constrained")
    left.imshow(image.numpy(), cmap="gray")
    left.contour(label.numpy(), [0.5], colors="tab:green")
    left.set_title("slice and its tumour")
    shown = right.imshow(attention.numpy(), cmap="viridis", vmin=0, vmax=1)
    right.set_title("attention map")
    figure.colorbar(shown, ax=right)
    for axes in (left, right):
        axes.set_axis_off()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print("wrote", path)


if __name__ == "__main__":
    main()
