"""Content hashes of source files, remembered while the file's size and time stay as they were."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

from lungkit._atomic import atomic_path
from lungkit._reading import read_json
from lungkit.errors import DataError, UsageError

# A file written within this time of being hashed may change again without its time stamp changing
# (time stamps are as coarse as 2 s on some file systems), so its hash is not remembered.
SETTLED_NS = 4_000_000_000


class SourceHashes:
    """BLAKE2b hashes of files, kept in ``directory``.

    A remembered hash is used only while path, size, modification time, change time and inode are what they
    were.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)

    def of(self, path: Path) -> str:
        """Hex digest of the contents of ``path``.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            path = path.resolve()
            identity = _identity(path)
            record = self._directory / f"{_digest(str(path).encode())}.json"
            # Whatever is wrong with a remembered hash, it can be computed again.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = read_json(record)
                if known["identity"] == identity:
                    return str(known["digest"])
            hasher = hashlib.blake2b(digest_size=32)
            with path.open("rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    hasher.update(block)
            changed_during_hash = _identity(path) != identity
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); name a readable file") from error
        settled = time.time_ns() - max(identity[1], identity[2]) > SETTLED_NS
        if settled and not changed_during_hash:
            # A cache that somebody else made may be read-only; then the hash is computed each time.
            with contextlib.suppress(UsageError), atomic_path(record, durable=False) as temporary:
                temporary.write_text(json.dumps({"identity": identity, "digest": hasher.hexdigest()}))
        return hasher.hexdigest()


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
