"""Many jobs on one base model: each against the same one alone, and their adapters on the disk."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from flexlora import peft_format
from flexlora.errors import AdapterError, ConfigError, ProtocolError
from flexlora.lowrank import Adapter
from flexlora.model.base import Base
from flexlora.storage import DamagedFile, locked
from flexlora.training import adapters, loop
from flexlora.training.adapters import train_adapters, trained_adapters
from flexlora.training.finished import JobResult
from flexlora.training.job import Job
from flexlora.training.optimizer import Training
from support import models
from support.learning import assert_moved, distance_from
from support.rounding import rounding

ROWS = models.corpus()


def of(name: str, client: str, training: Training, **options) -> Job:
    return Job(
        name,
        ROWS,
        training=training,
        where={"client": client},
        prompt="plain",
        max_tokens=32,
        **options,
    )


def jobs(pack_tokens: int = 60) -> list[Job]:
    """Four jobs alike in nothing, of 6, 3, 5 and 4 steps, with ranks from 2 to 7."""
    sgd = Training(
        optimizer="sgd", learning_rate=0.1, batch_examples=4, alpha=6.0, pack_tokens=pack_tokens
    )
    adamw = replace(sgd, optimizer="adamw", learning_rate=0.003, scaling="sqrt")
    return [
        of("a", "client0", replace(sgd, epochs=3), rank=4),
        of("b", "client3", sgd, rank=2, targets=["q_proj", "layers.1.mlp.up_proj"], seed=7),
        of(
            "c",
            "client1",
            replace(adamw, batch_examples=2, prompt_loss=True),
            rank=3,
            rank_pattern={"down_proj": 7, r"layers\.0\..*v_proj": 5},
        ),
        of("d", "client5", replace(sgd, momentum=0.5, epochs=2, max_steps=4), rank=6),
    ]


def by_name(results: Sequence[JobResult]) -> dict[str, Adapter]:
    return {result.name: result.adapter for result in results}


def alone(base: Base, job: Job) -> Adapter:
    return by_name(train_adapters(base, [job]))[job.name]


def start(base: Base, job: Job) -> Adapter:
    return job.start(base, job.ranks(base))


def same(one: Adapter, other: Adapter) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[m].A, f.A) and torch.equal(one[m].B, f.B) for m, f in other.items()
    )


@pytest.fixture(scope="module")
def tolerances(model_folder):
    """What each job gives alone, and how far rounding may move it."""
    from flexlora.model.source import Source

    base = Source(str(model_folder)).load()
    found = {}
    for job in jobs():
        want, begun = alone(base, job), start(base, job)
        distance = distance_from(begun)
        bound = rounding(base.model, lambda job=job: alone(base, job), want, distance)
        found[job.name] = want, distance, bound
    return found


def assert_as_alone(results: Sequence[JobResult], tolerances) -> None:
    for result in results:
        want, distance, bound = tolerances[result.name]
        assert set(result.adapter) == set(want)
        assert distance(result.adapter, want) < bound, result.name


# --- the laws ------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [None, 1, 2, 4])
def test_a_job_gets_the_adapter_that_it_gets_alone(base, tolerances, at_once):
    results = train_adapters(base, jobs(), at_once=at_once)
    assert [result.name for result in results] == ["a", "b", "c", "d"]
    assert [result.steps for result in results] == [6, 3, 5, 4]
    assert_as_alone(results, tolerances)
    for job, result in zip(jobs(), results, strict=True):
        assert_moved(result.adapter, start(base, job))


def test_a_job_that_is_removed_or_moved_changes_no_other(base, tolerances):
    a, b, c, d = jobs()
    assert_as_alone(train_adapters(base, [d, a, c]), tolerances)
    assert_as_alone(train_adapters(base, [c, b]), tolerances)


def test_the_size_of_packs_changes_nothing(base, tolerances):
    assert_as_alone(train_adapters(base, jobs(pack_tokens=1000)), tolerances)
    few, many = jobs(pack_tokens=20)[:2], jobs(pack_tokens=1000)[2:]
    assert_as_alone(train_adapters(base, [*few, *many]), tolerances)


def test_the_same_call_gives_the_same_bits_and_another_seed_others(base):
    one, two = train_adapters(base, jobs()), train_adapters(base, jobs())
    assert all(same(x.adapter, y.adapter) for x, y in zip(one, two, strict=True))
    a = jobs()[0]
    assert same(alone(base, replace(a, name="z")), alone(base, a))
    assert not same(alone(base, replace(a, seed=1)), alone(base, a))


def test_in_float64_who_else_trains_changes_nothing_to_twelve_digits(monkeypatch):
    """With a model and a loss that never leave float64: what remains is float64's rounding."""

    def losses(base, row, edges=None):
        return F.cross_entropy(base.logits(row, edges), row.labels, reduction="none")

    config = transformers.GPT2Config(
        vocab_size=15,
        n_embd=20,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    monkeypatch.setattr(loop, "label_losses", losses)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = transformers.GPT2LMHeadModel(config).double()
        gpt2 = Base(model, models.words_tokenizer(), "gpt2", kernel="sdpa")
        names = {"q_proj": "c_attn", "layers.1.mlp.up_proj": "h.1.mlp.c_fc"}
        some = [
            replace(
                job,
                targets=job.targets and [names[name] for name in job.targets],
                rank_pattern={"c_proj": 7} if job.rank_pattern else {},
            )
            for job in jobs()
        ]
        for job, result in zip(some, train_adapters(gpt2, some), strict=True):
            assert {f.B.dtype for f in result.adapter.values()} == {torch.float64}
            error = distance_from(start(gpt2, job))(result.adapter, alone(gpt2, job))
            assert error < 1e-12, job.name
    finally:
        torch.set_default_dtype(before)


def test_jobs_share_the_rows_of_tokens_and_a_waiting_one_takes_a_place_that_is_free(
    base, monkeypatch
):
    seen = []
    logits = Base.logits

    def counted(self, row, edges=None):
        seen.append(len(edges) - 1)
        return logits(self, row, edges)

    monkeypatch.setattr(Base, "logits", counted)
    train_adapters(base, jobs(pack_tokens=1000))
    # Of 6, 3, 5 and 4 steps.
    assert seen == [4, 4, 4, 3, 2, 1]
    seen.clear()
    train_adapters(base, jobs(pack_tokens=1000), at_once=3)
    assert max(seen) == 3 and sum(seen) == 6 + 3 + 5 + 4 and len(seen) < 9


def test_jobs_wait_where_there_is_no_memory(base, tolerances, monkeypatch):
    most = []
    add = loop._add_gradients

    def counted(base, slots, settings):
        most.append(sum(slot.memory_bytes for slot in slots))
        add(base, slots, settings)

    monkeypatch.setattr(loop, "_add_gradients", counted)
    monkeypatch.setattr(loop, "room_bytes", lambda device: 150_000.0)
    assert_as_alone(train_adapters(base, jobs(pack_tokens=1000)), tolerances)
    assert len(most) > 6 and max(most) <= 150_000
    monkeypatch.setattr(loop, "room_bytes", lambda device: 0.0)
    assert_as_alone(train_adapters(base, jobs()[:2]), tolerances)  # one after the other


def test_a_job_that_diverges_stops_no_other(base, tolerances, tmp_path):
    a, _, c, d = jobs()
    wild = replace(d, name="wild", training=replace(d.training, learning_rate=1e30))
    results = train_adapters(base, [a, wild, c], tmp_path / "out")
    assert [result.name for result in results] == ["a", "wild", "c"]
    assert_as_alone([results[0], results[2]], tolerances)
    assert results[1].adapter is None and results[1].path is None
    assert results[1].failure.startswith("The training loss of job 'wild' is nan at step 2; lower")
    assert not (tmp_path / "out" / "wild").exists()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["jobs"]
    assert [row["name"] for row in summary if row["failure"]] == ["wild"]


def test_the_model_is_left_as_it_was(base):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    train_adapters(base, jobs())
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- what a result says --------------------------------------------------------------------


def test_a_result_has_the_losses_of_its_steps_and_its_tokens(base):
    (result,) = train_adapters(base, jobs()[:1])
    assert len(result.losses) == result.steps == 6 and result.examples == 24
    assert result.losses[-1] < result.losses[0]
    assert min(result.losses) < result.loss < max(result.losses)
    assert result.tokens > 24 * 5 and result.seconds > 0 and result.is_new and result.path is None


def test_a_result_has_the_notices_of_the_model_the_rows_and_the_prompt(base, monkeypatch):
    monkeypatch.setattr(base, "notices", ("The model is odd.",))
    short = replace(jobs()[0], max_tokens=8)
    one, two = train_adapters(base, [short, jobs()[1]])
    assert one.notices[0] == "The model is odd." == two.notices[-1] and len(one.notices) == 2
    assert "rows are longer than data.max_tokens = 8" in one.notices[1]


def test_a_pattern_decides_the_rank_of_its_modules_and_targets_choose_them(base):
    _, b, c, _ = train_adapters(base, jobs())
    assert set(b.adapter) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    ranks = c.adapter.ranks
    assert ranks["model.layers.1.mlp.down_proj"] == 7
    assert ranks["model.layers.0.self_attn.v_proj"] == 5
    assert ranks["model.layers.1.self_attn.v_proj"] == 3 and len(ranks) == 14


# --- on the disk ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT
def test_peft_computes_what_the_trained_adapter_is(base, model_folder, tmp_path):
    results = train_adapters(base, jobs(), tmp_path / "out")
    ids = torch.tensor([[1, 5, 9, 4, 12, 3]])
    for result in results:
        assert result.path == tmp_path / "out" / result.name
        stock = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
        with torch.inference_mode():
            plain = stock(ids).logits
            got = peft.PeftModel.from_pretrained(stock, result.path)(ids).logits
            with base.attached(result.adapter):
                want = base.model(ids).logits
        assert torch.allclose(got, want, atol=1e-4)
        assert not torch.allclose(got, plain, atol=1e-2)
        assert peft_format.check(result.path).alike


def test_the_same_jobs_give_the_same_files(base, tmp_path):
    for name in ("one", "two"):
        train_adapters(base, jobs(), tmp_path / name)
    for job in jobs():
        for file in (peft_format.WEIGHTS, peft_format.CONFIG, "README.md"):
            one, two = (tmp_path / name / job.name / file for name in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()


def trained_now(base: Base, some: Sequence[Job], out: Path) -> list[str]:
    return [result.name for result in train_adapters(base, some, out) if result.is_new]


def test_a_call_that_is_stopped_goes_on_and_jobs_can_be_added(base, tolerances, tmp_path):
    a, b, c, d = jobs()
    results = trained_adapters(base, [a, b, c], tmp_path)
    first = next(results)
    assert (tmp_path / first.name / "job.json").is_file()
    results.close()
    assert sorted(trained_now(base, [a, b, c], tmp_path)) == sorted({"a", "b", "c"} - {first.name})
    assert trained_now(base, [a, b, d, c], tmp_path) == ["d"]
    assert trained_now(base, [d, a], tmp_path) == []
    finished = train_adapters(base, [a, b, c, d], tmp_path)
    assert_as_alone(finished, tolerances)
    assert [result.steps for result in finished] == [6, 3, 5, 4]
    assert not any(result.is_new for result in finished)
    rows = json.loads((tmp_path / "summary.json").read_text())["jobs"]
    assert [row["name"] for row in rows] == ["a", "b", "c", "d"]


def test_a_job_that_is_killed_while_it_is_written_is_trained_again(base, tmp_path, monkeypatch):
    def killed(path, content):
        raise KeyboardInterrupt

    a = jobs()[0]
    with monkeypatch.context() as patch:
        patch.setattr("flexlora.training.finished.write_sealed", killed)
        patch.setattr("flexlora.training.finished.write_summary", lambda *_: None)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            train_adapters(base, [a], tmp_path)
    assert not (tmp_path / "a").exists() and (tmp_path / ".a.partial").exists()
    assert trained_now(base, [a], tmp_path) == ["a"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "summary.json", ".lock"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"rank": 5}, "modules_and_ranks"),
        ({"targets": ["q_proj"]}, "modules_and_ranks"),
        ({"where": {"client": "client2"}}, "rows"),
        ({"max_tokens": 8}, "rows"),
        ({"training": replace(jobs()[0].training, epochs=1, alpha=7.0)}, "training.alpha"),
    ],
    ids=str,
)
def test_the_adapter_of_another_job_is_never_taken_for_it(base, tmp_path, changes, named):
    a = replace(jobs()[0], training=replace(jobs()[0].training, epochs=1))
    train_adapters(base, [a], tmp_path)
    other = replace(a, **changes)
    sentence = rf"/a holds the adapter of another job 'a' \(it differs in {named}\); give another"
    with pytest.raises(AdapterError, match=sentence):
        train_adapters(base, [other], tmp_path)
    assert trained_now(base, [a], tmp_path) == []
    smaller = replace(a, training=replace(a.training, pack_tokens=24, recompute_above=9))
    assert trained_now(base, [smaller], tmp_path) == []  # only memory


def test_another_base_model_is_another_job(base, tmp_path):
    a = jobs()[0]
    train_adapters(base, [a], tmp_path)
    weight = base.model.get_submodule("model.layers.1.mlp.up_proj").base.weight
    before = weight.clone()
    try:
        weight.mul_(1.01)
        with pytest.raises(AdapterError, match=r"differs in base_model"):
            train_adapters(base, [a], tmp_path)
    finally:
        weight.copy_(before)


def test_a_damaged_adapter_is_refused_with_its_file(base, tmp_path):
    a = jobs()[0]
    (result,) = train_adapters(base, [a], tmp_path)
    for file in (peft_format.WEIGHTS, peft_format.CONFIG, "job.json"):
        path = result.path / file
        sound = path.read_bytes()
        path.write_bytes(sound[:-40] + b"x" + sound[-39:])
        with pytest.raises(DamagedFile, match=rf"{file}.*remove the folder to train the job again"):
            train_adapters(base, [a], tmp_path)
        path.write_bytes(sound)
    (result.path / peft_format.WEIGHTS).unlink()
    with pytest.raises(DamagedFile, match=peft_format.WEIGHTS):
        train_adapters(base, [a], tmp_path)
    shutil.rmtree(result.path)
    assert trained_now(base, [a], tmp_path) == ["a"]


def test_folders_with_something_else_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "_loaded", lambda base: pytest.fail("the model is loaded"))
    a = jobs()[0]
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "mine.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"/out/a holds something else .* no job.json"):
        train_adapters("model", [a], tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_text("mine")
    with pytest.raises(AdapterError, match=r"/other/a is a file; give another folder"):
        train_adapters("model", [a], tmp_path / "other")
    for folder in (tmp_path / "other" / "a", tmp_path / "other" / "a" / "b"):
        with pytest.raises(ConfigError, match="cannot be made: it or one of its parents is a file"):
            train_adapters("model", [a], folder)


def test_only_one_process_trains_in_a_folder(base, tmp_path):
    with locked(tmp_path), pytest.raises(ProtocolError, match="Another process runs in"):
        train_adapters(base, jobs(), tmp_path)


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("some", "sentence"),
    [
        ([], "There are no jobs"),
        ([jobs()[0], replace(jobs()[1], name="A")], r"Two jobs are named 'A', apart from capitals"),
        (["a"], r"A job is a str; give flexlora.Job\(...\)"),
        ([replace(jobs()[0], name="Summary.json")], "as the file of results is; rename it"),
    ],
)
def test_jobs_that_cannot_be_told_apart_are_refused(base, some, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train_adapters(base, some)


def test_a_base_model_that_is_none_is_refused(base):
    with pytest.raises(ConfigError, match=r"The base model is a int; give the name or folder"):
        train_adapters(7, jobs())
    with pytest.raises(ConfigError, match=r"at_once is 0; give a whole number of at least 1"):
        train_adapters(base, jobs(), at_once=0)
