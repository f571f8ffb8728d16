"""Preprocessed cases as memory maps on disk, keyed by what went into them and checked when opened."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungkit._atomic import atomic_folder
from lungkit._reading import check_regular, read_json
from lungkit.data.dataset import IGNORE_INDEX, Case, Dataset, read_case
from lungkit.data.geometry import plan_geometry
from lungkit.data.open_arrays import OpenArrays
from lungkit.data.preprocessing import Preprocessing, ScanSlices, preprocess_label, quantise
from lungkit.data.readers import ReaderCodes, read_codes
from lungkit.data.slices import chunks
from lungkit.data.source_hash import SETTLED_NS, SourceHashes
from lungkit.data.volume import DEFAULT_MAX_VOXELS, NanPolicy
from lungkit.errors import ResourceError, UsageError

_LOG = logging.getLogger("lungkit")

_FORMAT = 2
_MAX_FOREGROUND = 20_000
_ARRAYS = ("image", "label", "foreground")
_OPEN_ARRAYS = OpenArrays()
_TOKENS = itertools.count()
# Files whose contents this process has checked, and what told them from others then.
_CHECKED: dict[Path, tuple[int, ...]] = {}


@dataclass(frozen=True, eq=False)
class CachedCase:
    """One preprocessed case; its arrays are memory maps, opened when used and closed when many others were since.

    Normalised intensity = ``image`` * ``slope`` + ``intercept``.
    """

    case_id: str
    directory: Path
    shape: tuple[int, int, int]
    """(Z, Y, X)."""
    spacing_mm: tuple[float, float, float]
    """(z, y, x)."""
    slope: float
    intercept: float
    class_voxels: tuple[int, ...]
    """Voxels of each class index."""

    def __post_init__(self) -> None:
        # The files of a folder that was made again are not those of an older object.
        object.__setattr__(self, "_token", next(_TOKENS))

    @property
    def image(self) -> np.ndarray:
        """int16 (C, Z, Y, X)."""
        return self._open("image")

    @property
    def label(self) -> np.ndarray:
        """uint8 (Z, Y, X): class indices, 255 to ignore."""
        return self._open("label")

    @property
    def foreground(self) -> np.ndarray:
        """int32 (N, 3): voxel indices (z, y, x) of foreground, at most 20,000 and every class among them."""
        return self._open("foreground")

    @property
    def codes(self) -> np.ndarray:
        """uint8 (Z, Y, X): what the readers say, see :class:`lungkit.data.readers.ReaderCodes`; 255 to ignore.

        For cases of a cache that was asked for them.
        """
        return self._open("codes")

    def image_float(self) -> np.ndarray:
        """The whole normalised image, float32 (C, Z, Y, X), in memory."""
        image = self.image.astype(np.float32)
        image *= np.float32(self.slope)
        image += np.float32(self.intercept)
        return image

    def _open(self, name: str) -> np.ndarray:
        return _OPEN_ARRAYS.get((self._token, name), self.directory / f"{name}.npy")  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_token"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


class CaseCache:
    """Preprocessed cases of ``dataset`` in ``directory``.

    An entry is keyed by the contents of the source files (BLAKE2b), the preprocessing (labels included) and
    the version of this format, so a changed file or option gives another entry and never a stale one. Several
    processes may prepare the same case at once: each writes a folder of its own and the first to finish
    stays. Entries carry checksums (CRC-32, 2 GB a second and core) over every byte, which are compared when a
    process first opens an entry; one that is damaged is made again, with a warning.

    Args:
        directory: where entries go; made where absent.
        dataset: the dataset.
        preprocessing: how to preprocess.
        max_voxels: refuse larger scans, before and after resampling.
        nan_policy: what to do with voxels that are not finite.
        codes: keep what the readers say too, under these codes.

    Raises:
        UsageError: ``directory`` cannot be made.

    Example:
        >>> import tempfile
        >>> from lungkit.data import fingerprint_dataset, open_dataset, plan_preprocessing, write_phantom_dataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> dataset = open_dataset(write_phantom_dataset(folder / "data", cases=2, shape=(8, 32, 32), dims=3))
        >>> plan = plan_preprocessing(fingerprint_dataset(dataset, [dataset.cases[0].case_id]))
        >>> case = CaseCache(folder / "cache", dataset, plan).prepare(dataset.cases[0].case_id)
        >>> case.image.shape, case.image.dtype.name, case.label.shape
        ((1, 8, 32, 32), 'int16', (8, 32, 32))
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        dataset: Dataset,
        preprocessing: Preprocessing,
        *,
        max_voxels: int = DEFAULT_MAX_VOXELS,
        nan_policy: NanPolicy = NanPolicy.REFUSE,
        codes: ReaderCodes | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.max_voxels = max_voxels
        self.nan_policy = nan_policy
        self.codes = codes
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"directory: {self.directory} cannot be made ({error.strerror}); name a writable one"
            ) from error
        self._hashes = SourceHashes(self.directory / "sources")

    def prepare(self, case_id: str) -> CachedCase:
        """Open the entry of ``case_id``, making it first where it is absent or damaged.

        Raises:
            UsageError: no such case, or it has no label.
            DataError: a source file cannot be used.
            ResourceError: the disk is full.
        """
        case = self.dataset.case(case_id)
        if case.label is None:
            raise UsageError(f"case_id: {case_id} has no label; the cache is for training cases")
        key = self._key((*case.images, case.label, *(case.readers if self.codes is not None else ())))
        folder = self.directory / f"{case_id[:50]}-{key[:20]}"
        if folder.exists():
            opened, damage = self._open(folder, case_id, key)
            if opened is not None:
                return opened
            _LOG.warning("%s: cached case is damaged (%s); making it again", folder, damage)
        self._build(case, key, folder)
        opened, damage = self._open(folder, case_id, key)
        if opened is None:
            raise ResourceError(f"{folder}: {damage} just after it was written; check the disk")
        return opened

    def prepare_all(
        self,
        case_ids: Iterable[str],
        *,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[CachedCase]:
        """:meth:`prepare` for many cases, in order, on ``workers`` threads (the number of CPUs, at most 4).

        ``progress`` is called with (cases done, cases in all).
        """
        names = list(case_ids)
        prepared = []
        pool = ThreadPoolExecutor(max_workers=workers or min(4, os.cpu_count() or 1))
        try:
            for done, case in enumerate(pool.map(self.prepare, names), start=1):
                prepared.append(case)
                if progress is not None:
                    progress(done, len(names))
        finally:
            pool.shutdown(cancel_futures=True)
        return prepared

    def _key(self, sources: tuple[Path, ...]) -> str:
        content = {
            "format": _FORMAT,
            "sources": [self._hashes.of(path) for path in sources],
            "preprocessing": self.preprocessing.to_dict(),
        }
        if self.nan_policy is not NanPolicy.REFUSE:
            content["nan"] = self.nan_policy.value
        if self.codes is not None:
            content["codes"] = [self.codes.readers, self.codes.classes]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()

    def _build(self, case: Case, key: str, folder: Path) -> None:
        volumes, mask = read_case(
            case, self.preprocessing.label_map, max_voxels=self.max_voxels, nan_policy=self.nan_policy
        )
        if mask is None:
            raise UsageError(f"case_id: {case.case_id} has no label")
        plan = self.preprocessing
        geometry = plan_geometry(volumes[0], target_spacing_mm=plan.target_spacing_mm)
        slices = ScanSlices(volumes, plan, geometry, max_voxels=self.max_voxels)
        image = np.empty(slices.shape, np.int16)
        for first, last in chunks(geometry.shape[0], image[:, 0].size):
            image[:, first:last] = quantise(slices.read(first, last).numpy(), plan)
        label = preprocess_label(mask, geometry)
        slope, intercept = plan.quantisation
        num_classes = 1 + max(i for i in plan.label_map.values() if i != IGNORE_INDEX)
        arrays = {
            "image": image,
            "label": label,
            "foreground": _foreground(label, num_classes),
        }
        if self.codes is not None:
            said = read_codes(case, self.codes, plan.label_map, volumes[0], max_voxels=self.max_voxels)
            codes = preprocess_label(said, geometry)
            codes[label == IGNORE_INDEX] = IGNORE_INDEX
            arrays["codes"] = codes
        with atomic_folder(folder) as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            entry = {
                "key": key,
                "case_id": case.case_id,
                "shape": list(label.shape),
                "spacing_mm": list(geometry.spacing_mm),
                "slope": slope,
                "intercept": intercept,
                "class_voxels": [int(np.count_nonzero(label == index)) for index in range(num_classes)],
                "files": {name: _checksums(temporary / f"{name}.npy") for name in arrays},
            }
            record = {"entry": entry, "crc32": zlib.crc32(json.dumps(entry).encode())}
            (temporary / "case.json").write_text(json.dumps(record))
            # Looked at again only now: another process may have replaced a damaged entry while we worked.
            if folder.exists() and self._open(folder, case.case_id, key)[0] is None:
                _discard(folder)

    def _open(self, folder: Path, case_id: str, key: str) -> tuple[CachedCase | None, str]:
        """The case in ``folder``, or None and what is wrong with it."""
        try:
            content = read_json(folder / "case.json")
            entry = content["entry"]
            if zlib.crc32(json.dumps(entry).encode()) != content["crc32"] or entry["key"] != key:
                return None, "case.json does not match its checksum"
            for name in (*_ARRAYS, *(["codes"] if self.codes is not None else [])):
                damage = _damage(folder / f"{name}.npy", entry["files"][name])
                if damage:
                    return None, f"{name}.npy {damage}"
            case = CachedCase(
                case_id=case_id,
                directory=folder,
                shape=tuple(entry["shape"]),
                spacing_mm=tuple(entry["spacing_mm"]),
                slope=entry["slope"],
                intercept=entry["intercept"],
                class_voxels=tuple(entry["class_voxels"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"{error.__class__.__name__}: {error}"
        with contextlib.suppress(OSError):  # a cache that somebody else made may be read-only
            os.utime(folder / "case.json")  # what pruning goes by
        return case, ""


def _foreground(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxel indices (N, 3) of foreground; each class keeps its share of the limit: none is crowded out."""
    flat = label.ravel()
    indices = [np.flatnonzero(flat == index) for index in range(1, num_classes)]
    if sum(found.size for found in indices) > _MAX_FOREGROUND:
        random = np.random.default_rng(0)
        share = _MAX_FOREGROUND // len(indices)
        indices = [
            np.sort(random.choice(found, share, replace=False)) if found.size > share else found
            for found in indices
        ]
    return np.stack(np.unravel_index(np.concatenate(indices), label.shape), axis=1).astype(np.int32)


def _checksums(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _crc_of_file(path)}


def _damage(path: Path, expected: dict[str, int]) -> str:
    """What is wrong with a file; every byte of it is read, once in a process while the file stays as it is."""
    check_regular(path)
    status = path.stat()
    if status.st_size != expected["bytes"]:
        return f"has {status.st_size} bytes, expected {expected['bytes']}"
    identity = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, expected["crc32"])
    if _CHECKED.get(path) == identity:
        return ""
    if _crc_of_file(path) != expected["crc32"]:
        return "does not match its checksum"
    if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
        _CHECKED[path] = identity
    return ""


def _crc_of_file(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _discard(folder: Path) -> None:
    """Remove ``folder`` under another name first, so that nobody finds half of it under its own."""
    doomed = folder.with_name(f".{uuid.uuid4().hex[:12]}.old-{folder.name[-50:]}")
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return  # another process was quicker
    except OSError as error:
        raise ResourceError(
            f"{folder}: damaged and cannot be removed ({error.strerror}); remove it"
        ) from error
    shutil.rmtree(doomed, ignore_errors=True)
