"""Which exceptions are faults that a user can mend, and which are the library's own."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from flexlora.errors import ConfigError, sentence


def refused(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if file is None else [file]))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("The key is wrong."), "The key is wrong."),
        (refused(errno.ENOSPC), "a file: No space left on device. Free some space"),
        (refused(errno.EROFS, "/data/x"), "/data/x: Read-only file system. Give a folder"),
        (refused(errno.EIO, "/data/x"), "/data/x: Input/output error. The disk may be failing"),
        (refused(errno.ENOENT, "/data/x"), "/data/x: No such file or directory."),
        (refused(errno.EMLINK, "/data/x"), "/data/x: Too many links."),
        (refused(errno.ENAMETOOLONG, "x" * 300), "File name too long. Give a shorter name."),
    ],
)
def test_a_fault_that_can_be_mended_is_a_sentence(error, words):
    assert words in (sentence(error) or "")


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("a"), TypeError("b"), ValueError("c"), RuntimeError("d"), OSError("e")),
        refused(errno.ENOENT),
        refused(errno.ECONNREFUSED),
        refused(errno.EBADF),
        FileNotFoundError("by hand"),
    ],
)
def test_any_other_exception_is_a_fault_of_the_library(error):
    assert sentence(error) is None


def test_a_folder_that_cannot_be_copied_is_a_sentence(tmp_path):
    """shutil has an exception of its own for it, without a number."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "code.py").touch()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "app", tmp_path / "copy", copy_function=full)
    said = sentence(caught.value) or ""
    assert "code.py: No space left on device. Free some space" in said and "Errno" not in said
    assert sentence(shutil.Error("by hand")) is None


def test_a_link_to_itself_is_a_sentence(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises((OSError, RuntimeError)) as caught:
        Path(loop / "adapter").resolve().mkdir()
    assert str(loop) in (sentence(caught.value) or "")
