import json

import pytest

from flexlora.data.corpora.natural_instructions import read


def task(folder, name, instances, **changes):
    content = {
        "Definition": [f"Define {name}."],
        "Categories": ["Sums", "Other"],
        "Instances": [
            {"id": f"{name}-{i}", "input": f"{name} in {i}", "output": [f"{i}", "another"]}
            for i in range(instances)
        ],
        **changes,
    }
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    task(tmp_path, "task001_one", 230)
    task(tmp_path, "task017_two", 3, Definition="Alone.")
    (tmp_path / "README.json").write_text("{}")
    return tmp_path


def test_a_task_is_a_client_with_a_share_of_its_instances(folder):
    corpus = read(folder, seed=1)
    clients = corpus.keys("client").tolist()
    assert clients == ["task001_one"] * 23 + ["task017_two"]
    splits = corpus.keys("split").tolist()
    assert [splits[:23].count(s) for s in ("train", "validation", "test")] == [19, 2, 2]
    assert splits[23] == "train"
    assert set(corpus.keys("category")) == {"Sums"}
    assert corpus.example(23).instruction == "Alone."


def test_the_first_output_is_taken_and_rows_keep_their_pairs(folder):
    corpus = read(folder, share=1.0, most=100, seed=2)
    assert len(corpus) == 103
    for example in corpus.examples(range(103)):
        assert example.input.endswith(f" in {example.output}")
    assert len({e.input for e in corpus.examples(range(103))}) == 103


def test_the_seed_decides_and_tasks_are_drawn_apart(folder):
    same = read(folder, seed=3, tasks=["task001_one"])
    both = read(folder, seed=3)
    assert both.select(range(23)).fingerprint() == same.fingerprint()
    assert read(folder, seed=4, tasks=["task001_one"]).fingerprint() != same.fingerprint()


def test_what_is_no_task_is_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="no files task"):
        read(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match=r"no file 'task9.json' \(1 of 2"):
        read(folder, tasks=["task9", "task001_one"])
    with pytest.raises(ValueError, match="share of 0"):
        read(folder, share=0)
    task(folder, "task002", 5, Instances=[{"input": "x", "output": []}])
    with pytest.raises(ValueError, match=r"task002.json': instance 1 needs"):
        read(folder)
    task(folder, "task002", 5, Definition=[])
    with pytest.raises(ValueError, match="'Definition' is missing"):
        read(folder)
    (folder / "task002.json").write_text("{")
    with pytest.raises(ValueError, match=r"task002.json' is not JSON"):
        read(folder)
