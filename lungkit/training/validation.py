"""Validation by whole case: predicted as a user's scan would be, measured per case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lungkit.data import CachedCase
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.inference import attention_map, predict_case
from lungkit.inference.predict import stream_case
from lungkit.inference.sliding_window import device_of
from lungkit.inference.windows_plan import windows_per_call
from lungkit.metrics import CaseTable, evaluate_case
from lungkit.nn import AttentionUNet, MonaiAttentionUNet
from lungkit.report import choose_slice, save_overlays
from lungkit.training.engine import gather_objects
from lungkit.training.grids import CacheGrid, Grid
from lungkit.training.planning import Plan

METRICS = ("dice", "iou", "ppv", "sensitivity")

Predict = Callable[[nn.Module, CachedCase, Plan], np.ndarray]
"""Label map of a cached case, uint8 (Z, Y, X)."""


def predict(network: nn.Module, case: CachedCase, plan: Plan) -> np.ndarray:
    """Label map of a cached case, uint8 (Z, Y, X); a 2D network sees whole slices."""
    return predict_case(
        network,
        case,
        plan.patch_size,
        batch_size=_windows_per_call(network, case, plan),
        whole_slices=plan.dims == 2,
        context_slices=plan.context_slices,
    )


def stream_logits_of(network: nn.Module, case: CachedCase, plan: Plan) -> Iterator[tuple[int, int, Tensor]]:
    """First and one-past-last row and the logits (K, rows, Y, X) behind :func:`predict`, float32."""
    image = torch.from_numpy(case.image_float()).to(next(network.parameters()).device)
    return stream_case(
        network,
        image,
        plan.patch_size,
        overlap=0.5,
        batch_size=_windows_per_call(network, case, plan),
        whole_slices=plan.dims == 2,
        context_slices=plan.context_slices,
        progress=None,
    )


def _windows_per_call(network: nn.Module, case: CachedCase, plan: Plan) -> int:
    size = case.shape[1:] if plan.dims == 2 else plan.patch_size
    return windows_per_call(device_of(network, torch.device("cpu")).type, math.prod(size))


def validate(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    class_names: Sequence[str],
    *,
    rank: int = 0,
    world_size: int = 1,
    grid: Grid | None = None,
    predict: Predict = predict,
    after_case: Callable[[], None] | None = None,
) -> CaseTable:
    """Dice, IoU, PPV and sensitivity of every case; with several processes each predicts its share.

    ``grid`` is where they are measured, by default the cache's. ``predict`` makes the label maps. ``after_case`` is
    called after each case and may raise to give up.
    """
    grid = grid or CacheGrid()
    labels = {name: index for index, name in enumerate(class_names)}
    mine = []
    for case in cases[rank::world_size]:
        prediction, truth = grid.labels(case, predict(network, case, plan))
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
    folder: Path,
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    table: CaseTable,
    *,
    grid: Grid | None = None,
    predict: Predict = predict,
) -> None:
    """A picture each of the worst, median and best case: CT, truth, prediction and, if there is one, attention map."""
    grid = grid or CacheGrid()
    by_id = {case.case_id: case for case in cases}
    dice = {row.case_id: row.values["dice"] for row in table.of_label(table.labels[0])} if table.rows else {}
    for rank, case_id in representative_cases(table).items() if table.rows else ():
        case = by_id[case_id]
        image, spacing_mm = grid.image(case)
        prediction, truth = grid.labels(case, predict(network, case, plan))
        slice_index = choose_slice(np.where(truth == IGNORE_INDEX, 0, truth), prediction)
        attention = None
        if isinstance(network, (AttentionUNet, MonaiAttentionUNet)):
            attention = _attention(network, case, plan, slice_index, truth.shape)
        save_overlays(
            folder / f"{rank}-{case_id}.png",
            image,
            truth,
            prediction,
            attention,
            slice_index=slice_index,
            spacing_mm=spacing_mm,
            ignore_index=IGNORE_INDEX,
            title=f"{rank} validation case {case_id}, Dice {dice[case_id]:.3f}",
        )


def _attention(
    network: nn.Module, case: CachedCase, plan: Plan, slice_index: int, shape: Sequence[int]
) -> torch.Tensor:
    """Attention map (Y, X) of slice ``slice_index`` of a grid of ``shape`` that covers the same body as the cache."""
    cached_slice = (2 * slice_index + 1) * case.shape[0] // (2 * shape[0])
    attention = attention_map(
        network,
        torch.from_numpy(case.image_float()).to(next(network.parameters()).device),
        plan.patch_size,
        cached_slice,
        whole_slices=plan.dims == 2,
        context_slices=plan.context_slices,
    )
    if attention.shape == tuple(shape[1:]):
        return attention.cpu()
    resized = F.interpolate(
        attention[None, None], size=tuple(shape[1:]), mode="bilinear", align_corners=False
    )
    return resized[0, 0].cpu()
