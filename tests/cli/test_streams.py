"""Streams that outlive what they lead to."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from lungkit.cli._streams import LastingStream, lasting_streams


@pytest.fixture
def broken() -> Iterator[IO[str]]:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


def test_what_is_written_arrives(tmp_path):
    with (tmp_path / "out.txt").open("w") as file:
        stream = LastingStream(file)
        stream.write("one ")
        stream.writelines(["two ", "three"])
        stream.flush()
        assert (tmp_path / "out.txt").read_text() == "one two three"
        assert stream.error is None and stream.fileno() == file.fileno()


def test_a_broken_pipe_is_remembered_and_raises_nothing_then_or_later(broken):
    stream = LastingStream(broken)
    stream.write("lost")
    stream.flush()
    assert stream.error is not None and stream.error.errno == errno.EPIPE
    stream.write("lost too")
    broken.flush()  # as the interpreter does at its end


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_a_stream_is_the_reason_that_is_kept():
    with Path("/dev/full").open("w") as full:
        stream = LastingStream(full)
        stream.write("lost")
        stream.flush()
        assert stream.error is not None and stream.error.errno == errno.ENOSPC


def test_what_a_signal_says_in_the_middle_of_writing_is_left_out(tmp_path):
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    stream = LastingStream(Busy())
    assert stream.write("SIGTERM: saving") == 15 and stream.error is None


def test_a_stream_that_was_never_there_takes_everything():
    stream = LastingStream(None)
    stream.write("")
    assert stream.error is None
    stream.write("lost")
    assert stream.error is not None and stream.error.errno == errno.EBADF


def test_the_streams_of_before_come_back():
    before = sys.stdout, sys.stderr
    with lasting_streams() as output:
        assert sys.stdout is output
    assert (sys.stdout, sys.stderr) == before
