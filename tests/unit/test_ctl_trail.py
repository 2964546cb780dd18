"""Files the commands on the trail write: whole or not at all, and their owner's alone."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vsql_ctl.files import complete_file, read_file, write_file
from vsql_shared.errors import UserError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_whole_is_not_there_and_the_former_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("the former one")
    said = r"cannot write .*report\.json: "
    with largest_file(8192), pytest.raises(UserError, match=said), complete_file(target) as file:
        file.write("x" * 100_000)
    assert target.read_text() == "the former one"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_the_owners_alone_and_an_error_inside_leaves_none(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with pytest.raises(UnicodeEncodeError), complete_file(target) as file:
        file.write("half \ud800")
    assert list(tmp_path.iterdir()) == []
    with complete_file(target) as file:
        file.write("whole")
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("whole", 0o600)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to"), complete_file(tmp_path / "none" / "report.json"):
        pass


def test_bytes_are_written_whole_and_no_device_is_replaced_by_them(tmp_path: Path) -> None:
    target, device = tmp_path / "order.bin", tmp_path / "null"
    device.symlink_to("/dev/null")
    write_file(target, b"\x00\xff")
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"\x00\xff", 0o600)
    with pytest.raises(UserError, match=r"null is no regular file"):
        write_file(device, b"lost")
    assert device.is_symlink()
    with largest_file(4), pytest.raises(UserError, match=r"cannot write .*order\.bin: "):
        write_file(target, b"x" * 100)
    assert target.read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "order.bin"]


def test_a_file_longer_than_what_was_asked_for_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "order.sig"
    path.write_bytes(b"s" * 64)
    assert read_file(path, 64) == b"s" * 64
    with pytest.raises(UserError, match="is longer than 63 bytes"):
        read_file(path, 63)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_file(tmp_path / "none", 64)
