"""torchmetrics classes: the mean over cases, and the same over two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import lungkit
from lungkit.errors import UsageError
from lungkit.metrics import CaseTable, EmptyPolicy, evaluate_case, measure_case

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra 'metrics')")

from lungkit.metrics import LesionMetric, OverlapMetric, SizeMetric, SurfaceMetric

LABELS = {"background": 0, "tumour": 1, "node": 2}


def batch(seed: int, cases: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(0, 3, (cases, 4, 6, 7), generator=generator, dtype=torch.uint8) for _ in range(2)
    )


def test_overlap_is_the_mean_over_cases() -> None:
    metric, table = OverlapMetric(3), CaseTable()
    for seed in range(3):
        prediction, target = batch(seed)
        metric.update(prediction, target)
        for i, (case, truth) in enumerate(zip(prediction, target, strict=True)):
            table.add(f"{seed}-{i}", evaluate_case(case, truth, 3), LABELS)
    for name in table.metrics:
        assert float(metric.compute()[name]) == pytest.approx(table.mean(name))


def test_logits_are_taken_by_their_largest() -> None:
    prediction, target = batch(0)
    logits = torch.nn.functional.one_hot(prediction.long(), 3).movedim(-1, 1).float()
    by_label, by_logits = OverlapMetric(3), OverlapMetric(3)
    by_label.update(prediction, target)
    by_logits.update(logits, target)
    assert by_label.compute() == by_logits.compute()


def test_none_gives_every_class() -> None:
    metric = OverlapMetric(3, average="none")
    metric.update(*batch(0))
    assert metric.compute()["dice"].shape == (2,)


def test_undefined_cases_are_left_out_and_counted() -> None:
    metric = OverlapMetric(2)
    metric.update(torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 0], [0, 1]]))
    result = metric.compute()
    assert (float(result["dice"]), int(result["dice_undefined"])) == (1.0, 1)


def test_empty_policy_is_followed() -> None:
    metric = OverlapMetric(2, empty=EmptyPolicy.PERFECT_IF_BOTH_EMPTY)
    metric.update(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    assert float(metric.compute()["dice"]) == 1.0


def test_reset_forgets() -> None:
    metric = OverlapMetric(3)
    metric.update(*batch(0))
    metric.reset()
    metric.update(*batch(1))
    fresh = OverlapMetric(3)
    fresh.update(*batch(1))
    assert metric.compute() == fresh.compute()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(SurfaceMetric, "assd_pooled_mm"), (LesionMetric, "lesion_dice"), (SizeMetric, "diameter_predicted_mm")],
)
def test_measurements_are_the_mean_over_cases(kind: type, name: str) -> None:
    prediction, target = batch(0)
    metric = kind(LABELS, average="none")
    metric.update(prediction, target, (2.5, 0.8, 0.8))
    cases = [
        measure_case(case, truth, LABELS, (2.5, 0.8, 0.8))["node"].values[name]
        for case, truth in zip(prediction, target, strict=True)
    ]
    assert cases[0] != cases[1]
    assert float(metric.compute()[name][1]) == pytest.approx(sum(cases) / 2)


def test_ignored_voxels_are_not_measured() -> None:
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    truth[..., 2:4, 2:4], truth[..., 6:, 6:] = 1, 255
    prediction = (truth > 0).to(torch.uint8)
    metric = LesionMetric({"tumour": 1}, ignore_index=255)
    metric.update(prediction, truth, (2.5, 0.8, 0.8))
    assert float(metric.compute()["lesions_predicted"]) == 1


@pytest.mark.parametrize("container", [list, torch.tensor, np.array])
def test_spacing_may_differ_between_cases(container: Callable[[object], object]) -> None:
    prediction, target = batch(0)
    spacings = container([(2.5, 0.8, 0.8), (5.0, 0.6, 0.6)])
    together, apart = SurfaceMetric(LABELS), SurfaceMetric(LABELS)
    together.update(prediction, target, spacings)
    for i in range(2):
        apart.update(prediction[i : i + 1], target[i : i + 1], spacings[i])
    assert together.compute() == apart.compute()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OverlapMetric(2, average="micro"), "micro"),
        (lambda: SurfaceMetric({"background": 0}), "background"),
        (lambda: SurfaceMetric(LABELS).update(*batch(0), [(1.0, 1.0, 1.0)]), "one a case"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


SHARE_SCRIPT = """
import json, sys, torch
from lungkit.metrics import LesionMetric, OverlapMetric, SurfaceMetric
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
labels = {"tumour": 1, "node": 2}
overlap, surface, lesions = OverlapMetric(3), SurfaceMetric(labels), LesionMetric(labels)
for prediction, target in torch.load(sys.argv[3], weights_only=True)[rank::2]:
    overlap.update(prediction, target)
    for metric in (surface, lesions):
        metric.update(prediction, target, (2.5, 0.8, 0.8))
results = {**overlap.compute(), **surface.compute(), **lesions.compute()}
if rank == 0:
    print(json.dumps({name: float(value) for name, value in results.items()}))
torch.distributed.destroy_process_group()
"""


def over_two_processes(cases: list[tuple[torch.Tensor, torch.Tensor]], folder: Path) -> dict[str, float]:
    torch.save(cases, folder / "cases.pt")
    # The processes import the lungkit that this one does, installed or not.
    environment = {**os.environ, "PYTHONPATH": str(Path(lungkit.__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE_SCRIPT, str(rank), str(folder / "store"), str(folder / "cases.pt")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,  # python -c would look for lungkit in this folder first, and the checkout holds no libraries
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return json.loads(outputs[0])


@pytest.mark.parametrize("count", [5, 1])
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, count: int) -> None:
    # Of five batches one process holds three and the other two; of one batch the other holds none.
    cases = [batch(seed, cases=1) for seed in range(count)]
    overlap, surface, lesions = OverlapMetric(3), SurfaceMetric(LABELS), LesionMetric(LABELS)
    for prediction, target in cases:
        overlap.update(prediction, target)
        for metric in (surface, lesions):
            metric.update(prediction, target, (2.5, 0.8, 0.8))
    together = {**overlap.compute(), **surface.compute(), **lesions.compute()}
    alone = {name: float(value) for name, value in together.items()}
    assert over_two_processes(cases, tmp_path) == pytest.approx(alone, abs=1e-12)
