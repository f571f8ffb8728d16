"""Zips of scans: unpacked for a while, and refused where they are damaged or not to be trusted."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lungkit.data import zip_archive
from lungkit.data.zip_archive import unpacked
from lungkit.errors import DataError, ResourceError


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


def test_a_zip_is_a_folder_of_its_name_while_it_is_read(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "export.zip", ("P/ST/SE/1", b"one"), ("P\\ST\\SE\\2", b"two"))
    with unpacked(path) as root:
        found = {
            file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()
        }
        assert root.name == "export" and found == {"P/ST/SE/1": b"one", "P/ST/SE/2": b"two"}
    assert not root.exists()


def test_folders_and_other_files_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(b"no zip")
    for path in (tmp_path, tmp_path / "scan.nii", tmp_path / "missing"):
        with unpacked(path) as root:
            assert root == path


def test_files_keep_their_time_so_that_they_are_known_again(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", (zipfile.ZipInfo("1.dcm", (2020, 1, 2, 3, 4, 6)), b"one"))
    times = []
    for _ in range(2):
        with unpacked(path) as root:
            times.append((root / "1.dcm").stat().st_mtime_ns)
    assert times[0] == times[1]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../outside.dcm", "outside of its folder"),
        ("a/../../outside.dcm", "outside of its folder"),
        ("/outside.dcm", "outside of its folder"),
        ("..\\outside.dcm", "outside of its folder"),
        ("C:\\outside.dcm", "outside of its folder"),
        (link("1.dcm"), "1.dcm is a link"),
    ],
)
def test_names_that_lead_out_and_links_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str | zipfile.ZipInfo, message: str
) -> None:
    monkeypatch.setattr(zip_archive.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = make_zip(tmp_path / "a.zip", ("good.dcm", b"good"), (member, b"/etc/passwd"))
    with pytest.raises(DataError, match=message), unpacked(path):
        pass
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a.zip", "temporary"]


def test_what_unpacks_to_far_more_than_scans_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_archive, "_HARMLESS_BYTES", 1000)
    path = make_zip(tmp_path / "a.zip", ("1.dcm", b"\0" * 1_000_000))
    with pytest.raises(DataError, match=r"a.zip: \d+ bytes that say they unpack to 1000000"), unpacked(path):
        pass
    with pytest.raises(DataError, match="more than 10; unpack it yourself"), unpacked(path, max_bytes=10):
        pass


def test_a_file_larger_than_the_zip_says_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", ("1.dcm", b"\0" * 100_000))
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    for place in (content.index(b"PK\x03\x04") + 22, directory + 24):
        content[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="a damaged zip"), unpacked(path):
        pass


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "a.zip", ("1.dcm", b"content"))
    monkeypatch.setattr(zip_archive.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3}))
    with pytest.raises(ResourceError, match=r"7 bytes unpacked, 3 free .*TMPDIR"), unpacked(path):
        pass


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)


def encrypt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"), [(truncate, "damaged zip"), (corrupt, "damaged zip"), (encrypt, "is encrypted")]
)
def test_damaged_and_encrypted_zips_are_named(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = make_zip(tmp_path / "a.zip", ("1.dcm", bytes(range(256)) * 20))
    spoil(path)
    with pytest.raises(DataError, match=rf"a\.zip: .*{message}"), unpacked(path):
        pass


def test_an_empty_zip_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"), unpacked(make_zip(tmp_path / "a.zip")):
        pass
