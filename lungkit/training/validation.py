"""Validation by whole case: predicted as a user's scan would be, measured per case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lungkit.data import CachedCase
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.inference import attention_map, predict_case
from lungkit.metrics import CaseTable, evaluate_case
from lungkit.nn import AttentionUNet, MonaiAttentionUNet
from lungkit.report import choose_slice, save_overlays
from lungkit.training.engine import gather_objects
from lungkit.training.planning import Plan

METRICS = ("dice", "iou", "ppv", "sensitivity")
_PATCHES_PER_CALL = {2: 16, 3: 1}


def predict(network: nn.Module, case: CachedCase, plan: Plan) -> np.ndarray:
    """Label map of a cached case, uint8 (Z, Y, X); a 2D network sees whole slices."""
    return predict_case(
        network,
        case,
        plan.patch_size,
        batch_size=_PATCHES_PER_CALL[plan.dims],
        whole_slices=plan.dims == 2,
        context_slices=plan.context_slices,
    )


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

    ``after_case`` is called after each case and may raise to give up.
    """
    labels = {name: index for index, name in enumerate(class_names)}
    mine = []
    for case in cases[rank::world_size]:
        overlap = evaluate_case(
            predict(network, case, plan), np.asarray(case.label), len(labels), ignore_index=IGNORE_INDEX
        )
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


def representative_cases(table: CaseTable) -> dict[str, str]:
    """Worst, median and best case by Dice (of the first class), ties broken by name: chosen by rule, not by hand.

    Example:
        >>> table = CaseTable()
        >>> for case_id, dice in {"a": 0.9, "b": 0.2, "c": 0.7}.items():
        ...     table.add_row(case_id, "tumour", {"dice": dice})
        >>> representative_cases(table)
        {'worst': 'b', 'median': 'c', 'best': 'a'}
    """
    rows = [row for row in table.of_label(table.labels[0]) if not np.isnan(row.values["dice"])]
    ranked = [row.case_id for row in sorted(rows, key=lambda row: (row.values["dice"], row.case_id))]
    if not ranked:
        return {}
    return {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}


def draw_overlays(
    folder: Path, network: nn.Module, cases: Sequence[CachedCase], plan: Plan, table: CaseTable
) -> None:
    """A picture each of the worst, median and best case: CT, truth, prediction and, if there is one, attention map."""
    by_id = {case.case_id: case for case in cases}
    dice = {row.case_id: row.values["dice"] for row in table.of_label(table.labels[0])} if table.rows else {}
    for rank, case_id in representative_cases(table).items() if table.rows else ():
        case = by_id[case_id]
        image = case.image_float()
        prediction = predict(network, case, plan)
        slice_index = choose_slice(np.asarray(case.label), prediction)
        attention = None
        if isinstance(network, (AttentionUNet, MonaiAttentionUNet)):
            device = next(network.parameters()).device
            attention = attention_map(
                network,
                torch.from_numpy(image).to(device),
                plan.patch_size,
                slice_index,
                whole_slices=plan.dims == 2,
                context_slices=plan.context_slices,
            ).cpu()
        save_overlays(
            folder / f"{rank}-{case_id}.png",
            image,
            np.asarray(case.label),
            prediction,
            attention,
            slice_index=slice_index,
            spacing_mm=case.spacing_mm,
            ignore_index=IGNORE_INDEX,
            title=f"{rank} validation case {case_id}, Dice {dice[case_id]:.3f}",
        )
