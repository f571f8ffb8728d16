"""A damaged .nii.gz is refused, whichever byte is wrong."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import integrity, read_volume, write_nifti
from lungkit.errors import DataError


@pytest.fixture(params=["isal", "zlib"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setattr(integrity, "_CODEC", zlib)
    return str(request.param)


@pytest.fixture
def scan(tmp_path: Path) -> tuple[Path, np.ndarray]:
    array = np.random.default_rng(0).integers(-1000, 400, (16, 16, 8)).astype(np.int16)
    path = tmp_path / "scan.nii.gz"
    write_nifti(path, array, np.diag([0.7, 0.7, 2.0, 1.0]))
    return path, array


def plain_bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def test_no_flipped_bit_is_read_as_wrong_voxels(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, array = scan
    content = path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    # Every byte of both ends, where the headers and the checksum are, and a sample of the middle.
    middle = random.choice(len(content), 250, replace=False)
    for position in {*range(60), *range(len(content) - 20, len(content)), *middle.tolist()}:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # a bit that means nothing: time stamp and system in the gzip header, padding of the last byte
            np.testing.assert_array_equal(volume.array, array)
    assert refused > 310


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_truncated_file_is_refused(scan: tuple[Path, np.ndarray], codec: str, kept: float) -> None:
    path, _ = scan
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"ends inside|empty|truncated"):
        read_volume(path)


def test_missing_checksum_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="ends inside the gzip checksum"):
        read_volume(path)


def test_wrong_checksum_names_both_values(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    content = bytearray(path.read_bytes())
    content[-8:-4] = b"\0\0\0\0"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"CRC32 is [0-9a-f]{8}, the file says 00000000"):
        read_volume(path)


def test_wrong_length_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    content = bytearray(path.read_bytes())
    content[-4:] = b"\1\0\0\0"
    path.write_bytes(content)
    with pytest.raises(DataError, match="bytes decompressed, the file says 1 "):
        read_volume(path)


def test_several_gzip_members_are_read_as_one(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, array = scan
    plain = plain_bytes(path)
    path.write_bytes(
        gzip.compress(plain[:1000]) + gzip.compress(plain[1000:1001]) + gzip.compress(plain[1001:])
    )
    np.testing.assert_array_equal(read_volume(path).array, array)


def test_damage_in_a_later_member_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    plain = plain_bytes(path)
    last = bytearray(gzip.compress(plain[1000:]))
    last[-7] ^= 1
    path.write_bytes(gzip.compress(plain[:1000]) + last)
    with pytest.raises(DataError, match="CRC32"):
        read_volume(path)


def test_gzip_header_with_name_comment_extra_and_checksum_is_understood(
    scan: tuple[Path, np.ndarray], codec: str
) -> None:
    path, array = scan
    header = b"\x1f\x8b\x08\x1e\0\0\0\0\0\xff" + b"\x03\0abc" + b"scan.nii\0" + b"a comment\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    path.write_bytes(header + path.read_bytes()[10:])
    np.testing.assert_array_equal(read_volume(path).array, array)


def test_wrong_header_checksum_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    path.write_bytes(b"\x1f\x8b\x08\x02\0\0\0\0\0\xff\0\0" + path.read_bytes()[10:])
    with pytest.raises(DataError, match="checksum of a gzip header"):
        read_volume(path)


def test_zero_padding_after_the_data_is_allowed(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, array = scan
    path.write_bytes(path.read_bytes() + bytes(512))
    np.testing.assert_array_equal(read_volume(path).array, array)


def test_garbage_after_the_data_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    path.write_bytes(path.read_bytes() + bytes(5) + b"garbage")
    with pytest.raises(DataError, match="not gzip data follows"):
        read_volume(path)


def test_more_data_than_the_header_describes_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    path.write_bytes(gzip.compress(plain_bytes(path) + b"\0"))
    with pytest.raises(DataError, match="more data follows the voxels"):
        read_volume(path)


def test_decompression_bomb_stops_where_the_header_ends(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    bomb = zlib.compressobj(wbits=31)
    content = bomb.compress(plain_bytes(path))
    for _ in range(200):
        content += bomb.compress(bytes(1 << 20))
    path.write_bytes(content + bomb.flush())
    with pytest.raises(DataError, match="more data follows the voxels"):
        read_volume(path)


def test_less_data_than_the_header_describes_is_refused(scan: tuple[Path, np.ndarray], codec: str) -> None:
    path, _ = scan
    path.write_bytes(gzip.compress(plain_bytes(path)[:-2]))
    with pytest.raises(DataError, match=r"4096 bytes\), the file holds 4094"):
        read_volume(path)


def test_name_says_gzip_but_content_is_not(scan: tuple[Path, np.ndarray]) -> None:
    path, _ = scan
    path.write_bytes(plain_bytes(path))
    with pytest.raises(DataError, match="not the gzip mark 1f8b"):
        read_volume(path)


def test_gzip_content_under_a_plain_name_is_refused(scan: tuple[Path, np.ndarray]) -> None:
    path, _ = scan
    renamed = path.with_name("scan.nii")
    path.rename(renamed)
    with pytest.raises(DataError, match=r"does not end with \.gz"):
        read_volume(renamed)


def with_gzip_header(content: bytes, *, flags: int, text: bytes) -> bytes:
    """Gzip data with another header in front of the same compressed bytes."""
    return content[:3] + bytes([flags]) + content[4:10] + text + content[10:]


@pytest.mark.parametrize("flags", [8, 16])
def test_a_name_or_comment_without_end_is_refused_before_it_is_read(
    scan: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    path, _ = scan
    path.write_bytes(with_gzip_header(path.read_bytes(), flags=flags, text=b"n" * 20_000_000 + b"\0"))
    taken = []
    original = integrity._GzipStream._take
    monkeypatch.setattr(integrity._GzipStream, "_take", lambda *a: (taken.append(a[1]), original(*a))[1])
    with pytest.raises(DataError, match="a name or comment of more than 65536 bytes"):
        read_volume(path)
    assert len(taken) < 10


def test_a_header_with_name_comment_and_checksum_is_read(scan: tuple[Path, np.ndarray]) -> None:
    path, array = scan
    content = path.read_bytes()
    text = b"a" * 30_000 + b"\0" + b"b\0"
    head = content[:3] + bytes([8 + 16 + 2]) + content[4:10] + text
    path.write_bytes(head + (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little") + content[10:])
    np.testing.assert_array_equal(read_volume(path).array, array)


def test_many_members_cost_as_much_each_as_few(scan: tuple[Path, np.ndarray]) -> None:
    path, array = scan
    plain = plain_bytes(path)
    path.write_bytes(b"".join(gzip.compress(plain[n : n + 1], 0, mtime=0) for n in range(len(plain))))
    np.testing.assert_array_equal(read_volume(path).array, array)
    assert integrity._INPUT_BYTES <= 1 << 14  # is copied with every member
