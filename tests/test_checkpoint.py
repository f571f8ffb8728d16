from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lungkit.checkpoint import describe_checkpoint, load_checkpoint, recover_checkpoint, save_checkpoint
from lungkit.errors import CheckpointError, ResourceError


def save(folder, value=1.0, **trainer):
    save_checkpoint(
        folder,
        weights={"w": torch.full((3, 2), value)},
        description={"epoch": int(value), "model": {"name": "unet"}},
        trainer={"step": int(value), **trainer},
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_comes_back_as_it_was(tmp_path):
    save(tmp_path / "last", 2.0, momentum=torch.arange(3.0))
    checkpoint = load_checkpoint(tmp_path / "last")
    assert torch.equal(checkpoint.weights["w"], torch.full((3, 2), 2.0))
    assert checkpoint.trainer["step"] == 2
    assert torch.equal(checkpoint.trainer["momentum"], torch.arange(3.0))
    assert checkpoint.description["model"] == {"name": "unet"}


def test_weights_of_any_memory_layout_come_back(tmp_path):
    weights = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "last", weights={"w": weights}, description={}, trainer={})
    assert torch.equal(load_checkpoint(tmp_path / "last").weights["w"], weights)


def test_holds_the_three_files_and_nothing_else_stays(tmp_path):
    save(tmp_path / "last")
    assert names(tmp_path / "last") == ["manifest.json", "model.safetensors", "trainer.pt"]
    assert names(tmp_path) == ["last"]


def test_the_last_one_becomes_the_previous_one(tmp_path):
    for value in (1.0, 2.0, 3.0):
        save(tmp_path / "last", value)
    assert names(tmp_path) == ["last", "previous"]
    assert load_checkpoint(tmp_path / "previous").trainer["step"] == 2


def test_the_best_one_is_replaced(tmp_path):
    save(tmp_path / "best", 1.0)
    save(tmp_path / "best", 2.0)
    assert names(tmp_path) == ["best"]
    assert load_checkpoint(tmp_path / "best").trainer["step"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_previous_one_offered(tmp_path, name, damage):
    save(tmp_path / "last", 1.0)
    save(tmp_path / "last", 2.0)
    path = tmp_path / "last" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-7])
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path / "last")
    assert name in str(raised.value) and "--checkpoint previous" in str(raised.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "sha256": []}']
)
def test_a_damaged_manifest_is_an_error(tmp_path, content):
    save(tmp_path / "last")
    (tmp_path / "last" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_checkpoint(tmp_path / "last")


def test_a_changed_manifest_is_an_error(tmp_path):
    save(tmp_path / "last")
    path = tmp_path / "last" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["name"] = "attention-unet"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load_checkpoint(tmp_path / "last")


def test_a_damaged_previous_one_is_not_offered(tmp_path):
    save(tmp_path / "last", 1.0)
    save(tmp_path / "last", 2.0)
    for name in ("last", "previous"):
        (tmp_path / name / "trainer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path / "last")
    assert "--checkpoint" not in str(raised.value)


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"last.*manifest\.json is missing"):
        load_checkpoint(tmp_path / "last")


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path / "last", weights={}, description={}, trainer={"x": Evil()})
        load_checkpoint(tmp_path / "last")
    assert not (tmp_path / "touched").exists()


_LIMITED = """
import resource, sys, torch
from lungkit.errors import ResourceError
from lungkit.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big, small = torch.zeros(100_000), torch.zeros(1)
weights, state = (big, small) if sys.argv[2] == "weights" else (small, big)
try:
    save_checkpoint(sys.argv[1], weights={"w": weights}, description={}, trainer={"s": state})
except ResourceError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
@pytest.mark.parametrize("what", ["weights", "trainer"])
def test_a_limit_on_files_is_told_and_leaves_the_old_checkpoint(tmp_path, what):
    save(tmp_path / "last", 1.0)
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "last"), what]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "last: checkpoint not written, a file would be larger than a limit allows" in done.stderr
    assert names(tmp_path) == ["last"]
    assert load_checkpoint(tmp_path / "last").trainer["step"] == 1


def test_no_space_for_the_manifest_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "last", 1.0)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ResourceError, match="disk or quota is full"):
        save(tmp_path / "last", 2.0)
    monkeypatch.undo()
    assert names(tmp_path) == ["last"]
    assert load_checkpoint(tmp_path / "last").trainer["step"] == 1


def test_leftovers_of_a_crash_are_not_taken_for_a_checkpoint(tmp_path):
    save(tmp_path / ".0123456789ab.new-last", 7.0)
    save(tmp_path / "last", 2.0)
    assert names(tmp_path) == ["last"]
    assert load_checkpoint(tmp_path / "last").trainer["step"] == 2


def test_a_best_one_that_a_crash_left_aside_comes_back(tmp_path):
    save(tmp_path / "best", 3.0)
    (tmp_path / "best").rename(tmp_path / ".old-best")
    recover_checkpoint(tmp_path / "best")
    assert names(tmp_path) == ["best"]


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("renames", [1, 2])
def test_a_new_one_that_a_kill_kept_from_its_name_gets_it(tmp_path, monkeypatch, name, renames):
    save(tmp_path / name, 1.0)
    rename, done = Path.rename, []

    def killed(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        save(tmp_path / name, 2.0)
    recover_checkpoint(tmp_path / name)
    assert load_checkpoint(tmp_path / name).trainer["step"] == 2
    assert names(tmp_path) == (["last", "previous"] if name == "last" else ["best"])


def test_a_damaged_new_one_of_a_kill_goes(tmp_path):
    save(tmp_path / "last", 1.0)
    save(tmp_path / "other", 2.0)
    (tmp_path / "other" / "trainer.pt").write_bytes(b"")
    (tmp_path / "other").rename(tmp_path / ".0123456789ab.new-last")
    recover_checkpoint(tmp_path / "last")
    assert names(tmp_path) == ["last"] and load_checkpoint(tmp_path / "last").trainer["step"] == 1


def test_a_description_can_be_added_to(tmp_path):
    save(tmp_path / "best", 2.0)
    describe_checkpoint(tmp_path / "best", postprocessing={"fill_holes": True}, epoch=5)
    checkpoint = load_checkpoint(tmp_path / "best")
    assert checkpoint.description["postprocessing"] == {"fill_holes": True}
    assert checkpoint.description["epoch"] == 5 and checkpoint.description["model"] == {"name": "unet"}
    assert torch.equal(checkpoint.weights["w"], torch.full((3, 2), 2.0))
    assert names(tmp_path / "best") == ["manifest.json", "model.safetensors", "trainer.pt"]


def test_a_damaged_checkpoint_is_not_described(tmp_path):
    save(tmp_path / "best")
    (tmp_path / "best" / "trainer.pt").write_bytes(b"")
    before = (tmp_path / "best" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"trainer\.pt is damaged"):
        describe_checkpoint(tmp_path / "best", note="new")
    assert (tmp_path / "best" / "manifest.json").read_bytes() == before


def test_a_checkpoint_that_is_not_there_is_not_described(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        describe_checkpoint(tmp_path / "best", note="new")


def test_a_full_disk_leaves_the_description_as_it_was(tmp_path, monkeypatch):
    save(tmp_path / "best")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="disk or quota is full"):
        describe_checkpoint(tmp_path / "best", note="new")
    assert "note" not in load_checkpoint(tmp_path / "best").description
    assert names(tmp_path / "best") == ["manifest.json", "model.safetensors", "trainer.pt"]


def test_a_file_system_that_cannot_flush_folders_is_no_obstacle(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", refuse_folders)
    save(tmp_path / "last", 1.0)
    save(tmp_path / "last", 2.0)
    assert load_checkpoint(tmp_path / "last").trainer["step"] == 2


def test_folders_are_not_opened_on_windows(tmp_path, monkeypatch):
    opened, flags = [], []
    real_open = os.open

    def windows_open(path, how, *rest, **more):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        opened.append(Path(path).name)
        flags.append(how & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR))
        return real_open(path, how, *rest, **more)

    monkeypatch.setattr(
        "lungkit._atomic.os",
        SimpleNamespace(
            name="nt",
            open=windows_open,
            fsync=os.fsync,
            close=os.close,
            O_RDWR=os.O_RDWR,
            PathLike=os.PathLike,
        ),
    )
    save(tmp_path / "last")
    assert sorted(opened) == ["manifest.json", "model.safetensors", "trainer.pt"]
    assert set(flags) == {os.O_RDWR}  # Windows flushes what was opened for writing only
    assert load_checkpoint(tmp_path / "last").trainer["step"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_has_the_mode_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(tmp_path / "last")
        describe_checkpoint(tmp_path / "last", note="new")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "last").iterdir()}
    assert modes == {mode}


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "large"])
def test_a_file_that_could_be_read_for_ever_is_refused(tmp_path, name, kind):
    save(tmp_path / "last")
    path = tmp_path / "last" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif name == "manifest.json":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        return  # read once, in pieces, by its hash
    with pytest.raises(CheckpointError, match=f"{name} (is not a regular file|is damaged)"):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_a_deep_manifest_is_an_error_in_words(tmp_path, depth):
    save(tmp_path / "last")
    (tmp_path / "last" / "manifest.json").write_text('{"format": 1, "a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match="nested more than 64 levels"):
        load_checkpoint(tmp_path / "last")
