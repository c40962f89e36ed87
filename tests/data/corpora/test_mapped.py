import dataclasses

import pyarrow as pa
import pytest

from flexlora.data.corpora import mapped
from flexlora.data.corpus import Corpus

from ..conftest import small_corpus


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("some rows")
    return path


def cached(tmp_path, source, make, **settings):
    return mapped.kept(tmp_path / "cache", [source], settings, make)


def never():
    raise AssertionError("The source was read again.")


def test_a_corpus_is_made_once_and_is_then_the_same(tmp_path, source):
    original = small_corpus()
    first = cached(tmp_path, source, lambda: original)
    again = cached(tmp_path, source, never)
    for corpus in (first, again):
        assert corpus.examples(range(17)) == original.examples(range(17))
        assert corpus.keys("client").tolist() == original.keys("client").tolist()
        assert corpus.fingerprint() == original.fingerprint()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".arrow"]


def test_what_decides_the_rows_decides_the_file(tmp_path, source):
    cached(tmp_path, source, small_corpus, share=0.1)
    other = small_corpus(13)
    assert len(cached(tmp_path, source, lambda: other, share=0.2)) == 13
    source.write_text("other rows")
    assert len(cached(tmp_path, source, lambda: other, share=0.1)) == 13
    source.write_text("some rows")
    assert len(cached(tmp_path, source, never, share=0.1)) == 17


def test_its_digests_are_those_of_its_columns(tmp_path):
    path = tmp_path / "corpus.arrow"
    mapped.write(small_corpus(), path)
    corpus = mapped.read(path)
    assert set(corpus.digests) == set(corpus.columns)
    assert corpus.fingerprint() == Corpus(corpus.table).fingerprint()


def test_reading_takes_no_memory_for_the_rows(tmp_path):
    sizes = {}
    for rows in (17, 17_000):
        mapped.write(small_corpus(rows), tmp_path / "corpus.arrow")
        before = pa.total_allocated_bytes()
        corpus = mapped.read(tmp_path / "corpus.arrow")
        corpus.fingerprint()
        assert len(corpus.with_column("client", corpus.table["category"])) == rows
        sizes[rows] = pa.total_allocated_bytes() - before
    assert sizes[17_000] <= sizes[17] + 4096


def test_conversations_and_no_rows_can_be_kept(tmp_path):
    chat = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    for corpus in (Corpus.build({"messages": [chat] * 3}), small_corpus().select([])):
        mapped.write(corpus, tmp_path / "corpus.arrow")
        reread = mapped.read(tmp_path / "corpus.arrow")
        assert reread.table.equals(corpus.table)
        assert reread.fingerprint() == corpus.fingerprint()


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"PK"])
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path, damage):
    path = tmp_path / "corpus.arrow"
    mapped.write(small_corpus(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"corpus\.arrow' cannot be read .*delete the file"):
        mapped.read(path)


def test_a_file_without_the_digests_of_its_columns_is_refused(tmp_path):
    corpus = small_corpus()
    path = tmp_path / "corpus.arrow"
    with pa.ipc.new_file(str(path), corpus.table.schema) as writer:
        writer.write_table(corpus.table)
    with pytest.raises(ValueError, match="delete the file"):
        mapped.read(path)


def test_a_source_that_fails_leaves_nothing_behind(tmp_path, source):
    with pytest.raises(AssertionError):
        cached(tmp_path, source, never)
    broken = dataclasses.replace(small_corpus(), digests={"client": object()})
    with pytest.raises(TypeError):
        cached(tmp_path, source, lambda: broken)
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_file()]
