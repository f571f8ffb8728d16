"""A mask against what several readers say, with the readers' own agreement beside it."""

from __future__ import annotations

import math

import numpy as np

from lungkit.errors import UsageError

AGREEMENT_METRICS = ("dice", "readers_dice", "other_readers_dice")
AGREEMENT_DEFINITIONS = {
    "dice": "Dice of the mask against the target",
    "readers_dice": "Dice of one reader against the same target, pooled over the readers; where the target is made of "
    "their votes each reader's own vote counts in it",
    "other_readers_dice": "Dice of one reader against the voxels that as many of the other readers marked, pooled over "
    "the readers: his own vote left out",
}
CONSENSUS = "labels"


def agreement_metrics(
    mask: np.ndarray, votes: np.ndarray, readings: np.ndarray, consensus: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    r"""Dice of a mask against each level of agreement, and the Dice that the readers themselves reach.

    Level k is the target :math:`C_k` of voxels that k readers or more marked. With :math:`v` the votes of a voxel and
    :math:`n` its readers, all sums over voxels:

    .. math::
        \mathrm{readers} = \frac{2\sum_{C} v}{\sum v + \sum_{C} n}, \qquad
        \mathrm{others}_k = \frac{2\sum v\,[v > k]}{\sum v + \sum v\,[v > k] + \sum (n - v)[v \ge k]}

    Both are :math:`2\sum_i |A_i \cap C_i| / \sum_i (|A_i| + |C_i|)` over the readers' masks :math:`A_i`: the first with
    the target of all readers, the second with that of the readers other than i. Votes are enough to know them; who
    voted need not be known.

    Args:
        mask: the predicted mask of one class, bool (\*S).
        votes: readers who marked the voxel, integer (\*S).
        readings: readers who have read the voxel, integer (\*S); 0 leaves a voxel out.
        consensus: the mask that counts as the truth, bool (\*S); None leaves its row out.

    Returns:
        for "labels" (the consensus) and each level "1", "2", ...: ``dice``, ``readers_dice``, ``other_readers_dice``. A
        target without a voxel is NaN, as is what has no meaning: the others' Dice against the consensus, which
        readers may have made in talks, and against the vote of all.

    Raises:
        UsageError: shapes differ, or a voxel has more votes than readers.

    Source: pooled over pairs as the generalised conformity index of Kouwenhoven et al., "Measuring the similarity of
    target volume delineations independent of the number of observers", 2009.

    Example:
        >>> votes = np.array([0, 1, 2, 3, 3])
        >>> found = agreement_metrics(votes >= 2, votes, np.full(5, 3))
        >>> found["2"]["dice"], round(found["2"]["readers_dice"], 3), round(found["1"]["dice"], 3)
        (1.0, 0.889, 0.857)
    """
    arrays = [mask, votes, readings, *([] if consensus is None else [consensus])]
    if len({array.shape for array in arrays}) > 1:
        raise UsageError(f"arrays must have one shape, got {', '.join(str(array.shape) for array in arrays)}")
    most = int(readings.max(initial=0))
    if (votes > readings).any():
        raise UsageError("votes must not exceed readings: a voxel has more votes than readers")
    # Everything is a sum over voxels of the same kind, and there are few kinds.
    size = most + 1
    kinds = (readings.astype(np.int64) * size + votes) * 4 + 2 * mask.astype(bool)
    if consensus is not None:
        kinds += consensus.astype(bool)
    voxels = np.bincount(kinds.ravel(), minlength=size * size * 4).reshape(size, size, 2, 2)
    voxels[0] = 0
    n, v = np.arange(size)[:, None], np.arange(size)[None, :]
    by_votes = voxels.sum((2, 3))
    all_votes = float((by_votes * v).sum())
    predicted = float(voxels[:, :, 1].sum())
    table: dict[str, dict[str, float]] = {}
    if consensus is not None:
        inside = voxels[:, :, :, 1]
        table[CONSENSUS] = dict.fromkeys(AGREEMENT_METRICS, math.nan)
        if inside.any():
            table[CONSENSUS]["dice"] = _dice(inside[:, :, 1].sum(), predicted, inside.sum())
            of_readers = _dice((inside.sum(2) * v).sum(), all_votes, (inside.sum(2) * n).sum())
            table[CONSENSUS]["readers_dice"] = of_readers
    for k in range(1, most + 1):
        reached = v >= k
        marked = (by_votes * reached).sum()
        row = dict.fromkeys(AGREEMENT_METRICS, math.nan)
        if marked:
            row["dice"] = _dice((voxels[:, :, 1].sum(2) * reached).sum(), predicted, marked)
            row["readers_dice"] = _dice(
                (by_votes * reached * v).sum(), all_votes, (by_votes * reached * n).sum()
            )
            agreed = (by_votes * v * (v > k)).sum()
            others = agreed + (by_votes * (n - v) * reached).sum()
            if k < most and others:
                row["other_readers_dice"] = _dice(agreed, all_votes, others)
        table[str(k)] = row
    return table


def pairwise_dice(votes: np.ndarray, readings: np.ndarray) -> float:
    r"""Dice of two readers, pooled over all pairs: :math:`\sum v (v - 1) / \sum v (n - 1)`; NaN where nobody marked.

    Example:
        >>> pairwise_dice(np.array([0, 1, 2, 2]), np.full(4, 2))
        0.8
    """
    v, n = votes.astype(np.int64), readings.astype(np.int64)
    pairs = float((v * (n - 1)).sum())
    return float((v * (v - 1)).sum()) / pairs if pairs else math.nan


def _dice(both: float, first: float, second: float) -> float:
    total = float(first) + float(second)
    return 2.0 * float(both) / total if total else math.nan
