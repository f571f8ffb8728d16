"""Runs commands of lungkit under faults, each in a fork of one warm process: a second of imports is paid once.

Reads a list of jobs a line from standard input, as JSON, runs them at once and answers with their wait statuses. A job:

    command, arguments: as on the command line: "train", ["--epochs", "1"]
    folder: where the child works, and whose files count as file events
    output: file that gets standard output and error
    streams: {"1": "closed" | "full" | "pipe", "2": ...}, what is to be wrong with them instead
    fault: see :func:`_arm`
    limits: {"RLIMIT_FSIZE": bytes}
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "fsync"}
_READS = {"os.listdir", "os.scandir"}
COMMANDS = ("train", "predict", "evaluate", "compare", "report", "export", "import_data")


def serve() -> None:
    for command in COMMANDS:
        importlib.import_module(f"lungkit.cli.{command}")
    for module in (
        "lungkit.training.trainer",
        "lungkit.experiments.compare",
        "lungkit.pipeline.folder_report",
    ):
        importlib.import_module(module)
    import matplotlib.figure  # noqa: F401
    import torch

    import lungkit.training.finishing
    import lungkit.training.run

    # Pictures take longer than everything else, and are written as pages are.
    lungkit.training.run.save_curves = lambda *_, **__: None
    lungkit.training.finishing.draw_overlays = lambda *_, **__: None

    torch.set_num_threads(1)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _warm()
        os.chdir(here)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                _run(job)
            children.append(child)
        answers.write(json.dumps([os.waitpid(child, 0)[1] for child in children]) + "\n")


def _warm() -> None:
    """Do once what is done only the first time: most of what a small command takes is that."""
    from lungkit.data import write_phantom_dataset

    data = write_phantom_dataset("data", cases=3, shape=(1, 32, 32), dims=2)
    train = "--data=data --data.cache=cache --model=unet --epochs=1 --steps_per_epoch=1 --batch_size=1 --report=false"
    small = ["--data.patch_size=[16, 16]", "--model.features=[2, 4]", "--device=cpu", "--name=run"]
    scan = data / "imagesTr" / "phantom_0000_0000.nii.gz"
    with (
        Path(os.devnull).open("w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        for command, words in {
            "train": [*train.split(), *small],
            "predict": ["-i", scan, "-o", "masks", "--model", "runs/run", "--device", "cpu"],
            "evaluate": [data / "labelsTr", data / "labelsTr", "-o", "out"],
        }.items():
            code = importlib.import_module(f"lungkit.cli.{command}").main([str(word) for word in words])
            assert code == 0, command


def _run(job: dict[str, Any]) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(job["folder"])
    _redirect(job["output"], job.get("streams", {}))
    for name, value in job.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.argv = [f"lungkit-{job['command']}", *job["arguments"]]
    code: object = 1
    try:
        main = importlib.import_module(f"lungkit.cli.{job['command']}").main
        if job.get("fault"):
            _arm(job["folder"], **job["fault"])
        code = main(job["arguments"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):  # as the interpreter does at its end
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = 120
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _redirect(output: str, streams: dict[str, str]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        kind = streams.get(str(number))
        name = "stdout" if number == 1 else "stderr"
        if kind == "closed":
            os.close(number)
            setattr(sys, name, None)
            continue
        if kind == "full":
            place = os.open("/dev/full", os.O_WRONLY)
        elif kind == "pipe":
            read, place = os.pipe()
            os.close(read)
        else:
            place = os.dup(file)
        os.dup2(place, number)
        os.close(place)
        setattr(sys, name, open(number, "w", buffering=1 if number == 2 else -1, closefd=False))  # noqa: SIM115
    os.close(file)


def _arm(
    folder: str,
    kind: str,
    at: int = -1,
    *,
    code: str = "",
    number: int = 15,
    reads: bool = False,
    log: str = "",
) -> None:
    """Let something go wrong at the ``at``-th file event below ``folder``, counted from 0.

    kind: "count" writes the name of every event to the file ``log``; "kill" is SIGKILL before the event; "signal" is
    the signal ``number``; "errno" is the error ``code``, e.g. "EIO", in place of the event; "memory" is a MemoryError;
    "thread" counts the starts of threads instead, and refuses one.

    Events are changes: files opened to be written, renamed, removed, flushed, folders made. With ``reads`` also what is
    opened to be read.
    """
    seen = 0
    log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else -1
    if log_file >= 0:
        os.set_inheritable(log_file, False)
    place = os.path.join(os.path.realpath(folder), "")  # noqa: PTH118

    def path_of(event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, mode, flags = arguments
            changes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            if mode is None:
                changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not changes and not reads:
                return None
        elif event in _CHANGES or (reads and event in _READS):
            path = arguments[0]
        else:
            return None
        if isinstance(path, int) or path is None:
            return None
        return os.path.abspath(os.fsdecode(path))  # noqa: PTH100

    def strike(event: str, path: str) -> None:
        nonlocal seen
        if log_file >= 0:
            os.write(log_file, f"{event} {path.removeprefix(place)}\n".encode())
        now, seen = seen == at, seen + 1
        if not now:
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "signal":
            os.kill(os.getpid(), number)
        elif kind == "errno":
            value = getattr(errno, code)
            raise OSError(value, os.strerror(value), path)
        elif kind == "memory":
            raise MemoryError
        elif kind == "thread":
            raise RuntimeError("can't start new thread")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = path_of(event, arguments)
        if path is not None and path.startswith(place):
            strike(event, path)

    flush = os.fsync

    def fsync(descriptor: int) -> None:
        strike("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    # Its name since Python 3.13, and before.
    starter = next(
        name for name in ("_start_joinable_thread", "_start_new_thread") if hasattr(threading, name)
    )
    start = getattr(threading, starter)

    def start_thread(*arguments: Any, **options: Any) -> Any:
        strike("thread", place)
        return start(*arguments, **options)

    if kind == "thread":
        setattr(threading, starter, start_thread)
    else:
        os.fsync = fsync
        sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
