"""Validation that ends an epoch: whole cases of the cache, on the grid of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from lungkit.data import CachedCase
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.inference import predict_case
from lungkit.inference.sliding_window import device_of
from lungkit.inference.windows_plan import windows_per_call
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
    rank: int = 0,
    world_size: int = 1,
    after_case: Callable[[], None] | None = None,
) -> CaseTable:
    """Dice, IoU, PPV and sensitivity of every case; with several processes each predicts its share.

    It tells one epoch from another, at the price of one pass over the cases as training sees them: on the grid of the
    cache, by the largest logit, without postprocessing. What a model is worth on the scans themselves is measured by
    :func:`lungkit.training.finishing.finish`. ``after_case`` is called after each case and may raise to give up.
    """
    labels = {name: index for index, name in enumerate(class_names)}
    mine = []
    for case in cases[rank::world_size]:
        size = case.shape[1:] if plan.dims == 2 else plan.patch_size
        prediction = predict_case(
            network,
            case,
            plan.patch_size,
            batch_size=windows_per_call(device_of(network, torch.device("cpu")).type, math.prod(size)),
            whole_slices=plan.dims == 2,
            context_slices=plan.context_slices,
        )
        truth = np.asarray(case.label)
        overlap = evaluate_case(prediction, truth, len(labels), ignore_index=IGNORE_INDEX)
        mine.append((case.case_id, overlap))
        if after_case is not None:
            after_case()
    order = {case.case_id: index for index, case in enumerate(cases)}
    table = CaseTable()
    gathered = [entry for part in gather_objects(mine, world_size) for entry in part]
    for case_id, overlap in sorted(gathered, key=lambda entry: order[entry[0]]):
        for name, index in labels.items():
            if index == 0:
                continue
            values = overlap.of_class(index)
            touched = overlap.touched_in_class(index) & set(METRICS)
            table.add_row(case_id, name, {metric: values[metric] for metric in METRICS}, touched)
    return table
