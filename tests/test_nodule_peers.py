"""benchmarks/nodule_peers.py on tiny phantoms, and its table."""

from __future__ import annotations

import json

import monai_peer
import nodule_peers
import numpy as np
import pytest

from lungkit.data import read_volume, write_phantom_dataset


def test_monai_peer_leaves_masks_a_curve_and_what_they_measure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("monai")
    from monai.data import set_track_meta

    monkeypatch.setattr(monai_peer, "PATCH", (32, 32))
    data = write_phantom_dataset(tmp_path / "data", cases=5, shape=(2, 48, 48), dims=3)
    arguments = [str(data), "--peer", "monai-unet", "--minutes", "0.005", "--checkpoints", "1"]
    arguments += ["--batch_size", "2", "--workers", "0", "--window", "32", "-o", str(tmp_path / "run")]
    try:
        assert nodule_peers.main(arguments) == 0
    finally:
        set_track_meta(True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    held_out = json.loads((data / "splits_final.json").read_text())[0]["val"]
    assert sorted(record["cases"]) == sorted(held_out)
    assert sorted(path.name for path in (tmp_path / "run" / "masks").iterdir()) == sorted(
        f"{case}.nii.gz" for case in held_out
    )
    (seconds, dice), *others = record["curve"]
    assert not others and seconds == record["seconds"] >= 0.3 and record["steps"] >= 1
    assert dice == pytest.approx(record["end"]["dice"])
    windows = tmp_path / "run" / "windows"
    assert 0 <= record["dice_in_windows"] <= 1
    for case in held_out:
        assert read_volume(windows / "masks" / f"{case}.nii.gz").array.shape == (32, 32, 2)


def test_windows_are_cut_anywhere_from_image_and_label_alike(tmp_path):
    data = write_phantom_dataset(tmp_path / "data", cases=5, shape=(2, 48, 40), dims=3)
    cases = [path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").iterdir()]
    first, second = (nodule_peers.cut_windows(data, cases, 24, tmp_path / name) for name in ("a", "b"))
    corners = set()
    for case in cases:
        for name in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            whole, cut = read_volume(data / name).array, read_volume(first / name).array
            np.testing.assert_array_equal(cut, read_volume(second / name).array)
            if name.startswith("images"):
                places = np.lib.stride_tricks.sliding_window_view(whole, cut.shape)
                (corner,) = np.argwhere((places == cut).all(axis=(3, 4, 5)))
                corners.add(tuple(corner.tolist()))
            x, y, _ = corner
            np.testing.assert_array_equal(cut, whole[x : x + 24, y : y + 24])
    assert len(corners) == len(cases)


def record(**changes):
    values = {"dice": 0.8, "iou": 0.7, "lesion_f1": 1.0, "hd95_directed_mm": 2.0}
    return {
        "tool": "MONAI",
        "network": "UNet",
        "machine": "a machine",
        "threads": 2,
        "minutes": 20.0,
        "fold": 0,
        "seed": 0,
        "versions": {"monai": "1.6.1"},
        "parameters": 1_250_000,
        "steps": 100,
        "batch_size": 16,
        "seconds": 1200.0,
        "curve": [[120.0, 0.6], [240.0, 0.7], [360.0, 0.72]],
        "end": values,
        "cases": {"P1_n00": values, "P2_n00": {**values, "dice": 0.6, "hd95_directed_mm": None}},
        **changes,
    }


def test_table_tells_when_each_dice_was_reached_and_how_sure_the_end_is(tmp_path):
    paths = [tmp_path / "monai.json", tmp_path / "other.json"]
    paths[0].write_text(json.dumps(record(dice_in_windows=0.75)))
    paths[1].write_text(json.dumps(record(tool="other", threads=1, seed=None, note="mirrored.")))
    assert nodule_peers.main(["--table", *map(str, paths), "--results", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert "a machine, 1 and 2 threads" in text and "other: mirrored." in text
    row = next(line for line in text.splitlines() if line.startswith("| MONAI"))
    assert row == (
        "| MONAI | UNet | 0 | 1.25 M | 100 x 16 | 20.0 | 0.800 [0.600, 0.800] | 0.700 | 1.000 | 2.00 (1) "
        "| 0.750 | 4.0 | not reached |"
    )
