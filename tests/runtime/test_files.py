"""Folders for files that are loaded as code are private to their owner."""

import os
import stat

import pytest

from microbert.runtime.files import private_folder


def mode_of(folder):
    return stat.S_IMODE(folder.stat().st_mode)


def test_a_private_folder_is_made_for_its_owner_alone_and_used_again(tmp_path):
    before = os.umask(0)  # under which a folder would be open to everybody
    try:
        assert private_folder(tmp_path / "a" / "b") == (tmp_path / "a" / "b").resolve()
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700
    (tmp_path / "a" / "b").chmod(0o755)  # others may read what is in it
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert private_folder(tmp_path / "link" / "b") == (tmp_path / "a" / "b").resolve()


def make_link(folder):
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def make_file(folder):
    folder.write_text("")


def make_with_mode(mode):
    def make(folder):
        folder.mkdir()
        folder.chmod(mode)

    return make


def make_of_somebody_else(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder.mkdir()
    os.chown(folder, 12345, 12345)


@pytest.mark.skipif(os.name == "nt", reason="Windows protects folders by access lists")
@pytest.mark.parametrize(
    "make, message",
    [
        (make_link, "is a link"),
        (make_file, "not a folder|exists"),
        (make_with_mode(0o770), "written to by other"),
        (make_with_mode(0o1777), "written to by other"),
        (make_of_somebody_else, "belongs to another user"),
    ],
)
def test_a_folder_that_another_user_can_write_to_is_refused(make, message, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(OSError, match=message):
        private_folder(tmp_path / "folder")


@pytest.mark.skipif(os.name == "nt", reason="Windows protects folders by access lists")
@pytest.mark.parametrize(
    "make, message",
    [
        (make_with_mode(0o777), "written to by other"),
        (make_with_mode(0o1777), ""),
        (make_of_somebody_else, "belongs to another user"),
    ],
)
def test_a_folder_that_another_user_can_replace_is_refused(make, message, tmp_path):
    """Where folders above it are another user's, or may be written to by others and are not sticky, as /tmp is."""
    make(tmp_path / "above")
    (tmp_path / "above" / "folder").mkdir(mode=0o700)
    if message:
        with pytest.raises(OSError, match=message):
            private_folder(tmp_path / "above" / "folder")
    else:
        private_folder(tmp_path / "above" / "folder")
