"""Validation that ends an epoch: whole cases of the cache, on the grid of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lungkit.data import CachedCase
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.inference import predict_label
from lungkit.inference.patches import TRAINED_TILING, patches_per_call, prediction_patch
from lungkit.inference.sliding_window import device_of
from lungkit.metrics import CaseTable, evaluate_case
from lungkit.training.engine import gather_objects
from lungkit.training.planning import Plan

METRICS = ("dice", "iou", "ppv", "sensitivity")


def validate(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    class_names: Sequence[str],
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    rank: int = 0,
    world_size: int = 1,
    after_case: Callable[[], None] | None = None,
) -> CaseTable:
    """Dice, IoU, PPV and sensitivity of every case; with several processes each predicts its share.

    It tells one epoch from another, at the price of one pass over the cases as training sees them: on the grid of the
    cache, by the largest logit, without postprocessing. What a model is worth on the scans themselves is measured by
    :func:`lungkit.training.finishing.finish`. ``regions`` are those of :attr:`lungkit.data.Dataset.region_classes`,
    measured in place of the classes. ``after_case`` is called after each case and may raise to give up.
    """
    sequence = [list(class_names).index(name) for name in regions] if regions else None
    device = device_of(network, torch.device("cpu"))
    mine = []
    for case in cases[rank::world_size]:
        patch = prediction_patch(plan.patch_size, case.shape, whole_slices=TRAINED_TILING.whole_slices)
        label = predict_label(
            network,
            torch.from_numpy(case.image_float()).to(device),
            patch,
            batch_size=patches_per_call(device.type, patch),
            context_slices=plan.context_slices,
            region_sequence=sequence,
        )
        mine.append(
            (case.case_id, _overlaps(label.cpu().numpy(), np.asarray(case.label), class_names, regions))
        )
        if after_case is not None:
            after_case()
    order = {case.case_id: index for index, case in enumerate(cases)}
    table = CaseTable()
    gathered = [entry for part in gather_objects(mine, world_size) for entry in part]
    for case_id, overlaps in sorted(gathered, key=lambda entry: order[entry[0]]):
        for name, (values, decided) in overlaps.items():
            table.add_row(
                case_id, name, {metric: values[metric] for metric in METRICS}, decided & set(METRICS)
            )
    return table


def _overlaps(
    label: np.ndarray,
    truth: np.ndarray,
    class_names: Sequence[str],
    regions: Mapping[str, Sequence[int]] | None,
) -> dict[str, tuple[dict[str, float], frozenset[str]]]:
    """Metrics of each class, or of each region, and which of them the empty policy decided."""
    if not regions:
        overlap = evaluate_case(label, truth, len(class_names), ignore_index=IGNORE_INDEX)
        return {
            name: (overlap.of_class(index), overlap.decided_in_class(index))
            for index, name in enumerate(class_names)
            if index
        }
    found = {}
    for name, classes in regions.items():
        inside = np.zeros(256, np.uint8)
        inside[list(classes)], inside[IGNORE_INDEX] = 1, IGNORE_INDEX
        overlap = evaluate_case(inside[label], inside[truth], 2, ignore_index=IGNORE_INDEX)
        found[name] = overlap.of_class(1), overlap.decided_in_class(1)
    return found
