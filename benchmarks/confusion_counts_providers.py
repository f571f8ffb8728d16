"""Ways to count true positives, false positives and false negatives of each class of each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from harness import OURS, Case, Provider
from torch import Tensor

from lungkit.ops.confusion_counts import confusion_counts

Count = Callable[[Tensor, Tensor, int], Tensor]  # prediction, labels, classes -> (B, K, 3)


def hard(prediction: Tensor) -> Tensor:
    """Class indices, of logits too."""
    return prediction.argmax(1) if prediction.is_floating_point() else prediction


def histogram_form(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The confusion matrix of all images by one ``bincount``."""
    batch = len(labels)
    image = torch.arange(batch, device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    index = (image * classes + labels) * classes + hard(prediction)
    matrix = torch.bincount(index.flatten(), minlength=batch * classes**2).view(batch, classes, classes)
    tp = matrix.diagonal(dim1=1, dim2=2)
    return torch.stack((tp, matrix.sum(1) - tp, matrix.sum(2) - tp), -1)


def comparison_form(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Three sums of booleans for each class."""
    guess, axes = hard(prediction), tuple(range(1, labels.dim()))
    counts = []
    for c in range(classes):
        guessed, is_label = guess == c, labels == c
        tp = (guessed & is_label).sum(axes)
        counts.append(torch.stack((tp, guessed.sum(axes) - tp, is_label.sum(axes) - tp), -1))
    return torch.stack(counts, 1)


def _monai() -> Count:
    from monai.metrics.confusion_matrix import get_confusion_matrix
    from monai.networks.utils import one_hot

    def count(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
        guess, truth = (one_hot(mask.unsqueeze(1), classes) for mask in (hard(prediction), labels))
        tp, fp, _, fn = get_confusion_matrix(guess, truth).unbind(-1)
        return torch.stack((tp, fp, fn), -1).long()

    return count


FORMS: dict[str, Callable[[], Count]] = {
    OURS: lambda: lambda prediction, labels, classes: confusion_counts(prediction, labels, classes)[0],
    "histogram, eager": lambda: histogram_form,
    "comparisons, eager": lambda: comparison_form,
    "comparisons, compiled": lambda: torch.compile(comparison_form, dynamic=False),
    "MONAI": _monai,
}


@dataclass(frozen=True)
class ConfusionCase(Case):
    """Labels in ``shape`` (B, *S) against logits of ``pred_dtype``, or class indices where it is an integer type."""

    shape: tuple[int, ...]
    classes: int
    pred_dtype: torch.dtype = torch.uint8
    label_dtype: torch.dtype = torch.uint8

    op = "confusion_counts"
    modes = ("forward",)

    @property
    def label(self) -> str:
        types = " ".join(str(dtype).removeprefix("torch.") for dtype in (self.pred_dtype, self.label_dtype))
        return f"{'x'.join(map(str, self.shape))} {self.classes} classes {types}"

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(FORMS)

    @property
    def dtype(self) -> torch.dtype:
        return self.pred_dtype

    def main_bytes(self) -> int:
        channels = self.classes if self.pred_dtype.is_floating_point else 1
        return torch.Size(self.shape).numel() * channels * self.pred_dtype.itemsize

    def fewest_bytes(self) -> Mapping[str, int]:
        """Prediction and labels are read once."""
        return {"forward": self.main_bytes() + torch.Size(self.shape).numel() * self.label_dtype.itemsize}

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Boxes of each class in a background, as organs are: labels come in runs. The prediction is shifted, with
        one voxel in a hundred at random."""
        generator = torch.Generator(self.device).manual_seed(0)
        labels = torch.zeros(self.shape, dtype=torch.long, device=self.device)
        for c in range(1, self.classes):
            box = [
                slice(size * c // (self.classes + 1), size * (c + 1) // (self.classes + 1) + 1)
                for size in self.shape[1:]
            ]
            labels[(slice(None), *box)] = c
        guess = labels.roll(1, -1)
        noisy = torch.rand(self.shape, generator=generator, device=self.device) < 0.01
        random = torch.randint(self.classes, self.shape, generator=generator, device=self.device)
        guess = torch.where(noisy, random, guess)
        if self.pred_dtype.is_floating_point:
            logits = torch.randn(
                (self.shape[0], self.classes, *self.shape[1:]), generator=generator, device=self.device
            )
            return logits.scatter(1, guess.unsqueeze(1), 9.0).to(self.pred_dtype), labels.to(self.label_dtype)
        return guess.to(self.pred_dtype), labels.to(self.label_dtype)

    def build(self, provider: str, inputs: tuple[Tensor, Tensor]) -> Provider:
        count = FORMS[provider]()
        prediction, labels = inputs
        return Provider(lambda: count(prediction, labels, self.classes))
