"""Files are replaced as a whole, or not at all."""

import os
from pathlib import Path

import pytest

from debiased_laplace.files import check_replaceable, replacing


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_replaced_together_on_exit(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.svg"
    one.write_text("old")
    one.chmod(0o640)
    with replacing(one, two) as (first, second):
        first.write_text("new")
        second.write_text("new too")
        assert one.read_text() == "old"
        assert second.suffix == ".svg"
    assert contents(tmp_path) == {"one.txt": "new", "two.svg": "new too"}
    assert one.stat().st_mode & 0o777 == 0o640


def test_after_an_exception_nothing_has_changed(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("old")

    def write() -> None:
        with replacing(one, two) as (first, _):
            first.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert contents(tmp_path) == {"one.txt": "old"}


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to("real.txt")
    with replacing(link, os.devnull) as (first, second):
        first.write_text("new")
        assert second == Path(os.devnull)
    assert link.is_symlink()
    assert contents(tmp_path) == {"real.txt": "new", "link.txt": "new"}
    assert not Path(os.devnull).is_file()


def test_the_check_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("old")
    for path in (tmp_path / "one.txt", tmp_path / "two.txt", os.devnull):
        check_replaceable(path)
    assert contents(tmp_path) == {"one.txt": "old"}
    with pytest.raises(OSError, match="No such file"):
        check_replaceable(tmp_path / "nowhere" / "one.txt")
