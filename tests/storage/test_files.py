import os
import signal
import subprocess
import sys

import pytest

from flexlora.errors import ProtocolError
from flexlora.storage import LOCK, is_locked, locked, remove_drafts, write_atomically

HOLD = """
import sys
from pathlib import Path
from flexlora.storage import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch, fault):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(fault)):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_drafts_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "state.json", b"whole")
    (tmp_path / ".partial.json").write_bytes(b"of the user")
    (tmp_path / ".0123456789ab.partial").write_bytes(b"half of a longer file")
    remove_drafts(tmp_path)
    remove_drafts(tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial.json", "state.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_private_file_is_never_readable_by_others(tmp_path):
    path = tmp_path / "secret"
    draft = tmp_path / ".secret.partial"
    draft.write_bytes(b"")
    draft.chmod(0o644)
    write_atomically(path, b"key", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_locked_folder_is_refused_and_free_afterwards(tmp_path):
    with locked(tmp_path):
        assert is_locked(tmp_path / LOCK)
        with pytest.raises(ProtocolError, match=r"in .*; let it end, or"), locked(tmp_path):
            raise AssertionError("locked twice")
        refusal = "It is served already."
        with pytest.raises(ProtocolError, match="served"), locked(tmp_path, refusal=refusal):
            raise AssertionError("locked twice")
        with locked(tmp_path, name="other.lock"):
            pass
    assert not is_locked(tmp_path / LOCK)
    with locked(tmp_path):
        pass


def test_a_folder_that_does_not_exist_is_neither_made_nor_locked(tmp_path):
    with locked(tmp_path / "missing"):
        pass
    assert not (tmp_path / "missing").exists()
    assert not is_locked(tmp_path / "missing" / LOCK)


def test_an_error_inside_is_not_taken_for_a_refusal_and_releases_the_lock(tmp_path):
    with pytest.raises(TimeoutError, match="inner"), locked(tmp_path):
        raise TimeoutError("inner")
    assert not is_locked(tmp_path / LOCK)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with pytest.raises(ProtocolError, match="Another process runs"), locked(tmp_path):
            raise AssertionError("locked twice")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        pass


HIDDEN = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None
import warnings
warnings.simplefilter("ignore")  # filelock says that its own locks are files then
from flexlora.errors import ProtocolError
from flexlora.storage import is_locked, locked, write_atomically

folder = Path(sys.argv[1])
write_atomically(folder / "a", b"1")
with locked(folder):
    try:
        with locked(folder):
            print("twice")
    except ProtocolError:
        print("refused")
with locked(folder):
    print("again")
"""


def test_without_fcntl_there_are_locks_too(tmp_path):
    """A system without fcntl, as Windows, has locks of its own."""
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["refused", "again"], done.stderr
