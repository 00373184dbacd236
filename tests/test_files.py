from __future__ import annotations

import os
import stat

import pytest

from ldm.files import staged_file, write_new


def test_file_appears_whole(tmp_path):
    path = tmp_path / "a"
    write_new(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~os.umask(os.umask(0o022))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_new(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_nothing_is_written_over(tmp_path, monkeypatch, links):
    if not links:  # as on exFAT

        def no_links(*args):
            raise PermissionError

        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a"
    write_new(path, lambda file: file.write(b"first"))
    with pytest.raises(FileExistsError):
        write_new(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_errors_tell_the_file_that_was_to_be(tmp_path):
    """Not the temporary one beside it, and that of a full disk, which tells none, too."""
    for path, error in [
        (tmp_path / "absent" / "a.png", FileNotFoundError(2, "No such file", None)),
        (tmp_path / "a.png", OSError(28, "No space left on device")),
    ]:
        with pytest.raises(OSError) as caught, staged_file(path):
            raise error
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught, staged_file(tmp_path / "a.png"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
