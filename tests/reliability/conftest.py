"""Commands under faults, and small things for them to work on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nnunet_cases import write_nnunet_model
from reliability_cases import Case, digests, predicted, resume, run_of

SERVER = Path(__file__).with_name("server.py")


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or minus the signal that ended it; what it printed."""

    code: int
    text: str


class Commands:
    """Runs commands, one after the other, each in a fork of a process that has imported everything."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command: str, *arguments: object, folder: Path, **job: Any) -> Done:
        """Run ``lungkit-COMMAND`` in ``folder``; the other options are those of server.py."""
        return self.together(1, command, *arguments, folder=folder, **job)[0]

    def together(self, count: int, command: str, *arguments: object, folder: Path, **job: Any) -> list[Done]:
        """As :meth:`run`, ``count`` times at once."""
        if self._server is None:
            single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            self._server = subprocess.Popen(
                [sys.executable, str(SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **single},
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        content = {
            "command": command,
            "arguments": [str(word) for word in arguments],
            "folder": str(folder),
            **job,
        }
        outputs = [folder.parent / f"{folder.name}.output-{number}" for number in range(count)]
        for output in outputs:
            output.unlink(missing_ok=True)
        self._server.stdin.write(
            json.dumps([{**content, "output": str(output)} for output in outputs]) + "\n"
        )
        self._server.stdin.flush()
        codes = [os.waitstatus_to_exitcode(status) for status in json.loads(self._server.stdout.readline())]
        texts = [output.read_text(errors="replace") for output in outputs]
        return [Done(code, text) for code, text in zip(codes, texts, strict=True)]

    def events(self, command: str, *arguments: object, folder: Path, reads: bool = False) -> list[str]:
        """The file events of a command that nothing happens to; it must end well."""
        log = folder.parent / f"{folder.name}.events"
        log.unlink(missing_ok=True)
        done = self.run(
            command, *arguments, folder=folder, fault={"kind": "count", "reads": reads, "log": str(log)}
        )
        assert done.code == 0, done.text
        return log.read_text().splitlines()

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stdin.close()  # type: ignore[union-attr]
            self._server.wait(60)


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    found = Commands()
    yield found
    found.close()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slices of 32 x 32 pixels."""
    from lungkit.data import write_phantom_dataset

    return write_phantom_dataset(
        tmp_path_factory.mktemp("data") / "phantoms", cases=5, shape=(1, 32, 32), dims=2
    )


@pytest.fixture(scope="session")
def training(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Words of a training of a second in the folder where it is run."""
    cache = tmp_path_factory.mktemp("cache")

    def build(*more: str) -> list[str]:
        fixed = {
            "data": phantoms,
            "data.cache": cache,
            "data.patch_size": "[16, 16]",
            "runs": "runs",
            "name": "run",
            "model": "unet",
            "model.features": "[2, 4]",
            "epochs": 2,
            "steps_per_epoch": 1,
            "batch_size": 1,
            "device": "cpu",
            "engine.precision": "fp32",
            "report": "false",
        }
        return [*(f"--{name}={value}" for name, value in fixed.items()), *more]

    return build


@pytest.fixture(scope="session")
def finished(
    commands: Commands, training: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("finished")
    done = commands.run("train", *training(), folder=folder)
    assert done.code == 0, done.text
    return folder / "runs" / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Factory of empty folders to work in."""

    def build(name: str) -> Path:
        path = tmp_path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    return build


@pytest.fixture(scope="session")
def two_scans(phantoms, tmp_path_factory) -> Path:
    scans = tmp_path_factory.mktemp("scans")
    for name, source in zip("ab", sorted((phantoms / "imagesTr").iterdir()), strict=False):
        shutil.copy(source, scans / f"{name}.nii.gz")
    return scans


@pytest.fixture(scope="session")
def cases(phantoms, training, finished, two_scans, tmp_path_factory) -> dict[str, Case]:
    other = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "other")
    of_nnunet = write_nnunet_model(tmp_path_factory.mktemp("nnunet"))

    def bundle_again(place: Path) -> list[object] | None:
        return [*export, "--overwrite"] if (place / "bundle").exists() else None

    def import_again(place: Path) -> list[object] | None:
        """Elsewhere, where the run has its name already and is not to be replaced."""
        return ["nnunet", of_nnunet, "-o", "again"] if (place / "imported").exists() else None

    export: list[object] = ["--format", "monai", "--model", finished, "-o", "bundle"]
    labels = phantoms / "labelsTr"
    bare = ["--no-report", "--no-preview"]
    return {
        "train": Case("train", training("--epochs=1"), run_of, resume),
        "predict": Case(
            "predict",
            ["-i", two_scans, "-o", "out", "--model", finished, "--device", "cpu", *bare],
            predicted,
        ),
        "evaluate": Case(
            "evaluate",
            [labels, labels, "-o", "out", "--no-report", "--metrics", "overlap"],
            lambda place: digests(place, "out/metrics*"),
        ),
        "compare": Case(
            "compare",
            ["--runs", finished, other, "-o", "out", "--no-report", "--device", "cpu"],
            lambda place: digests(place, "out/table.*", "out/cases/*.csv"),
        ),
        "export": Case("export", export, lambda place: digests(place, "bundle/**/*.*"), bundle_again),
        "import": Case(
            "import_data",
            ["nnunet", of_nnunet, "-o", "imported"],
            lambda place: digests(place, "imported/**/model.safetensors"),
            import_again,
        ),
        "report": Case(
            "report",
            [two_scans / "a.nii.gz", "-o", "page.html"],
            # It says when it was made.
            lambda place: (place / "page.html").read_bytes().rstrip().endswith(b"</html>"),
        ),
    }
