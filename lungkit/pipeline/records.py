"""What has been done in an output folder: one line a scan, by any number of processes, and their sum."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lungkit._atomic import claim_folder, write_json_atomic, write_text_atomic
from lungkit._reading import check_regular, read_json
from lungkit._text import csv_cell
from lungkit.checkpoint import sha256_of
from lungkit.errors import DataError

RESULTS = "results.jsonl"
_TABLE = "results.csv"
_PLAN = "prediction.json"
_MEASURES = ("volume_ml", "longest_diameter_mm", "lesions")
_LONGEST_LINE = 16 << 20
_SHARD = re.compile(r"results-(\d+)-of-(\d+)\.jsonl")


class Records:
    """The records of one process: ``results.jsonl``, or ``results-I-of-N.jsonl`` of share I of N.

    A row is appended and flushed when its scan is done. Rows of other shares and of earlier calls are read too.
    """

    def __init__(self, folder: Path, shard: tuple[int, int]) -> None:
        self.folder = folder
        index, count = shard
        self.path = folder / (RESULTS if count == 1 else f"results-{index}-of-{count}.jsonl")
        self._rows = {row["scan"]: row for path in _files(folder) for row in _read(path)}
        self._lock = threading.Lock()
        self._journal = folder / f".{self.path.stem}-unfinished.json"
        self._writing = _unfinished(self._journal)
        self._begun = set(self._writing)
        self._mend()

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether the scan was predicted from the same files and all that was written is still as it was."""
        row = self._rows.get(name)
        if row is None or row.get("status") != "ok" or row.get("input") != fingerprint:
            return False
        files: dict[str, str | None] = row.get("files") or {}
        try:
            return bool(files) and all(
                digest in (None, sha256_of(self.folder / file)) for file, digest in files.items()
            )
        except (OSError, ValueError):
            return False

    def not_ours(self, name: str, files: Iterable[Path]) -> list[Path]:
        """Those of ``files`` that exist and that no prediction of the scan wrote."""
        ours = {*(self._rows.get(name, {}).get("files") or ()), *self._writing.get(name, ())}
        found = [file for file in files if file.exists()]
        if any(str(file.relative_to(self.folder)) not in ours for file in found):
            # Another process may have begun in the same folder since; what it has written is no stranger's either.
            for row in (row for path in _files(self.folder) for row in _read(path) if row["scan"] == name):
                ours |= {*(row.get("files") or ())}
            for journal in self.folder.glob(".results*-unfinished.json"):
                ours |= {*_unfinished(journal).get(name, ())}
        return [file for file in found if str(file.relative_to(self.folder)) not in ours]

    def start(self, name: str, files: Iterable[Path]) -> None:
        """Note which files are about to be written: those that a crash leaves are then known for ours."""
        with self._lock:
            self._writing[name] = [str(file.relative_to(self.folder)) for file in files]
            self._begun.add(name)
            self._write_journal()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            ResourceError: the disk is full.
        """
        # A scan that fails leaves the files of the time before where they are, and some of this time: they stay ours.
        ours = dict(self._rows.get(row["scan"], {}).get("files") or {})
        for name in self._writing.get(row["scan"], ()):
            if name not in ours and (self.folder / name).exists():
                ours[name] = None
        row = {"files": ours, **row}
        self._rows[row["scan"]] = row
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self._writing.pop(row["scan"], None) is not None:
                self._write_journal()

    def write(self) -> None:
        """Write ``results.csv`` of all scans; of a share, whose rows are put together by merging, the records alone."""
        if self.path.name == RESULTS:
            rows = [self._rows[name] for name in sorted(self._rows)]
            write_text_atomic(self.folder / _TABLE, _table(rows))
        else:
            self.path.touch()

    def _write_journal(self) -> None:
        # Of another process that does the same at once, what it is writing stays noted.
        theirs = {
            name: files for name, files in _unfinished(self._journal).items() if name not in self._begun
        }
        if self._writing or theirs:
            write_json_atomic(self._journal, {**theirs, **self._writing})
        else:
            self._journal.unlink(missing_ok=True)

    def _mend(self) -> None:
        """End a last line that was cut short, so that the next row begins on a line of its own."""
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def claim(folder: Path, plan: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Make the output folder, or go on in one that the same models and options have begun.

    Raises:
        UsageError: it holds something else, or cannot be written.
    """
    if overwrite:
        for old in (*_files(folder), folder / _TABLE):
            old.unlink(missing_ok=True)
    advice = "name another folder, or replace what it holds with --overwrite"
    claim_folder(folder, _PLAN, plan, holds="predictions", overwrite=overwrite, advice=advice)


def merge(folder: Path) -> list[dict[str, Any]]:
    """Put the records of all shares together: ``results.jsonl`` and ``results.csv``, a row a scan, sorted by name.

    Returns:
        The rows.

    Raises:
        DataError: there are none, or a share of the largest division is missing.
    """
    files = _files(folder)
    if not files:
        raise DataError(
            f"{folder}: no {RESULTS} and no records of shares; is this a folder of lungkit-predict?"
        )
    shares = [match for match in (_SHARD.fullmatch(path.name) for path in files) if match]
    for count in sorted({int(match[2]) for match in shares}):
        missing = sorted(set(range(count)) - {int(match[1]) for match in shares if int(match[2]) == count})
        if missing:
            raise DataError(
                f"{folder}: share {missing[0]} of {count} has no records; run it with --shard {missing[0]}/{count}"
            )
    ordered = read_records(folder)
    write_text_atomic(folder / RESULTS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered))
    write_text_atomic(folder / _TABLE, _table(ordered))
    for path in files:
        if path.name != RESULTS:
            path.unlink()
    return ordered


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The newest row of every scan, of all processes, sorted by name."""
    rows = {row["scan"]: row for path in _files(folder) for row in _read(path)}
    return [rows[name] for name in sorted(rows)]


def _files(folder: Path) -> list[Path]:
    """Records from the oldest to the newest, so that later rows of a scan replace earlier ones."""
    found = [
        path for path in folder.glob("results*.jsonl") if path.name == RESULTS or _SHARD.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _read(path: Path) -> Iterable[dict[str, Any]]:
    """Rows as :class:`Records` writes them; the scan of any other line is done again."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                row = _row(line)
                if row is not None:
                    yield row
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: records cannot be read ({error}); move the file away") from error


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode(errors="replace"))
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # cut short by a crash, or half of a surrogate pair in it
        return None
    if not isinstance(row, dict) or not isinstance(row.get("scan"), str):
        return None
    files, classes = row.get("files", {}), row.get("classes", {})
    numbers = (int, float, type(None))
    sound = (
        isinstance(files, dict)
        and all(isinstance(digest, (str, type(None))) for digest in files.values())
        and isinstance(classes, dict)
        and all(isinstance(found, dict) for found in classes.values())
        and all(isinstance(value, numbers) for found in classes.values() for value in _measures(found))
        and all(isinstance(row.get(key, ""), str) for key in ("status", "error", "input"))
        and isinstance(row.get("seconds"), numbers)
    )
    return row if sound else None


def _unfinished(journal: Path) -> dict[str, list[str]]:
    """Scans that were being written, and their files; none where nobody left a note that can be read."""
    try:
        content = read_json(journal)
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {
        name: files
        for name, files in entries
        if isinstance(files, list) and all(isinstance(file, str) for file in files)
    }


def _measures(found: Mapping[str, Any]) -> list[Any]:
    return [found.get(key) for key in _MEASURES]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    classes = sorted({name for row in rows for name in row.get("classes", {})})
    columns = ["scan", "status", "seconds"]
    for name in classes:
        columns += [f"{name}: volume_ml", f"{name}: longest_diameter_mm", f"{name}: lesions"]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*map(csv_cell, columns), "error"])
    for row in rows:
        cells = [csv_cell(row["scan"]), row.get("status", ""), row.get("seconds", "")]
        for name in classes:
            found = row.get("classes", {}).get(name, {})
            cells += [found.get(key, "") for key in _MEASURES]
        writer.writerow([*cells, csv_cell(row.get("error", ""))])
    return table.getvalue()
