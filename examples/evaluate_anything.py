"""Metrics of masks that anything made, and a paired comparison of two methods.

The two methods here are thresholds, to show that no network is needed: all it takes is two arrays and the size of a
voxel. One method takes every bright voxel within the lungs, the other drops specks first.
"""

from __future__ import annotations

import numpy as np

from lungkit.data import Phantom, make_phantom
from lungkit.metrics import compare_paired, label_lesions, measure_case

LABELS = {"background": 0, "tumour": 1}
METRICS = ("dice", "hd95_directed_mm", "nsd_voxel_2mm", "lesion_f1")


def bright(phantom: Phantom) -> np.ndarray:
    """Lung above -300 HU: tumours, but vessels too."""
    return ((phantom.image > -300) & (phantom.lungs != 0)).astype(np.uint8)


def bright_and_large(phantom: Phantom, smallest: int = 40) -> np.ndarray:
    """The same without connected pieces of fewer voxels than ``smallest``."""
    pieces, count = label_lesions(bright(phantom))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= smallest)[pieces].astype(np.uint8)


def main(cases: int = 12) -> None:
    values: dict[str, dict[str, list[float]]] = {}
    for seed in range(cases):
        phantom = make_phantom(seed, shape=(16, 64, 64))
        for name, method in (("bright", bright), ("bright and large", bright_and_large)):
            measured = measure_case(method(phantom), phantom.label, LABELS, phantom.spacing_mm)
            for metric in METRICS:
                values.setdefault(metric, {}).setdefault(name, []).append(measured["tumour"].values[metric])
    for metric, by_method in values.items():
        first, second = by_method.values()
        found = compare_paired(first, second, higher_is_better=not metric.endswith("_mm"))
        print(
            f"{metric:17} {np.nanmean(first):7.3f} {np.nanmean(second):7.3f}   difference "
            f"{found.mean_difference:+.3f} [{found.interval.low:+.3f}, {found.interval.high:+.3f}], "
            f"p {found.p_value:.3f}, better in {found.better} of {found.cases} cases"
        )


if __name__ == "__main__":
    main()
