"""``lungkit-predict`` as a user calls it."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_cases import write_ct
from model_cases import random_network, save_model, threshold_network
from pictures import has_colour

from lungkit.cli.predict import main
from lungkit.data import read_dicom_label, read_series, read_volume, write_nifti

OUTLINE = "#ff6b4a"  # of the first class in a preview
AFFINE = np.array([[-0.8, 0, 0, 20], [0, 0.8, 0, -7], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])


@pytest.fixture
def model(tmp_path) -> Path:
    return save_model(tmp_path / "model", threshold_network(0.1))


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number, name in enumerate("abc"):
        array = np.full((20, 18, 10), -800, np.int16)
        array[4 : 8 + number, 4:8, 2:6] = 200
        write_nifti(folder / f"{name}.nii.gz", array, AFFINE)
    return folder


def predict(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--device", "cpu", "--precision", "fp32")])


def test_a_folder_becomes_masks_reports_and_pictures(tmp_path, scans, model, caplog):
    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    for name in "abc":
        scan, mask = read_volume(scans / f"{name}.nii.gz"), read_volume(out / f"{name}.nii.gz")
        assert mask.array.dtype == np.uint8 and (mask.array == (scan.array > 100)).all()
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)
        assert has_colour(out / "previews" / f"{name}.png", OUTLINE)
    report = json.loads((out / "reports" / "a.json").read_text())
    assert report["classes"]["tumour"]["volume_ml"] == pytest.approx(64 * 0.8 * 0.8 * 2.5 / 1000, abs=1e-4)
    assert report["models"][0]["sha256"] and report["lungkit"] and report["seconds"] > 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["scan"], row["status"]) for row in rows] == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert str(tmp_path) not in json.dumps(report)


def test_a_scan_becomes_the_mask_that_is_named(tmp_path, scans, model):
    mask = tmp_path / "mask.nii.gz"
    assert predict("-i", scans / "b.nii.gz", "-o", mask, "--model", model) == 0
    assert (read_volume(mask).array == (read_volume(scans / "b.nii.gz").array > 100)).all()
    assert json.loads((tmp_path / "mask.json").read_text())["classes"]["tumour"]["volume_ml"] > 0
    assert has_colour(tmp_path / "mask.png", OUTLINE)
    before = mask.read_bytes()
    assert predict("-i", scans / "a.nii.gz", "-o", mask, "--model", model) == 2
    assert mask.read_bytes() == before
    assert predict("-i", scans / "a.nii.gz", "-o", mask, "--model", model, "--overwrite") == 0
    assert mask.read_bytes() != before


def test_one_bad_scan_is_named_and_the_others_are_predicted(tmp_path, scans, model, caplog):
    whole = (scans / "b.nii.gz").read_bytes()
    (scans / "b.nii.gz").write_bytes(whole[:-30])
    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "--model", model) == 3
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    rows = {row["scan"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert rows["b"]["status"] == "failed" and "b.nii.gz" in rows["b"]["error"]
    (scans / "b.nii.gz").write_bytes(whole)
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    assert (read_volume(out / "b.nii.gz").array == (read_volume(scans / "b.nii.gz").array > 100)).all()


def test_json_says_what_became_of_every_scan(tmp_path, scans, model, capsys):
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    assert predict("-i", scans, "-o", tmp_path / "out", "--model", model, "--json", "--quiet") == 3
    content = json.loads(capsys.readouterr().out)
    assert content["output"] == str(tmp_path / "out") and list(content["failed"]) == ["broken"]
    assert sorted(content["predicted"]) == sorted(
        path.name.split(".")[0] for path in (tmp_path / "out").glob("*.nii.gz")
    )


def test_the_same_command_again_does_what_is_missing_or_changed(tmp_path, scans, model, monkeypatch):
    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    seen = []
    from lungkit.inference import Predictor

    call = Predictor.__call__
    monkeypatch.setattr(
        Predictor, "__call__", lambda self, v, **o: (seen.append(v[0].path.name), call(self, v, **o))[1]
    )
    assert predict("-i", scans, "-o", out, "--model", model) == 0 and seen == []
    (out / "a.nii.gz").write_bytes(b"damaged")
    write_nifti(scans / "c.nii.gz", np.full((20, 18, 10), 300, np.int16), AFFINE)
    assert predict("-i", scans, "-o", out, "--model", model) == 0 and seen == ["a.nii.gz", "c.nii.gz"]
    assert read_volume(out / "c.nii.gz").array.all()


def test_predictions_of_another_model_are_not_mixed_in(tmp_path, scans, model):
    out, other = tmp_path / "out", save_model(tmp_path / "other", random_network())
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    assert predict("-i", scans, "-o", out, "--model", other) == 2
    assert predict("-i", scans, "-o", out, "--model", other, "--overwrite") == 0


def test_shares_meet_in_one_folder(tmp_path, scans, model, monkeypatch):
    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "--model", model, "--shard", "0/2") == 0
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    assert main(["merge", str(out)]) == 3  # the other share is missing
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert predict("-i", scans, "-o", out, "--model", model, "--shard", "auto") == 0
    assert main(["merge", str(out)]) == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 3
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize(
    "leftover",
    [
        {"RANK": "3", "WORLD_SIZE": "8"},
        {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "10", "SLURM_ARRAY_TASK_MIN": "0"},
        {"RANK": "x", "WORLD_SIZE": "many"},
    ],
)
def test_variables_of_a_launcher_share_nothing_out_unasked(
    tmp_path, scans, model, monkeypatch, caplog, leftover
):
    for name, value in leftover.items():
        monkeypatch.setenv(name, value)
    mask = tmp_path / "mask.nii.gz"
    assert predict("-i", scans / "b.nii.gz", "-o", mask, "--model", model) == 0 and mask.is_file()
    assert "--shard auto" not in caplog.text
    assert predict("-i", scans, "-o", tmp_path / "out", "--model", model) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3
    assert "--shard auto a share" in caplog.text


def test_a_share_without_a_scan_is_said_and_no_success(tmp_path, scans, model, caplog):
    out = tmp_path / "out"
    arguments = ("-i", scans, "-o", out, "--model", model, "--shard")
    assert predict(*arguments, "3/4") == 2
    assert "share 3 of 4 holds no scan" in caplog.text
    assert [predict(*arguments, f"{share}/4") for share in range(3)] == [0, 0, 0]
    assert main(["merge", str(out)]) == 0


def test_the_file_of_one_mask_is_not_shared_out(tmp_path, scans, model, caplog):
    mask = tmp_path / "mask.nii.gz"
    assert predict("-i", scans / "b.nii.gz", "-o", mask, "--model", model, "--shard", "1/2") == 2
    assert "file of one mask" in caplog.text and not mask.exists()


def test_every_prediction_leaves_a_table_of_all_scans_with_units(tmp_path, scans, model, caplog):
    out = tmp_path / "out"
    (scans / "c.nii.gz").rename(tmp_path / "c.nii.gz")
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    (tmp_path / "c.nii.gz").rename(scans / "c.nii.gz")
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == ["a", "b", "c"]
    report = json.loads((out / "reports" / "c.json").read_text())
    assert float(rows[2]["tumour: volume_ml"]) == report["classes"]["tumour"]["volume_ml"]
    assert rows[2]["tumour: lesions"] == "1" and "in 1 connected lesion;" in caplog.text


def test_everything_that_was_asked_for_is_written(tmp_path, scans):
    out = tmp_path / "out"
    folder = save_model(tmp_path / "gated", random_network())
    arguments = (
        "--probabilities",
        "--attention",
        "--no-preview",
        "--tta",
        "--overlap",
        0.25,
        "--batch-size",
        2,
    )
    assert predict("-i", scans / "a.nii.gz", "-o", out, "--model", folder, folder, *arguments) == 0
    probability = read_volume(out / "probabilities" / "a_tumour.nii.gz").array
    mask = read_volume(out / "a.nii.gz").array
    assert probability.dtype == np.float32 and ((probability > 0.5) == (mask == 1)).all()
    assert read_volume(out / "attention" / "a.nii.gz").array.shape == mask.shape
    assert not (out / "previews").exists()


def test_postprocessing_is_asked_for_by_option(tmp_path, scans, model):
    out = tmp_path / "out"
    assert predict("-i", scans / "a.nii.gz", "-o", out, "--model", model, "--smallest-lesion-ml", 1) == 0
    assert not read_volume(out / "a.nii.gz").array.any()
    report = json.loads((out / "reports" / "a.json").read_text())
    assert report["postprocessing"]["smallest_lesion_ml"] == 1


def test_lesions_beside_a_larger_one_go_by_option(tmp_path, model):
    array = np.full((20, 18, 10), -800, np.int16)
    array[4:9, 4:8, 2:6], array[14:16, 14, 8] = 200, 200
    write_nifti(tmp_path / "two.nii.gz", array, AFFINE)
    found = {}
    for share in (0, 0.3):
        out = tmp_path / f"share {share}"
        assert (
            predict("-i", tmp_path / "two.nii.gz", "-o", out, "--model", model, "--lesion-share", share) == 0
        )
        report = json.loads((out / "reports" / "two.json").read_text())
        assert report["postprocessing"]["lesion_share"] == share
        found[share] = int(read_volume(out / "two.nii.gz").array.sum())
    assert found == {0: 82, 0.3: 80}


def test_a_share_above_all_is_a_usage_error(tmp_path, scans, model, capsys):
    arguments = ("-i", scans / "a.nii.gz", "--model", model, "-o", tmp_path / "out", "--lesion-share", 1.5)
    assert predict(*arguments) == 2
    assert "lesion_share is 1.5" in capsys.readouterr().err


def bad_inputs(tmp_path: Path) -> dict[str, tuple[Path, int, str]]:
    folder = tmp_path / "bad"
    folder.mkdir()
    write_nifti(folder / "slice.nii.gz", np.zeros((16, 16, 1), np.int16), np.eye(4))
    write_nifti(folder / "two_0000.nii.gz", np.zeros((16, 16, 9), np.int16), np.eye(4))
    write_nifti(folder / "two_0001.nii.gz", np.zeros((16, 16, 9), np.int16), np.eye(4))
    (folder / "text.nii.gz").write_text("no scan")
    (folder / "scan.docx").write_text("no scan")
    (folder / "empty").mkdir()
    return {
        "slice": (folder / "slice.nii.gz", 3, "a single slice"),
        "text": (folder / "text.nii.gz", 3, "text.nii.gz"),
        "docx": (folder / "scan.docx", 3, "not a NIfTI file"),
        "empty": (folder / "empty", 3, "no scan found"),
        "absent": (folder / "absent", 3, "no such file or folder"),
    }


@pytest.mark.parametrize("kind", ["slice", "text", "docx", "empty", "absent"])
def test_bad_input_is_named(tmp_path, model, capsys, kind):
    path, code, message = bad_inputs(tmp_path)[kind]
    assert predict("-i", path, "-o", tmp_path / "out", "--model", model) == code
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_scan_of_another_number_of_channels_is_named(tmp_path, model, capsys):
    bad_inputs(tmp_path)
    for extra in ("slice.nii.gz", "text.nii.gz"):
        (tmp_path / "bad" / extra).unlink()
    assert predict("-i", tmp_path / "bad", "-o", tmp_path / "out", "--model", model) == 3
    assert "2 channels, but model takes 1 (CT)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "{tmp}/nothing"), 4, "no such folder"),
        (("--model", "{model}", "--format", "dicom-seg"), 2, "refers to the images of a DICOM series"),
        (("--model", "{model}", "--series", "1.2"), 2, "chooses among DICOM series"),
        (("--model", "{model}", "--attention"), 2, "none of the networks has attention gates"),
        (("--model", "{model}", "--overlap", "1.5"), 2, "overlap must be"),
        (("--model", "{model}", "--threshold", "7"), 2, "threshold is 7"),
        (("--model", "{model}", "--max-voxels", "10"), 3, "max_voxels"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, scans, model, capsys, arguments, code, message):
    given = [argument.format(tmp=tmp_path, model=model) for argument in arguments]
    assert predict("-i", scans, "-o", tmp_path / "out", *given) == code
    assert message in capsys.readouterr().err


def test_a_mask_for_many_scans_is_refused(tmp_path, scans, model):
    assert predict("-i", scans, "-o", tmp_path / "mask.nii.gz", "--model", model) == 2


@pytest.mark.skipif(os.name == "nt", reason="folders have no mode bits on Windows")
def test_an_output_that_cannot_be_written_is_named(tmp_path, scans, model, capsys):
    (tmp_path / "file").touch()
    assert predict("-i", scans, "-o", tmp_path / "file" / "out", "--model", model) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written_and_ends_the_run(
    tmp_path, scans, model, monkeypatch, capsys
):
    def full(path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    from lungkit import _atomic

    monkeypatch.setattr(_atomic, "flush", full)
    out = tmp_path / "out"
    out.mkdir()
    (out / "prediction.json").write_text("{}")
    monkeypatch.setattr("lungkit.pipeline.claim", lambda *_, **__: None)
    assert predict("-i", scans, "-o", out, "--model", model) == 5
    assert "disk" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["prediction.json"]


def test_ctrl_c_keeps_what_was_predicted(tmp_path, scans, model, monkeypatch):
    from lungkit.inference import Predictor

    call = Predictor.__call__

    def interrupted(self, volumes, **options):
        if volumes[0].path.name == "b.nii.gz":
            raise KeyboardInterrupt
        return call(self, volumes, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "__call__", interrupted)
        assert predict("-i", scans, "-o", out, "--model", model) == 75
    assert [path.name for path in out.glob("*.nii.gz")] == ["a.nii.gz"]
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    assert len(list(out.glob("*.nii.gz"))) == 3


def test_the_installed_command_explains_itself():
    found = subprocess.run(
        [sys.executable, "-c", "from lungkit.cli.predict import main; main(['--help'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lungkit-predict merge" in found.stdout and "Exit codes" in found.stdout


def test_a_run_of_lungkit_train_predicts_without_further_options(tmp_path, scans):
    from lungkit.training import DataConfig, EngineConfig, ModelConfig, TrainConfig, Trainer

    torch.manual_seed(0)
    run = Trainer(
        TrainConfig(
            data=DataConfig(phantom_cases=10, cache=str(tmp_path / "cache"), patch_size=(32, 32)),
            model=ModelConfig(name="attention-unet", features=(4, 8)),
            engine=EngineConfig(accelerator="cpu", precision="fp32"),
            epochs=1,
            steps_per_epoch=2,
            batch_size=2,
            runs=str(tmp_path / "runs"),
        )
    ).fit()
    assert main(["-i", str(scans), "-o", str(tmp_path / "out"), "--model", str(run.run_folder)]) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


def test_a_picture_that_fails_is_a_warning_and_fails_no_scan(tmp_path, scans, model, monkeypatch, caplog):
    def no_fonts(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts")

    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    monkeypatch.setattr("lungkit.report.save_preview", no_fonts)
    assert predict("-i", scans, "-o", out, "--model", model, "--overwrite") == 0
    assert str(out / "previews" / "a.png") in caplog.text and "no fonts" in caplog.text
    assert not list((out / "previews").iterdir())  # no picture of an earlier mask beside the new one
    report = json.loads((out / "reports" / "a.json").read_text())
    assert list(report["files"]) == ["a.nii.gz"]


def test_a_preview_shows_a_scan_in_its_own_units_whatever_the_model_saw(tmp_path, scans, model, monkeypatch):
    from lungkit.report import save_preview

    windows = {}

    def noting(path, image, mask, spacing, *, window, title, legend):
        windows[title] = window, legend
        save_preview(path, image, mask, spacing, window=window, title=title, legend=legend)

    monkeypatch.setattr("lungkit.report.save_preview", noting)
    monkeypatch.setattr("lungkit.inference.Predictor.in_hu", False)
    grey = np.zeros((20, 18, 10), np.uint8)
    grey[4:8] = 250
    write_nifti(scans / "grey.nii.gz", grey, AFFINE)
    assert predict("-i", scans, "-o", tmp_path / "out", "--model", model) == 0
    assert windows["a"][0] == (-1000, 400) and windows["grey"][0] == (0, 250)
    report = json.loads((tmp_path / "out" / "reports" / "a.json").read_text())["classes"]["tumour"]
    assert windows["a"][1] == {
        1: f"tumour: {report['volume_ml']:.2f} ml, longest diameter {report['longest_diameter_mm']:.1f} mm"
    }


def test_strict_refuses_what_a_report_would_warn_of(tmp_path, scans, model):
    path = scans / "b.nii.gz"
    scan = read_volume(path)
    write_nifti(path, (scan.array / np.float32(1000)), scan.affine)
    assert predict("-i", scans, "-o", tmp_path / "warned", "--model", model) == 0
    warnings = json.loads((tmp_path / "warned" / "reports" / "b.json").read_text())["warnings"]
    assert len(warnings) == 1 and "trained on HU" in warnings[0]
    assert predict("-i", scans, "-o", tmp_path / "strict", "--model", model, "--strict") == 3
    assert sorted(path.name for path in (tmp_path / "strict").glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]


def test_a_mask_keeps_both_forms_of_its_scan_and_the_report_says_that_they_disagree(tmp_path, scans, model):
    moved = AFFINE.copy()
    moved[:3, 3] += (40, -25, 15)
    image = nib.Nifti1Image(read_volume(scans / "a.nii.gz").array, AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(moved, 2)
    nib.save(image, tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    assert predict("-i", tmp_path / "scan.nii.gz", "-o", out, "--model", model, "--probabilities") == 0
    assert (
        "sform and qform disagree" in json.loads((out / "reports" / "scan.json").read_text())["warnings"][0]
    )
    for path in (out / "scan.nii.gz", *(out / "probabilities").iterdir()):
        written = nib.load(path)
        np.testing.assert_allclose(written.get_qform(coded=True)[0], AFFINE, atol=1e-5)
        np.testing.assert_allclose(written.get_sform(coded=True)[0], moved, atol=1e-5)
        assert (written.get_qform(coded=True)[1], written.get_sform(coded=True)[1]) == (1, 2)


def test_labels_beyond_255_reach_mask_report_and_picture(tmp_path, scans):
    model = save_model(tmp_path / "m", threshold_network(0.1), label_values={"background": 0, "tumour": 301})
    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    mask = read_volume(out / "a.nii.gz").array
    assert mask.dtype == np.uint16 and np.unique(mask).tolist() == [0, 301]
    found = json.loads((out / "reports" / "a.json").read_text())["classes"]["tumour"]
    assert found["lesions"][0]["voxels"] == (mask == 301).sum()
    assert has_colour(out / "previews" / "a.png", OUTLINE)


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.json", "ct.png", "probabilities/ct_tumour.nii.gz"])
def test_no_file_beside_a_single_mask_is_replaced_unasked(tmp_path, scans, model, name, capsys):
    (tmp_path / "probabilities").mkdir()
    (tmp_path / name).write_text("mine")
    given = ["-i", scans / "a.nii.gz", "-o", tmp_path / "ct.nii.gz", "--model", model, "--probabilities"]
    assert predict(*given) == 2
    assert (tmp_path / name).read_text() == "mine" and name in capsys.readouterr().err
    assert predict(*given, "--overwrite") == 0
    assert (tmp_path / name).read_bytes() != b"mine"


def test_a_file_that_was_put_into_the_output_folder_is_not_replaced_unasked(tmp_path, scans, model, capsys):
    out = tmp_path / "out"
    (scans / "b.nii.gz").rename(tmp_path / "b.nii.gz")
    assert predict("-i", scans, "-o", out, "--model", model) == 0
    (tmp_path / "b.nii.gz").rename(scans / "b.nii.gz")
    (out / "b.nii.gz").write_text("mine")
    assert predict("-i", scans, "-o", out, "--model", model) == 2
    assert (out / "b.nii.gz").read_text() == "mine"
    assert "b.nii.gz was not written by lungkit" in capsys.readouterr().err
    assert predict("-i", scans, "-o", out, "--model", model, "--overwrite") == 0
    assert read_volume(out / "b.nii.gz").array.any()


@pytest.mark.parametrize("name", ["mask.nrrd", "mask.mha", "mask.dcm", "mask.gz", "MASK.PNG"])
def test_a_file_of_another_format_is_refused_and_no_folder_of_that_name_made(
    tmp_path, scans, model, name, capsys
):
    assert predict("-i", scans / "a.nii.gz", "-o", tmp_path / name, "--model", model) == 2
    assert ".nii.gz" in capsys.readouterr().err and not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_a_dicom_file_is_that_file(tmp_path, model, kind):
    write_ct(tmp_path / "ct", np.full((20, 18, 10), 200, np.int16))
    assert predict("-i", tmp_path / "ct", "-o", tmp_path / "m.dcm", "--model", model, "--format", kind) == 0
    mask, labels = read_dicom_label(tmp_path / "m.dcm", read_series(tmp_path / "ct"))
    assert mask.array.all() and labels == {"tumour": 1}
    assert (tmp_path / "m.json").is_file()


def test_what_is_passed_over_is_said_and_the_exit_code_tells(tmp_path, scans, model, capsys):
    (scans / "old").mkdir()
    (scans / "old" / "x.nii.gz").touch()
    assert predict("-i", scans, "-o", tmp_path / "out", "--model", model) == 3
    assert "3 predicted" in (shown := capsys.readouterr().err) and "old/x.nii.gz" in shown


@pytest.mark.parametrize("name", ["a" * 233, "c$0_{$", "L\u00e4sion \u00e9"])
def test_names_as_people_give_them(tmp_path, scans, model, name):
    (scans / "b.nii.gz").rename(scans / f"{name}.nii.gz")
    assert predict("-i", scans, "-o", tmp_path / "out", "--model", model, "--probabilities") == 0
    assert read_volume(tmp_path / "out" / f"{name}.nii.gz").array.any()
    assert has_colour(tmp_path / "out" / "previews" / f"{name}.png", OUTLINE)


def test_voxels_that_are_no_numbers_are_replaced_on_request(tmp_path, scans, model, capsys):
    array = read_volume(scans / "a.nii.gz").array.astype(np.float32)
    array[:2] = np.nan
    write_nifti(tmp_path / "nan.nii.gz", array, AFFINE)
    given = ["-i", tmp_path / "nan.nii.gz", "-o", tmp_path / "m.nii.gz", "--model", model]
    assert predict(*given) == 3
    assert "--nan minimum" in capsys.readouterr().err
    assert predict(*given, "--nan", "minimum") == 0
    assert read_volume(tmp_path / "m.nii.gz").array.sum() == 64
