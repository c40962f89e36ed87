"""Files that tell whether they are as they were written."""

import pickle

import pytest

from flexlora.storage import (
    DamagedFile,
    copy_verified,
    is_intact,
    read_sealed,
    remove_summed,
    sum_file,
    write_sealed,
    write_summed,
)

CONTENT = {"format": 3, "rates": [0.1, 1e-300], "name": "Z\u00fcrich \ud800", "empty": {}}


def test_a_sealed_file_is_read_back_and_any_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "state.json"
    write_sealed(path, CONTENT)
    assert read_sealed(path) == CONTENT
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedFile, match=r"state\.json .*restore it"):
            read_sealed(path)
        path.write_bytes(whole[:place])
        with pytest.raises(DamagedFile):
            read_sealed(path)


def test_a_file_under_the_name_of_another_is_noticed(tmp_path):
    write_sealed(tmp_path / "checkpoint.json", CONTENT)
    (tmp_path / "checkpoint.json").rename(tmp_path / "manifest.json")
    with pytest.raises(DamagedFile):
        read_sealed(tmp_path / "manifest.json")


@pytest.mark.parametrize("text", ["{}", '{"a": 1}', "[1]", "", "\0", "{", '{"a": NaN}', "[" * 9999])
def test_a_file_without_a_checksum_is_refused_or_read_as_of_an_earlier_version(tmp_path, text):
    path = tmp_path / "plain.json"
    path.write_text(text)
    with pytest.raises(DamagedFile, match="has no checksum"):
        read_sealed(path)
    if text in ("{}", '{"a": 1}'):
        assert read_sealed(path, or_plain=True) in ({}, {"a": 1})
    else:
        with pytest.raises(DamagedFile, match="is not"):
            read_sealed(path, or_plain=True)


def test_a_file_and_its_sum(tmp_path):
    path = tmp_path / "upload"
    digest = write_summed(path, b"some bytes")
    assert is_intact(path)
    assert sum_file(path).read_text() == f"{digest}  upload\n"  # as sha256sum -c reads it
    path.write_bytes(b"same bytes")
    assert not is_intact(path)
    write_summed(path, b"some bytes")
    sum_file(path).unlink()
    assert not is_intact(path)  # not written whole
    remove_summed(path)
    assert list(tmp_path.iterdir()) == [] and not is_intact(path)


@pytest.mark.parametrize(
    "sum_text", ["", "0" * 64, f"{'0' * 64}  other\n", "\0", "x" * 64 + "  a\n"]
)
def test_a_damaged_sum_is_a_damaged_file(tmp_path, sum_text):
    path = tmp_path / "a"
    write_summed(path, b"1")
    sum_file(path).write_text(sum_text)
    assert not is_intact(path)


def test_a_copy_of_a_damaged_file_is_not_made(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    digest = write_summed(source, bytes(3_000_000))
    copy_verified(source, target, digest)
    assert target.read_bytes() == bytes(3_000_000)
    target.unlink()
    with source.open("r+b") as file:
        file.write(b"1")
    with pytest.raises(DamagedFile, match="does not agree"):
        copy_verified(source, target, digest)
    assert not target.exists()


def test_the_error_travels_between_processes(tmp_path):
    error = DamagedFile(tmp_path / "a", "is missing", "remove it")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.reason) == (str(error), error.path, error.reason)
