from __future__ import annotations

import pytest

from lungkit.errors import ResourceError
from lungkit.report.pictures import optional_picture


def test_a_picture_that_fails_is_a_warning_that_names_it_and_leaves_no_older_one(tmp_path, caplog):
    path = tmp_path / "preview.png"
    path.touch()
    with optional_picture(path):
        raise ValueError("no fonts")
    assert not path.exists()
    assert caplog.messages == [f"{path}: the picture was not drawn (ValueError: no fonts)"]


def test_a_picture_that_is_drawn_stays_and_says_nothing(tmp_path, caplog):
    path = tmp_path / "preview.png"
    with optional_picture(path):
        path.touch()
    assert path.exists() and not caplog.messages


@pytest.mark.parametrize("error", [ResourceError("the disk is full"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_are_not_about_the_picture(tmp_path, error):
    with pytest.raises(type(error)), optional_picture(tmp_path / "preview.png"):
        raise error
