"""The metrics as ``torchmetrics.Metric``: accumulated by case, synchronised over ranks (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lungkit.errors import UsageError
from lungkit.metrics.measure import MetricGroup, MetricOptions, measure_case
from lungkit.metrics.overlap import EmptyPolicy, overlap_metrics
from lungkit.ops import confusion_counts


class _CaseMetric(Metric):
    """A metric whose states are lists with a row a case; a rank may have none."""

    def _no_case(self) -> dict[str, Tensor]:
        """Every state with no row, on the CPU."""
        raise NotImplementedError

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in ``torchmetrics.Metric``, which expects at least one row on every rank."""
        for name, empty in self._no_case().items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [empty.to(self.device)])
        super().sync(*args, **kwargs)


class OverlapMetric(_CaseMetric):
    r"""Mean over cases of Dice, IoU, PPV, sensitivity, specificity and volume similarity.

    ``update(prediction, target)`` takes a batch of cases: logits (B, K, \*S) or class indices (B, \*S), and labels
    (B, \*S). Only counts are kept, on the device of the batch, and nothing waits for the GPU before ``compute``.
    ``compute()`` gives name -> mean over the cases that define the metric, for every class but the background (K - 1,)
    or, with ``average="macro"``, their mean; and ``<name>_undefined``, the number of NaN left out. Over several ranks
    it is the mean over the cases of all: a sampler that repeats cases to fill up a rank counts them twice.

    Args:
        num_classes: K, background included.
        ignore_index: label of voxels to leave out.
        empty: what a ratio with denominator zero is.
        average: "macro" or "none".
        kwargs: see ``torchmetrics.Metric``.

    Example:
        >>> metric = OverlapMetric(2)
        >>> metric.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
        >>> round(float(metric.compute()["dice"]), 3)
        0.8
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: list[Tensor]
    voxels: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None = None,
        empty: EmptyPolicy = EmptyPolicy.NAN,
        average: str = "macro",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.empty = EmptyPolicy(empty)
        self.average = _checked_average(average)
        self.add_state("counts", default=[], dist_reduce_fx="cat")
        self.add_state("voxels", default=[], dist_reduce_fx="cat")

    def _no_case(self) -> dict[str, Tensor]:
        return {
            "counts": torch.empty(0, self.num_classes, 3, dtype=torch.int64),
            "voxels": torch.empty(0, dtype=torch.int64),
        }

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch of cases."""
        counts, voxels = confusion_counts(prediction, target, self.num_classes, self.ignore_index)
        self.counts.append(counts)
        self.voxels.append(voxels)

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        counts, voxels = dim_zero_cat(self.counts), dim_zero_cat(self.voxels)
        values = overlap_metrics(counts[:, 1:], voxels=voxels[:, None], empty=self.empty)
        return _averaged(values, self.average)


class _MeasuredMetric(_CaseMetric):
    """Mean over cases of one family of :func:`lungkit.metrics.measure_case`."""

    is_differentiable = False
    full_state_update = False
    group: MetricGroup
    rows: list[Tensor]

    def __init__(
        self,
        labels: Mapping[str, int],
        *,
        options: MetricOptions | None = None,
        ignore_index: int | None = None,
        average: str = "macro",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labels = {name: index for name, index in labels.items() if index != 0}
        if not self.labels:
            raise UsageError(f"labels must name a class beside the background, got {dict(labels)}")
        self.options = replace(options or MetricOptions(), groups=(self.group,))
        self.ignore_index = ignore_index
        self.average = _checked_average(average)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def _no_case(self) -> dict[str, Tensor]:
        shape = (0, len(self.labels), len(self.options.definitions()))
        return {"rows": torch.empty(shape, dtype=torch.float64)}

    def update(self, prediction: Tensor, target: Tensor, spacing_mm: Any) -> None:
        r"""Measure one batch of cases: class indices (B, \*S), and voxel sizes (axes,) for all or (B, axes)."""
        spacings = np.asarray(spacing_mm, np.float64)
        if spacings.ndim == 1:
            spacings = np.tile(spacings, (len(prediction), 1))
        if len(spacings) != len(prediction):
            raise UsageError(
                f"spacing_mm must be one for all or one a case, got {len(spacings)} for {len(prediction)}"
            )
        for case, truth, spacing in zip(prediction, target, spacings.tolist(), strict=True):
            measured = measure_case(
                case, truth, self.labels, spacing, options=self.options, ignore_index=self.ignore_index
            )
            values = [list(measured[name].values.values()) for name in self.labels]
            self.rows.append(torch.tensor([values], dtype=torch.float64, device=prediction.device))

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        rows = dim_zero_cat(self.rows)
        names = self.options.definitions()
        return _averaged({name: rows[..., i] for i, name in enumerate(names)}, self.average)


class SurfaceMetric(_MeasuredMetric):
    r"""Mean over cases of the Hausdorff percentile, the surface Dice and the ASSD; each name holds its definition.

    ``update(prediction, target, spacing_mm)`` takes a batch of cases as class indices (B, \*S) and the size of a voxel
    along every axis, one for all or one a case. ``compute()`` as in :class:`OverlapMetric`.

    Args:
        labels: name -> class index, the background (0) left out of the result.
        options: percentile, definition, tolerance and empty policy; its groups are not used.
        ignore_index: label of voxels to leave out.
        average: "macro" or "none".
        kwargs: see ``torchmetrics.Metric``.

    Example:
        >>> metric = SurfaceMetric({"tumour": 1})
        >>> masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> masks[0, 0, 2:4, 2:4], masks[1, 0, 2:4, 4:6] = 1, 1
        >>> metric.update(masks[:1], masks[1:], (2.5, 0.8, 0.8))
        >>> round(float(metric.compute()["hd95_directed_mm"]), 3)
        1.6
    """

    group = MetricGroup.SURFACE


class LesionMetric(_MeasuredMetric):
    r"""Mean over cases of lesion-wise sensitivity, precision, F1, Dice and of the numbers of lesions.

    Arguments, ``update`` and ``compute`` as in :class:`SurfaceMetric`; of the options the smallest IoU of a match and
    the empty policy count here.

    Example:
        >>> metric = LesionMetric({"tumour": 1})
        >>> masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> masks[0, 0, 2:4, 2:4], masks[1, 0, 3:6, 3:6], masks[1, 0, 0, 0] = 1, 1, 1
        >>> metric.update(masks[:1], masks[1:], (2.5, 0.8, 0.8))
        >>> float(metric.compute()["lesion_precision"]), float(metric.compute()["lesion_sensitivity"])
        (1.0, 0.5)
    """

    group = MetricGroup.LESION


class SizeMetric(_MeasuredMetric):
    r"""Mean over cases of volume (ml) and longest in-plane diameter (mm), predicted and true.

    Arguments, ``update`` and ``compute`` as in :class:`SurfaceMetric`; of the options nothing counts here.

    Example:
        >>> metric = SizeMetric({"tumour": 1})
        >>> mask = torch.ones(1, 2, 10, 10, dtype=torch.uint8)
        >>> metric.update(mask, mask, (5.0, 1.0, 1.0))
        >>> float(metric.compute()["volume_true_ml"])
        1.0
    """

    group = MetricGroup.SIZE


def _averaged(values: Mapping[str, Tensor], average: str) -> dict[str, Tensor]:
    result = {}
    for name, cases in values.items():
        means = cases.nanmean(0)
        result[name] = means.nanmean() if average == "macro" else means
        undefined = cases.isnan().sum(0)
        result[f"{name}_undefined"] = undefined.sum() if average == "macro" else undefined
    return result


def _checked_average(average: str) -> str:
    if average not in ("macro", "none"):
        raise UsageError(f"average must be 'macro' or 'none', got {average!r}")
    return average
