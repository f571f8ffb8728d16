"""Runs a command of lungkit where the system behaves as Windows does: ``python as_on_windows.py COMMAND ARGUMENTS``.

A simulation on Linux, for lungkit's own modules: what POSIX alone has is missing from ``os`` and ``signal``, ``fcntl``
and ``resource`` cannot be imported, folders cannot be opened, and files that this process has open or mapped can be
neither renamed nor removed, nor a folder that holds one.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}
WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
POSIX_OF_OS = {
    "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "chown", "chroot", "ctermid", "fchmod", "fchown",
    "fork", "forkpty", "geteuid", "getgid", "getloadavg", "getpgid", "getpriority", "getuid",
    "killpg", "lchown", "mkfifo", "mknod", "nice", "posix_fadvise", "posix_fallocate", "pread",
    "pwrite", "register_at_fork", "sched_getaffinity", "sched_yield", "setsid", "statvfs", "sync",
    "sysconf", "uname", "wait", "WIFSIGNALED",
}  # fmt: skip


class As:
    """A module with some names less and others changed."""

    def __init__(self, module: ModuleType, missing: set[str], **changed: Any) -> None:
        self._module, self._missing = module, missing
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._module, name)


def open_below(path: str) -> str | None:
    """A file at or below ``path`` that this process has open or mapped."""
    path = os.path.realpath(path)
    held = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(
            FileNotFoundError
        ):  # a thread has closed it since, or the listing itself had it
            held.append(os.readlink(f"/proc/self/fd/{name}"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    held += [fields[5] for line in maps if len(fields := line.split(maxsplit=5)) == 6]
    return next((name for name in held if name == path or name.startswith(path + os.sep)), None)


def refusing(operation: Any, *, target: bool) -> Any:
    """``operation`` as Windows does it; ``target``: its second argument must not be open either, nor a folder."""

    def refuse(source: Any, *others: Any, **options: Any) -> Any:
        for path in (source, *(others[:1] if target else ())):
            if options.get("dir_fd") is None and (found := open_below(os.fspath(path))):
                raise PermissionError(errno.EACCES, f"{found} is used by this process", os.fspath(path))
        if operation is real_rename and os.path.lexists(others[0]):
            raise FileExistsError(errno.EEXIST, "the file exists already", os.fspath(others[0]))
        return operation(source, *others, **options)

    return refuse


def open_file(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
    if os.path.isdir(path) and options.get("dir_fd") is None:
        raise PermissionError(errno.EACCES, "a folder cannot be opened", os.fspath(path))
    return real_open(path, flags, *arguments, **options)


def import_module(name: str, globals: Any = None, *arguments: Any, **options: Any) -> ModuleType:
    ours = str((globals or {}).get("__name__", "")).startswith("lungkit")
    if ours and name in POSIX_MODULES:
        raise ImportError(f"no module named {name!r} on Windows", name=name)
    return real_import(name, globals, *arguments, **options)


real_open, real_rename, real_import = os.open, os.rename, builtins.__import__


def pretend() -> None:
    """From here on lungkit's modules meet Windows; what they use of others only where files are renamed or removed."""
    import lungkit

    modules = []
    for found in pkgutil.walk_packages(lungkit.__path__, "lungkit."):
        with contextlib.suppress(ModuleNotFoundError):  # of a package that lungkit does without
            modules.append(importlib.import_module(found.name))
    windows = {
        "os": As(os, POSIX_OF_OS, name="nt", open=open_file),
        "sys": As(sys, set(), platform="win32"),
        "signal": As(signal, {name for name in dir(signal) if name.startswith("SIG")} - WINDOWS_SIGNALS),
    }
    for module in modules:
        for name, changed in windows.items():
            if isinstance(getattr(module, name, None), ModuleType):
                setattr(module, name, changed)
    builtins.__import__ = import_module
    os.rename, os.replace = refusing(os.rename, target=True), refusing(os.replace, target=True)
    os.unlink = os.remove = refusing(os.unlink, target=False)
    os.rmdir = refusing(os.rmdir, target=False)


if __name__ == "__main__":
    pretend()
    command = importlib.import_module(f"lungkit.cli.{sys.argv[1]}")
    sys.exit(command.main(sys.argv[2:]))
