"""Checkpoints: a folder that is whole or absent, verified by its own checksums, readable without pickle's powers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import lungkit
from lungkit._atomic import atomic_folder, flush, write_text_atomic
from lungkit._reading import check_regular, read_json
from lungkit.errors import CheckpointError, ResourceError, reason_of_full

FORMAT = 1
LAST, PREVIOUS, BEST = "last", "previous", "best"
_MANIFEST, _WEIGHTS, _TRAINER = "manifest.json", "model.safetensors", "trainer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` reads.

    ``description`` says how to use the weights without the run: model options, preprocessing, labels, patch size.
    """

    folder: Path
    weights: dict[str, Tensor]
    description: dict[str, Any]
    trainer: dict[str, Any] | None


def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> None:
    """Write ``folder``: ``model.safetensors``, ``trainer.pt`` and ``manifest.json`` with their SHA-256.

    Everything is written under a temporary name beside ``folder``, flushed to the disk and renamed. A checkpoint
    ``last`` that was there becomes ``previous`` beside it; any other is replaced. At every moment one of the names
    holds a whole checkpoint, the old or the new one.

    Raises:
        ResourceError: the disk is full; what was there before is untouched.
    """
    folder = Path(folder)
    _clear_up(folder)
    # A name of its own: a crash before the last rename must not leave what a later call takes for its work.
    new = folder.with_name(f".{uuid.uuid4().hex[:12]}.new-{folder.name}")
    try:
        _write(new, weights, description, trainer)
    except ResourceError as error:
        raise ResourceError(
            f"{folder}: checkpoint not written, {reason_of_full(error.__cause__)}; what was there before is untouched: "
            "free some space and go on with --resume"
        ) from error
    _put_in_place(new, folder)


def describe_checkpoint(folder: str | os.PathLike[str], **entries: Any) -> None:
    """Add ``entries`` to the description of a checkpoint, or replace them; its weights are not touched.

    The manifest is replaced at once: a reader sees the old or the new one, and either is whole.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ResourceError: the disk is full; the checkpoint is as it was.
    """
    folder = Path(folder)
    try:
        manifest = {**_verified_manifest(folder), **entries}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a usable checkpoint ({error})") from error
    manifest["sha256"][_MANIFEST] = _digest_of(manifest)
    write_text_atomic(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def recover_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Clear up after a crash in :func:`save_checkpoint`.

    A new checkpoint that was whole gets its name, as it would have; a ``best`` set aside comes back where there is
    none; unfinished folders go.
    """
    folder = Path(folder)
    for new in finished_saves(folder):
        _put_in_place(new, folder)
    _clear_up(folder)


def _clear_up(folder: Path) -> None:
    displaced = _displaced(folder)
    if displaced.name != PREVIOUS and displaced.exists():
        if folder.exists():
            shutil.rmtree(displaced, ignore_errors=True)
        else:
            displaced.rename(folder)
    for unfinished in folder.parent.glob(f".*new-{folder.name}"):
        shutil.rmtree(unfinished, ignore_errors=True)


def finished_saves(folder: str | os.PathLike[str]) -> list[Path]:
    """Whole checkpoints that a crash in :func:`save_checkpoint` kept from the name ``folder``, the newest last."""
    folder = Path(folder)
    name = re.compile(rf"\.[0-9a-f]{{12}}\.new-{re.escape(folder.name)}")
    found = [path for path in folder.parent.glob(f".*.new-{folder.name}") if name.fullmatch(path.name)]
    return sorted((path for path in found if _is_whole(path)), key=lambda path: path.stat().st_mtime_ns)


def load_checkpoint(folder: str | os.PathLike[str], *, with_trainer: bool = True) -> Checkpoint:
    """Read a checkpoint folder and verify it; nothing in it is executed.

    Args:
        folder: the checkpoint.
        with_trainer: read ``trainer.pt`` too; without it, the weights and their manifest are all that is needed.

    Raises:
        CheckpointError: it is missing, incomplete, damaged or of another format; names the file, and the previous
            checkpoint where that one is whole.
    """
    folder = Path(folder)
    try:
        manifest = _verified_manifest(folder, (_WEIGHTS, _TRAINER) if with_trainer else (_WEIGHTS,))
        weights = load_file(folder / _WEIGHTS)
        trainer = _load_trainer(folder / _TRAINER) if with_trainer else None
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        EOFError,
        SafetensorError,
    ) as error:
        raise CheckpointError(f"{folder}: not a usable checkpoint ({error}){_offer(folder)}") from error
    return Checkpoint(folder, weights, manifest, trainer)


def _put_in_place(new: Path, folder: Path) -> None:
    """Give a whole checkpoint its name; a kill between the two renames leaves it to :func:`recover_checkpoint`."""
    displaced = _displaced(folder)
    if folder.exists():
        shutil.rmtree(displaced, ignore_errors=True)
        folder.rename(displaced)
    new.rename(folder)
    flush(folder.parent)
    if displaced.name != PREVIOUS:
        shutil.rmtree(displaced, ignore_errors=True)


def _displaced(folder: Path) -> Path:
    """Where the checkpoint that a new one replaces is put."""
    return folder.with_name(PREVIOUS if folder.name == LAST else f".old-{folder.name}")


def _write(
    folder: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any], trainer: Mapping[str, Any]
) -> None:
    with atomic_folder(folder) as temporary:
        _save_weights(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary / _WEIGHTS
        )
        _save_trainer(dict(trainer), temporary / _TRAINER)
        # safetensors lets nobody but the owner read its files; the other file has the mode that the umask asks for.
        shutil.copymode(temporary / _TRAINER, temporary / _WEIGHTS)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "lungkit": lungkit.__version__,
            "torch": torch.__version__,
            "sha256": {name: sha256_of(temporary / name) for name in (_WEIGHTS, _TRAINER)},
            **description,
        }
        manifest["sha256"][_MANIFEST] = _digest_of(manifest)
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(weights, path)
    except SafetensorError as error:
        # safetensors hides the errno of a full disk in its message.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error


def _save_trainer(trainer: dict[str, Any], path: Path) -> None:
    # Through Python, whose errors say why a write fails; those of torch's own files do not.
    with path.open("wb") as file:
        try:
            torch.save(trainer, file)
        except RuntimeError as error:
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(path)) from error
            raise


def _load_trainer(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:  # torch's own message tells how to switch the protection off
        raise ValueError(
            f"{path.name} holds more than tensors and plain values, and was not loaded"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for bytes that are no archive of its own
        raise ValueError(f"{path.name} is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path.name} holds {type(state).__name__}, expected a dictionary")
    return state


def _verified_manifest(folder: Path, files: tuple[str, ...] = (_WEIGHTS, _TRAINER)) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path.name} is not of format {FORMAT}")
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or digests.get(_MANIFEST) != _digest_of(manifest):
        raise ValueError(f"{path.name} is damaged: its contents do not match its own SHA-256")
    for name in files:
        if sha256_of(folder / name) != digests.get(name):
            raise ValueError(f"{name} is damaged: its SHA-256 is not the one in {path.name}")
    return manifest


def _offer(folder: Path) -> str:
    previous = folder.with_name(PREVIOUS)
    if folder.name != LAST:
        return ""
    if not _is_whole(previous):
        return ""
    return f"; {previous} is whole: resume from it with --checkpoint {PREVIOUS}"


def _is_whole(folder: Path) -> bool:
    try:
        _verified_manifest(folder)
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return True


def _digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, apart from the SHA-256 that it says of itself."""
    digests = {name: value for name, value in manifest["sha256"].items() if name != _MANIFEST}
    return hashlib.sha256(json.dumps({**manifest, "sha256": digests}, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash of a file's contents, in hex; a ValueError where it is a pipe or a device."""
    check_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
