"""FSDP: the run of processes that hold shares of the weights is that of processes that hold all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lungkit
from lungkit.checkpoint import load_checkpoint
from lungkit.errors import UsageError
from lungkit.training import Trainer
from lungkit.training.sharding import gathered, shared_out


@pytest.fixture
def train(tmp_path: Path, phantom_root: Path, cache_root: Path):
    """Starts lungkit-train with two processes on the tiny phantom, in a process of its own."""
    script = tmp_path / "lungkit_train.py"
    script.write_text("import sys\nfrom lungkit.cli.train import main\nsys.exit(main())\n")
    fixed = [
        f"--data={phantom_root}",
        f"--data.cache={cache_root}",
        "--data.patch_size=[16,16]",
        "--model.features=[4,8]",
        "--steps_per_epoch=2",
        "--batch_size=1",
        "--device=cpu",
        "--engine.precision=fp32",
        "--engine.devices=2",
        "--no-report",
        f"--runs={tmp_path / 'runs'}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(lungkit.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }

    def start(*options: str, new: bool = True, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *launcher, str(script), *(fixed if new else []), *options],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finished(process: subprocess.Popen[str]) -> str:
    _, text = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def test_shares_of_weights_train_as_whole_ones_do_and_a_resumed_run_too(train, tiny, tmp_path, monkeypatch):
    # Two processes with one patch each see the batches of one process with two. Without augmentation, which draws for
    # each process, the weights are those of one process, up to rounding.
    options = ("--augment.enabled=false", "--optimiser.schedule=constant", "--optimiser.warmup_steps=3")
    finished(train("--epochs=1", "--name=shares", "--engine.strategy=fsdp", *options))
    finished(train(f"--resume={tmp_path / 'runs' / 'shares'}", "--epochs=2", new=False))
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    config = tiny(
        epochs=2, name="whole", report=False, augment__enabled=False, optimiser__schedule="constant"
    )
    Trainer(config).fit()
    shares, whole = (
        load_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last") for name in ("shares", "whole")
    )
    for name, value in whole.weights.items():
        torch.testing.assert_close(shares.weights[name], value, rtol=0.0, atol=5e-7)
    for index, moments in whole.trainer["optimiser"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(
                shares.trainer["optimiser"]["state"][index][name], value, rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("victim", ["first", "other"])
def test_a_killed_worker_ends_the_job(train, tmp_path, victim):
    process = train("--epochs=100000", "--name=run")
    try:
        row = tmp_path / "runs" / "run" / "metrics.csv"
        deadline = time.monotonic() + 200
        while not row.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(tasks) == 1
        os.kill(process.pid if victim == "first" else int(tasks[0]), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        deadline = time.monotonic() + 60
        while Path(f"/proc/{tasks[0]}/stat").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{tasks[0]}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.1)
        else:
            assert not Path(f"/proc/{tasks[0]}").exists(), "the other process is still there"
    finally:
        process.kill()
        for task in tasks:
            if Path(f"/proc/{task}").exists():
                os.kill(int(task), signal.SIGKILL)
    assert json.loads((tmp_path / "runs" / "run" / "status.json").read_text())["state"] in (
        "running",
        "failed",
    )


def test_torchrun_starts_a_job_with_a_killed_worker_again_and_it_goes_on(train, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    process = train("--epochs=150", "--name=run", "--resume=auto", "--engine.devices=1", launcher=launcher)
    run = tmp_path / "runs" / "run"
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        text = finished(process)
    finally:
        process.kill()
    assert "continuing after step" in text
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_what_is_no_share_stays_as_it_is():
    value = torch.ones(3)
    assert shared_out(value, torch.zeros(3)) is value
    assert gathered({"step": 1, "rows": [value]}) == {"step": 1, "rows": [value]}


def test_shares_travel_in_bundles_of_one_number_format(monkeypatch):
    monkeypatch.setattr("lungkit.training.sharding._LARGEST_BUNDLE", 64)
    messages = []
    gather = torch.distributed.all_gather
    monkeypatch.setattr(
        torch.distributed,
        "all_gather",
        lambda whole, own, **options: messages.append(own.numel()) or gather(whole, own, **options),
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = [
            torch.randn(8),
            torch.zeros(0),
            torch.randn(2, 4),
            torch.randn(1).double(),
            torch.randn(40),
        ]
        shares = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]
        found = gathered({"rows": shares, "step": 3})
    finally:
        torch.distributed.destroy_process_group()
    assert messages == [16, 1, 40]
    assert found["step"] == 3
    for whole, tensor in zip(found["rows"], tensors, strict=True):
        assert type(whole) is torch.Tensor
        assert torch.equal(whole, tensor)


def test_options_that_shares_do_not_go_with_are_refused(tiny):
    with pytest.raises(UsageError, match=r"leave out engine\.compile"):
        tiny(engine__strategy="fsdp", engine__compile=True).validate()
    with pytest.raises(UsageError, match="scales no fp16 losses"):
        tiny(engine__strategy="fsdp", engine__precision="fp16").validate()
