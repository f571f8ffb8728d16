"""Many scans: the next one is read and the last one written while one is predicted; one that fails stops no other."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lungkit.data.volume import DEFAULT_MAX_VOXELS, NanPolicy
from lungkit.errors import Interrupted, LungkitError, ResourceError, UsageError, of_system, shorten
from lungkit.inference import Predictor
from lungkit.pipeline.inputs import LoadedScan, ScanInput
from lungkit.pipeline.outputs import OutputFiles, write_results
from lungkit.pipeline.records import Records

_LOG = logging.getLogger("lungkit")


class Watcher(Protocol):
    """What shows the progress."""

    def patches(self, name: str, done: int, total: int) -> None:
        """Patches of the scan that is being predicted."""

    def scan_done(self, name: str, done: int, total: int) -> None:
        """Scans done, whether well or not."""


@dataclass
class Outcome:
    """What became of the scans, by name; ``failed`` says why."""

    predicted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    exit_code: int = 0


@dataclass(frozen=True)
class Wanted:
    """What to keep of a prediction beside the mask."""

    probabilities: bool = False
    attention: bool = False


def predict_scans(
    predictor: Predictor,
    scans: Sequence[ScanInput],
    files: OutputFiles,
    records: Records | None,
    *,
    wanted: Wanted | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    watcher: Watcher | None = None,
    overwrite: bool = False,
    nan_policy: NanPolicy = NanPolicy.REFUSE,
) -> Outcome:
    """Predict and write every scan that is not done yet.

    Two threads help: one reads the next scan, one writes the last; no more than three scans are in memory. A scan that
    cannot be read, predicted or written is named in the outcome, and the others go on; only a full disk, which would
    fail them all, ends the run.

    Args:
        predictor: predicts one scan.
        scans: what to predict.
        files: where results go.
        records: what is done already; each scan is added to it. None for a single mask file.
        wanted: what to keep beside the mask.
        max_voxels: refuse larger scans.
        watcher: shows the progress.
        overwrite: replace files that lungkit did not write; a scan whose results would replace one fails otherwise.
        nan_policy: what to do with voxels that are not finite.

    Raises:
        Interrupted: Ctrl-C; what was predicted is written.
        ResourceError: the disk is full.
    """
    run = _Run(predictor, files, records, wanted or Wanted(), max_voxels, watcher, overwrite, nan_policy)
    return run.predict(scans)


class _Run:
    def __init__(
        self,
        predictor: Predictor,
        files: OutputFiles,
        records: Records | None,
        wanted: Wanted,
        max_voxels: int,
        watcher: Watcher | None,
        overwrite: bool,
        nan_policy: NanPolicy,
    ) -> None:
        self.predictor, self.files, self.records = predictor, files, records
        self.wanted, self.max_voxels, self.watcher = wanted, max_voxels, watcher
        self.overwrite, self.nan_policy = overwrite, nan_policy
        self.outcome = Outcome()
        self._total = 0
        self._fingerprints: dict[str, str] = {}

    def predict(self, scans: Sequence[ScanInput]) -> Outcome:
        started = time.perf_counter()
        self._total = len(scans)
        todo = [scan for scan in scans if not self._is_done(scan)]
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            following = self._read_ahead(reader, todo, 0)
            writing: Future[None] | None = None
            try:
                for index, scan in enumerate(todo):
                    loading, following = following, self._read_ahead(reader, todo, index + 1)
                    predicted = self._predict_one(scan, loading)
                    if writing is not None:
                        writing.result()
                        writing = None
                    if predicted is not None:
                        writing = writer.submit(self._write, scan, *predicted)
                if writing is not None:
                    writing.result()
            except KeyboardInterrupt:
                if writing is not None:
                    writing.result()
                raise Interrupted(
                    f"interrupted after {len(self.outcome.predicted)} scans; the same command goes on from there"
                ) from None
        self.outcome.seconds = time.perf_counter() - started
        return self.outcome

    def _is_done(self, scan: ScanInput) -> bool:
        try:
            # Before it is read: a file that changes while it is read is predicted again next time.
            self._fingerprints[scan.name] = scan.fingerprint()
        except LungkitError:
            return False  # reading it will say why
        if self.records is None or not self.records.is_done(scan.name, self._fingerprints[scan.name]):
            return False
        self.outcome.skipped.append(scan.name)
        self._finished(scan.name)
        return True

    def _read_ahead(
        self, reader: ThreadPoolExecutor, todo: Sequence[ScanInput], index: int
    ) -> Future[LoadedScan] | None:
        if index == len(todo):
            return None
        return reader.submit(todo[index].load, max_voxels=self.max_voxels, nan_policy=self.nan_policy)

    def _predict_one(
        self, scan: ScanInput, loading: Future[LoadedScan] | None
    ) -> tuple[LoadedScan, Any] | None:
        try:
            if loading is None:
                raise UsageError(f"{scan.name}: was not read")
            loaded = loading.result()
            self._spare_files_of_others(scan)
            self.predictor.check_scan(loaded.volumes)
            _LOG.info("%s: %s", scan.name, self.predictor.estimate(loaded.volumes))
            watcher = self.watcher
            step = None if watcher is None else lambda done, total: watcher.patches(scan.name, done, total)
            prediction = self.predictor(
                loaded.volumes,
                probabilities=self.wanted.probabilities,
                attention=self.wanted.attention,
                progress=step,
            )
            return loaded, prediction
        except Exception as error:
            self._failed(scan, error)
            return None

    def _files(self, scan: ScanInput) -> list[Path]:
        classes = self.predictor.labels if self.wanted.probabilities else ()
        return self.files.of(scan.name, classes, attention=self.wanted.attention)

    def _name_of_report(self, scan: ScanInput) -> str:
        return str(self.files.report(scan.name).relative_to(self.files.folder))

    def _page(self, scan: ScanInput) -> dict[str, None]:
        page = self.files.page_file(scan.name)
        return {str(page.relative_to(self.files.folder)): None} if self.files.page else {}

    def _spare_files_of_others(self, scan: ScanInput) -> None:
        if self.records is None or self.overwrite:
            return
        strange = self.records.not_ours(scan.name, self._files(scan))
        if strange:
            raise UsageError(
                f"{shorten(strange)} was not written by lungkit; move it away, or replace it with --overwrite"
            )

    def _write(self, scan: ScanInput, loaded: LoadedScan, prediction: Any) -> None:
        try:
            if self.records is not None:
                self.records.start(scan.name, self._files(scan))
            report = write_results(self.files, scan, loaded, prediction, self.predictor)
        except ResourceError:
            raise  # the disk is full, for the next scan as well
        except Exception as error:
            self._failed(scan, error)
            return
        classes = report["classes"]
        if self.records is not None:
            self.records.add(
                {
                    "scan": scan.name,
                    "status": "ok",
                    "seconds": report["seconds"],
                    "classes": {
                        name: {**found, "lesions": len(found["lesions"])} for name, found in classes.items()
                    },
                    "warnings": report["warnings"],
                    "input": self._fingerprints.get(scan.name),
                    # No digest of the report, which tells the others', nor of the page, which may be made anew.
                    "files": {**report["files"], self._name_of_report(scan): None, **self._page(scan)},
                }
            )
        self.outcome.predicted.append(scan.name)
        found = ", ".join(
            f"{name} {entry['volume_ml']:.2f} ml in {len(entry['lesions'])} "
            f"connected lesion{'s' if len(entry['lesions']) != 1 else ''}"
            for name, entry in classes.items()
        )
        _LOG.info("%s: %s; %.1f s", scan.name, found, prediction.seconds)
        self._finished(scan.name)

    def _failed(self, scan: ScanInput, error: Exception) -> None:
        known = error if isinstance(error, LungkitError) else of_system(error)
        message = str(known) if known is not None else f"{type(error).__name__}: {error}"
        # An error that lungkit does not know is a mistake of ours: its traceback helps to mend it.
        _LOG.error("%s: not predicted: %s", scan.name, message, exc_info=error if known is None else None)
        self.outcome.failed[scan.name] = message
        self.outcome.exit_code = max(self.outcome.exit_code, 1 if known is None else known.exit_code)
        if self.records is not None:
            self.records.add({"scan": scan.name, "status": "failed", "error": message})
        self._finished(scan.name)

    def _finished(self, name: str) -> None:
        if self.watcher is not None:
            done = len(self.outcome.predicted) + len(self.outcome.skipped) + len(self.outcome.failed)
            self.watcher.scan_done(name, done, self._total)
