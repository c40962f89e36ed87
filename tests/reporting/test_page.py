import json
import re
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.config import dump
from flexlora.federation import compose
from flexlora.journal.record import JOURNAL, Event
from flexlora.reporting import page, sections, tables
from support import models

Make = Callable[..., list[Event]]
Write = Callable[[list[Event]], Path]

ATTACK = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


class Elements(HTMLParser):
    """Collects the elements of a page and the text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.words.append(data)
        elif self.cdata_elem == "script":
            self.scripts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def words(html: str) -> str:
    return " ".join(" ".join(Elements(html).words).split())


def test_the_page_of_a_whole_run(make_journal: Make, write_journal: Write):
    folder = write_journal(make_journal(clients=60))
    path = page.write(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    elements = Elements(html)
    said = words(html)
    assert elements.count("h1") == 1
    assert elements.count("figure") == 16
    # plotly itself, then one call of it for each figure
    assert elements.count("script") == 17
    assert html.count("plotly.js v") == 1
    assert "Rouge-L on 14 unseen clients (196 examples) rose from" in said
    assert "failed to return a usable upload 2 times: no answer (2)." in said
    for word in ("flexlora", "tiny/llama-135m", "NVIDIA H100", "runs/a/adapter", "client-59"):
        assert word in said
    assert "not recorded" not in said and "was evaluated." not in said


def test_the_page_opens_no_connection(make_journal: Make):
    elements = Elements(page.render(make_journal()))
    for tag, attributes in elements.found:
        assert tag not in {"link", "iframe", "img", "object", "form", "base"}
        assert not {"src", "srcset", "action"} & attributes.keys()
        # Links lead to sections of the page, which opens no connection.
        assert attributes.get("href", "#").startswith("#")
    policies = [a for tag, a in elements.found if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in str(policies[0]["content"])
    drawn = [script for script in elements.scripts if "plotly.js v" not in script]
    assert all('"modeBarButtons"' in script for script in drawn)


def test_the_same_journal_gives_the_same_page(make_journal: Make):
    html = page.render(make_journal())
    assert html == page.render(make_journal())
    names = re.findall(r'<div id="(figure-\w+)"', html)
    assert len(names) == len(set(names)) == 16


def poisoned(value: Any) -> Any:
    """The value with the attack beside every word and every key that stands for a name."""
    if isinstance(value, str):
        return value + ATTACK
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    return value


def test_no_text_of_the_journal_becomes_markup(make_journal: Make):
    clean = make_journal()
    events = [poisoned(e) | {"event": e["event"]} for e in clean]
    for event in events:
        for field in ("energy", "values", "rank_types", "trainable", "versions", "hardware"):
            if field in event:
                event[field] = {f"{k}{ATTACK}": v for k, v in event[field].items()}
        if event["event"] == "evaluation":
            name = event["adapter"].removesuffix(ATTACK)
            event["adapter"] = name if name in ("base", "global") else event["adapter"]
    events[0]["config"][ATTACK] = {ATTACK: ATTACK}
    plain, hostile = Elements(page.render(clean)), Elements(page.render(events))
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in plain.found]
    assert [a.keys() for _, a in hostile.found] == [a.keys() for _, a in plain.found]
    # The figures show the names, which plotly would read as markup if they were not escaped.
    drawn = "".join(script for script in hostile.scripts if "plotly.js v" not in script)
    assert "alert" in drawn
    assert not re.search(r"(<|\\u003c)(/|\\u002f)?(script|img)", drawn)


def test_half_a_surrogate_pair_in_a_name_does_no_harm(make_journal: Make, write_journal: Write):
    events = make_journal(rounds=2)
    for event in events:
        if event["event"] in ("client", "lost"):
            event["client"] += "\ud800"
        for client in event.get("clients", []) if event["event"] == "evaluation" else []:
            client["category"] += "\ud800"
    assert page.write(write_journal(events)).stat().st_size > 1_000_000


def test_a_run_stopped_before_its_first_round(make_journal: Make, write_journal: Write):
    html = page.write(write_journal(make_journal()[:1])).read_text()
    said = words(html)
    assert "No round was completed, so there is no result." in said
    assert "The run is not complete: it has 0 completed rounds." in said
    assert "No evaluation was recorded" in said
    assert "No spectrum of the global update was recorded." in said
    assert "No client has completed a round." in said
    assert "not written: the run is not complete" in said
    assert Elements(html).count("figure") == 2


def test_an_empty_journal_has_a_page_without_figures(write_journal: Write):
    folder = write_journal([])
    (folder / JOURNAL).touch()
    html = page.write(folder).read_text()
    assert Elements(html).count("script") == 0
    assert "The rank types were not recorded." in words(html)
    assert "The config was not recorded." in words(html)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("start", "The rank types were not recorded."),
        ("client", "No client has completed a round."),
        ("round", "No completed round counted its bytes."),
        ("spectrum", "No spectrum of the global update was recorded."),
        ("evaluation", "No evaluation was recorded, so there are no scores."),
        ("finish", "The run is not complete: it has 6 completed rounds."),
    ],
)
def test_a_page_without_one_kind_of_event(make_journal: Make, kind: str, sentence: str):
    events = [e for e in make_journal() if e["event"] not in (kind, "lost")]
    said = words(page.render(events))
    assert sentence in said


def test_without_evaluation_the_training_loss_is_the_outcome(make_journal: Make):
    events = [e for e in make_journal() if e["event"] != "evaluation"]
    said = words(page.render(events))
    assert re.search(r"Training loss went from 2\.\d+ nats per token in round 1 to 1\.\d+", said)


def test_without_unseen_clients_the_seen_ones_speak(make_journal: Make):
    events = make_journal()
    for event in events:
        if event["event"] == "evaluation":
            event["clients"] = [c for c in event["clients"] if c["seen"]]
    said = words(page.render(events))
    assert "Rouge-L on 26 seen clients" in said
    assert "No unseen clients were evaluated." in said


def test_without_a_first_evaluation_the_outcome_says_so(make_journal: Make):
    events = [e for e in make_journal() if (e["event"], e.get("round")) != ("evaluation", 0)]
    said = words(page.render(events))
    assert "after round 6; it was not measured before training." in said
    assert "There are no scores by category from before and after training." in said


def test_an_equal_score_stayed():
    row = tables.EvaluationRow(0, "base", "seen", 3, 11, 25.0, None, None)
    last = tables.EvaluationRow(7, "global", "seen", 3, 11, 25.0, None, None)
    facts = tables.run_facts([])
    assert sections.outcome(facts, [], [row, last]) == (
        "Rouge-L on 3 seen clients (11 examples) stayed at 25.00 % in 7 rounds."
    )


def test_a_long_run_shows_ends_of_its_table_and_of_its_categories(make_journal: Make):
    said = words(page.render(make_journal(clients=8, rounds=19, categories=200)))
    assert "First and last round: " in said
    assert "All 24 evaluations" in said
    assert "the 30 with the greatest and the 30 with the smallest gain" in said


def test_a_folder_without_a_journal_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in .*give the folder of a run"):
        page.write(tmp_path)


def test_a_broken_line_is_refused_and_a_cut_one_left_out(make_journal: Make, tmp_path: Path):
    whole = json.dumps(make_journal()[0])
    (tmp_path / JOURNAL).write_text(whole + "\n{'event'")
    assert page.write(tmp_path).exists()
    (tmp_path / JOURNAL).write_text(whole + "\n{'event'\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not an event"):
        page.write(tmp_path)


plain = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=9),
)
configs = st.recursive(
    st.dictionaries(st.text(max_size=5), plain | st.lists(plain, max_size=3), max_size=4),
    lambda inner: st.dictionaries(
        st.text(max_size=5), inner | plain | st.lists(inner, max_size=2), max_size=3
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(configs)
def test_a_config_survives_toml(config: dict[str, Any]):
    assert tomllib.loads(dump(config)) == config


def test_toml_leaves_out_what_has_no_value():
    text = dump({"model": {"revision": None, "name": "a"}, "seed": 5})
    assert tomllib.loads(text) == {"seed": 5, "model": {"name": "a"}}


def test_a_column_that_the_data_lacks_stays_switched_off_in_the_config_to_save():
    """Left out, it would be read with its default, which is a name."""
    settings = models.settings(Path("runs"), data={"columns": {"category": "", "split": "part"}})
    text = dump(settings.model_dump(mode="json"))
    columns = tomllib.loads(text)["data"]["columns"]
    assert (columns["category"], columns["split"]) == ("", "part")
    again = compose.parse(tomllib.loads(text), "config.toml")
    assert again == settings


def test_a_run_of_real_clients_is_repeated_with_serve_and_join(make_journal: Make):
    events = make_journal()
    assert "run it with flexlora run config.toml" in words(page.render(events))
    events.insert(1, {"event": "asked", "round": 1, "client": "client-3"})
    said = words(page.render(events))
    assert "flexlora serve config.toml" in said and "flexlora join" in said
    assert "flexlora run config.toml" not in said


def test_the_report_names_its_run_and_its_start(make_journal: Make):
    events = make_journal()
    events[0]["time"] = 1_764_000_000.0
    said = words(page.render(events, "mixed-ranks"))
    assert "Run report: mixed-ranks" in said
    assert "flexlora on tiny/llama-135m, started 2025-11-24 16:00 UTC" in said


def test_losses_are_reported_by_kind_and_unused_uploads_are_no_failures(make_journal: Make):
    unused = {"event": "lost", "round": 1, "client": "client-1", "reason": "", "kind": "not_needed"}
    said = words(page.render([*make_journal(), unused]))
    assert "failed to return a usable upload 2 times: no answer (2)." in said
    assert "1 client round ended without an upload because enough others had arrived." in said
