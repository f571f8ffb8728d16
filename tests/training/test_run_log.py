"""train.log holds a run from its first line to its error, whoever started it, and belongs to one process."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lungkit.errors import DataError, UsageError
from lungkit.training.run_log import RunLog

LOG = logging.getLogger("lungkit")


def test_lines_from_before_the_folder_existed_are_kept(tmp_path: Path) -> None:
    with RunLog() as log:
        LOG.info("early")
        log.open(tmp_path / "train.log")
        LOG.info("late")
    LOG.info("after")
    text = (tmp_path / "train.log").read_text()
    assert text.index("INFO early") < text.index("INFO late")
    assert "after" not in text


def test_the_logger_is_left_as_it_was(tmp_path: Path) -> None:
    before = (list(LOG.handlers), LOG.level)
    with RunLog() as log:
        log.open(tmp_path / "train.log")
    assert (list(LOG.handlers), LOG.level) == before


def test_information_is_kept_where_the_program_shows_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "level", logging.WARNING)
    with RunLog() as log:
        log.open(tmp_path / "train.log")
        LOG.info("kept")
    assert "kept" in (tmp_path / "train.log").read_text()
    assert LOG.level == logging.WARNING


def test_disabled_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOG, "level", logging.ERROR)
    with RunLog(enabled=False):
        assert LOG.level == logging.ERROR


def test_a_second_run_of_the_folder_appends(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with RunLog() as log:
            log.open(tmp_path / "train.log")
            LOG.info(word)
    text = (tmp_path / "train.log").read_text()
    assert "first" in text
    assert "second" in text


def test_an_expected_error_is_kept_as_its_message(tmp_path: Path) -> None:
    with pytest.raises(DataError), RunLog() as log:
        log.open(tmp_path / "train.log")
        raise DataError("scan.nii.gz: truncated")
    text = (tmp_path / "train.log").read_text()
    assert "ERROR scan.nii.gz: truncated" in text
    assert "Traceback" not in text


def test_an_unexpected_error_is_kept_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLog() as log:
        log.open(tmp_path / "train.log")
        _ = 1 / 0
    text = (tmp_path / "train.log").read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError" in text


@pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX")
def test_a_run_belongs_to_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lungkit.training.run_log import RunLog\n"
        "with RunLog() as log:\n    log.open(Path(sys.argv[1]))\n    print('open', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "train.log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match="another process is training this run"), RunLog() as log:
            log.open(tmp_path / "train.log")
        other.communicate()
    with RunLog() as log:
        log.open(tmp_path / "train.log")


def test_a_line_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog() as log:
        log.open(Path("/dev/full") if Path("/dev/full").exists() else tmp_path / "train.log")
        LOG.info("lost")
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.parametrize("configured", [False, True])
def test_a_program_that_set_up_no_logging_sees_each_line_once(tmp_path: Path, configured: bool) -> None:
    script = (
        "import logging, pathlib, sys; from lungkit.training.run_log import RunLog\n"
        "log = logging.getLogger('lungkit')\n"
        + ("logging.basicConfig(level=logging.INFO, format='theirs %(message)s')\n" if configured else "")
        + "with RunLog() as run:\n    log.info('one')\n    run.open(pathlib.Path(sys.argv[1]))\n    log.info('two')\n"
        "log.info('after')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "train.log"], capture_output=True, text=True, check=True
    )
    expected = ["theirs one", "theirs two", "theirs after"] if configured else ["one", "two"]
    assert done.stderr.splitlines() == expected
