import base64
import gzip
import json
import re
import tomllib
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from flexlora.config import dump
from flexlora.federation import compose
from flexlora.journal.lines import checked_line
from flexlora.journal.record import JOURNAL, Event, Record
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

    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.found if "id" in a]

    def links(self) -> list[str]:
        return [str(a["href"]) for tag, a in self.found if tag == "a"]

    def plots(self) -> list[str]:
        """The figures as JSON: what stands between plotly and the script of the page."""
        return [text for text in self.scripts if text.startswith('{"data"')]


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
    assert elements.count("figure") == 14 == len(elements.plots())
    # The figures, plotly, and the script that draws them with it.
    assert elements.count("script") == 16
    (packed,) = re.findall('<script id="plotly" type="application/gzip">(.*?)</script>', html)
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    assert len(html) < 2_500_000
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
        # Links lead to sections of the page, or to files beside it.
        assert str(attributes.get("href", "#")).startswith(("#", "./"))
    policies = [a for tag, a in elements.found if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in str(policies[0]["content"])
    # Plotly's default buttons have one that uploads the figure.
    for plot in elements.plots():
        assert json.loads(plot)["config"]["modeBarButtons"]


def test_the_same_journal_gives_the_same_page(make_journal: Make):
    html = page.render(make_journal())
    assert html == page.render(make_journal())
    names = re.findall(r'<div class="plot" id="(figure-\w+)"', html)
    assert len(names) == len(set(names)) == 14


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
    drawn = "".join(hostile.plots())
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
    elements = Elements(html)
    assert elements.count("figure") == 0 and 'id="plotly"' not in html
    # The rank types and the config are all that there is.
    assert elements.count("section") == 2


def test_an_empty_journal_has_a_page_without_figures(write_journal: Write):
    folder = write_journal([])
    (folder / JOURNAL).touch()
    html = page.write(folder).read_text()
    assert Elements(html).count("section") == 0 and 'id="plotly"' not in html
    assert "The rank types were not recorded." in words(html)
    assert "The config was not recorded." in words(html)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("start", "The config was not recorded."),
        ("client", "No client has completed a round."),
        ("round", "No round was completed."),
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
    assert said.count("first and last round: ") == 2
    assert "All 24 evaluations on unseen clients" in said
    assert "First and last three rounds:" in said and "All 19 rounds" in said
    assert "the 30 with the greatest and the 30 with the smallest gain" in said


def test_a_folder_without_a_journal_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in .*give the folder of a run"):
        page.write(tmp_path)


def test_a_broken_line_is_refused_and_a_cut_one_left_out(make_journal: Make, tmp_path: Path):
    whole = checked_line(make_journal()[0])
    (tmp_path / JOURNAL).write_bytes(whole + b"{'event'")
    assert page.write(tmp_path).exists()
    (tmp_path / JOURNAL).write_bytes(whole + b"{'event'\n")
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


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"columns": {"category": "", "split": ""}}},
        {"data": {"columns": {"messages": "turns"}}},
        {"data": {"columns": {"input": "", "instruction": "q \"1\" \\ é"}}},
        {"method": {"name": "hetlora"}, "federation": {"cohort": None, "fraction": 0.5}},
        {"ranks": {"types": None, "distribution": None, "rank": 4}, "regularizer": {
            "name": "fedprox", "strength": 0.01}},
    ],
)  # fmt: skip
def test_the_config_on_the_page_gives_the_same_settings(make_journal: Make, changes: Any):
    settings = models.settings(Path("runs"), **changes)
    events = make_journal(rounds=1)
    # As the journal has it: JSON, in which a column that is switched off is null.
    events[0]["config"] = json.loads(json.dumps(settings.model_dump(mode="json")))
    command, text = map(unescape, re.findall("<pre>(.*?)</pre>", page.render(events), re.DOTALL))
    assert command == "flexlora run config.toml"
    assert compose.parse(tomllib.loads(text), "config.toml") == settings


def test_a_run_of_real_clients_is_repeated_with_serve_and_join(make_journal: Make):
    events = make_journal()
    assert "flexlora run config.toml" in words(page.render(events))
    events.insert(1, {"event": "asked", "round": 1, "client": "client-3"})
    said = words(page.render(events))
    assert "flexlora serve config.toml" in said and "flexlora join" in said
    assert "flexlora run config.toml" not in said


def test_the_report_names_its_run_and_its_start(make_journal: Make):
    events = make_journal()
    events[0]["time"] = 1_764_000_000.0
    said = words(page.render(events, "mixed-ranks"))
    assert said.startswith("mixed-ranks — flexlora run report mixed-ranks — flexlora run report")
    assert "flexlora on tiny/llama-135m, started 2025-11-24 16:00 UTC, took 1 h 08 min" in said


def test_losses_are_reported_by_kind_and_unused_uploads_are_no_failures(make_journal: Make):
    unused = {"event": "lost", "round": 1, "client": "client-1", "reason": "", "kind": "not_needed"}
    said = words(page.render([*make_journal(), unused]))
    assert "failed to return a usable upload 2 times: no answer (2)." in said
    assert "1 client round ended without an upload because enough others had arrived." in said


def test_the_head_says_how_the_clients_trained_and_leads_to_config_and_adapter(
    make_journal: Make, write_journal: Write
):
    events = make_journal(rounds=1)
    training = {"learning_rate": 2e-4, "schedule": "constant", "optimizer": "adamw"}
    events[0]["config"]["training"] = training | {"max_steps": 10, "batch_examples": 4}
    folder = write_journal([*events[:-1], events[-1] | {"adapter": "/elsewhere/adapter"}])
    elements = Elements(page.write(folder).read_text())
    said = " ".join(" ".join(elements.words).split())
    assert "10 steps, batches of 4 examples, adamw" in said and "0.0002, constant" in said
    links = [link for link in elements.links() if "./" in link]
    assert "/elsewhere/adapter" in said and links == ["./metrics.jsonl"]
    (folder / "config.json").write_text("{}")
    place = folder / "rounds" / "of a %2e\u20ac & b" / "adapter"
    place.mkdir(parents=True)
    events[-1]["adapter"] = str(place)
    record = Record(folder)
    record.append(**events[-1])
    links = [link for link in Elements(page.write(folder).read_text()).links() if "./" in link]
    adapter = "./rounds/of%20a%20%252e%E2%82%AC%20%26%20b/adapter"
    assert links == [adapter, "./config.json", "./metrics.jsonl"]


def test_every_section_has_an_anchor_and_something_to_say(make_journal: Make):
    for events in (make_journal(clients=60), make_journal(rounds=1)[:20], []):
        html = page.render(events)
        elements = Elements(html)
        ids = elements.ids()
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in elements.links() if link.startswith("#")} <= set(ids)
        sections = re.findall('<section id="([^"]*)">(.*?)</section>', html, re.DOTALL)
        nav = re.findall("<nav.*?</nav>", html, re.DOTALL)[0]
        assert re.findall('href="#([^"]*)"', nav) == [name for name, _ in sections]
        for name, content in sections:
            said = re.sub("<h2>.*?</h2>", "", content)
            assert re.search("<(table|figure|p|details|pre)", said), name
            assert said.count('class="missing"') < len(re.findall("<(p|table|figure|pre)\\b", said))


def test_small_samples_stand_with_their_intervals(make_journal: Make):
    said = words(page.render(make_journal()))
    number = r"[+-]?\d+\.\d+"
    assert re.search(rf"to \S+ % \(\S+ points; 95 % interval {number} to {number}\) in 6", said)
    assert re.search(rf"Exact match went from {number} to {number} % \(95 % interval", said)
    assert "Unseen clients (14, n = 196 examples):" in said
    one = make_journal()
    for event in one:
        if event["event"] == "evaluation":
            event["clients"] = [c for c in event["clients"] if not c["seen"]][:1]
    said = words(page.render(one))
    assert re.search(
        r"on 1 unseen client \(11 examples\) rose from \S+ to \S+ % \(\S+ points\)", said
    )


def test_the_worst_client_is_named_with_its_number_of_examples(make_journal: Make):
    events = make_journal()
    for event in events:
        if event["event"] == "evaluation" and event["adapter"] in ("base", "global"):
            score = 0.9 if event["adapter"] == "base" else 0.1
            event["clients"][3] |= {"client": "st-mary", "rouge_l": score, "examples": 10}
    said = words(page.render(events))
    assert "The worst unseen client is st-mary: Rouge-L 1.00 % (n = 10 examples)" in said
    assert re.search(r"\d+ of 40 clients? (is|are) worse than before training \(.*st-mary", said)
    html = page.render(events)
    assert '<td data-order="1">1.00</td>' in html and 'class="sortable"' in html


def answer(round_: int, adapter: str, text: str, rouge: float, i: int = 0) -> dict[str, Any]:
    who = {"population": "unseen", "client": f"client-{i}", "category": None}
    return {
        "round": round_, "adapter": adapter, **who, "prompt": f"Q{i}?", "reference": "Paris",
        "answer": text, "rouge_l": rouge, "exact_match": 0,
    }  # fmt: skip


def test_answers_before_and_after_are_shown_and_escaped(make_journal: Make, write_journal: Write):
    folder = write_journal(make_journal())
    lines = [json.dumps(answer(0, "base", f"before {i} {ATTACK}", i / 20, i)) for i in range(9)]
    lines += [json.dumps(answer(n, "global", f"in round {n}", 0.5, i)) for n in (3, 6)
              for i in range(9)]  # fmt: skip
    lines += ['{"round": 7, "adapter": "glo']
    (folder / "answers.jsonl").write_text("\n".join(lines))
    html = page.write(folder).read_text()
    said = words(html)
    assert "6 of 9 questions with answers" in said
    assert "After round 6 (Rouge-L 50.0 %) in round 6" in said and "in round 3" not in said
    # From the greatest gain to the smallest.
    shown = [int(n) for n in re.findall(r"before (\d)", said)]
    assert shown == sorted(shown) and {shown[0], shown[-1]} == {0, 8} and len(shown) == 6
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html


def test_what_is_configured_without_effect_stands_in_the_head(make_journal: Make):
    events = make_journal(rounds=1)
    events[0]["notices"] = ["The cohort of 40 is larger than the 12 clients."]
    head = page.render(events).split("<nav")[0]
    assert "<p>The cohort of 40 is larger than the 12 clients.</p>" in head


def test_what_was_said_of_certificates_stands_in_the_head(make_journal: Make):
    note = "server.crt expires on 2031-02-03, in 9 days; renew it"
    event = {"event": "certificate", "time": 1.9e9, "round": 1, "note": note, "renewed": False}
    head = page.render([*make_journal(rounds=1), event]).split("<nav")[0]
    assert f"<p>On 2030-03-17: {note}.</p>" in head


def test_long_and_empty_answers():
    row = tables.sample_table([answer(2, "global", "", 0.0) | {"prompt": "x" * 9000}])[0]
    texts = dict(sections.samples([row]).parts[1].parts[0].texts)
    assert texts["After round 2 (Rouge-L 0.0 %)"] == "(empty)"
    assert len(texts["Prompt"]) < 1600 and "7,500 characters left out" in texts["Prompt"]


def test_lost_uploads_stand_by_round(make_journal: Make):
    said = words(page.render(make_journal()))
    assert "Uploads by round" in said and "1 (no answer: 1)" in said
    whole = [e for e in make_journal() if e["event"] != "lost"]
    assert "Uploads by round" not in words(page.render(whole))


def test_numbers_that_stand_in_a_table_are_not_drawn(make_journal: Make):
    titles = re.findall("<h3>(.*?)</h3>", page.render(make_journal()))
    assert "Clients by rank type" not in titles and "Energy kept by truncation" not in titles
    said = words(page.render(make_journal(rounds=1)))
    assert "Bytes by round" not in said and "Rounds" in said


def test_a_score_that_never_changes_is_said_and_not_drawn(make_journal: Make):
    events = make_journal()
    for event in events:
        for client in event.get("clients", []) if event["event"] == "evaluation" else []:
            client["exact_match"] = 0
    html = page.render(events)
    assert "Exact match of the global adapter is 0.00 % in every evaluation" in words(html)
    assert "<h3>Exact match of the global adapter</h3>" not in html


def own_rows(round_: int, **losses: float) -> Event:
    clients = [
        {"client": name, "examples": 5 + i, "loss_total": 10 * loss, "loss_tokens": 10}
        for i, (name, loss) in enumerate(losses.items())
    ]
    values = list(losses.values())
    return {
        "event": "client_evaluation", "round": round_, "clients": clients,
        "missing": {"south": "It did not answer."}, "loss": sum(values) / len(values),
        "loss_min": min(values), "loss_max": max(values), "loss_std": 0.5,
        "worst": max(losses, key=lambda name: losses[name]), "seconds": 1.0, "bytes_down": 0,
    }  # fmt: skip


def test_without_rows_of_the_server_the_clients_own_rows_are_the_outcome(make_journal: Make):
    events = [e for e in make_journal() if e["event"] != "evaluation"]
    events += [own_rows(0, lake=3.0, mary=4.0), own_rows(6, lake=2.0, mary=2.5)]
    html = page.render(events)
    said = words(html)
    assert (
        "Loss on the own held-out rows of 2 clients (11 examples) went from 3.500 to 2.250 nats "
        "per token after 6 rounds. The worst client is mary at 2.500."
    ) in said
    assert "<h3>Loss on the clients&#39; own rows</h3>" in html
    assert "<h3>Loss of each client before and after training</h3>" in html
    # One evaluation is a number and no curve, and says nothing of before.
    said = words(page.render(events[:-2] + events[-1:]))
    assert "(11 examples) is 2.250 nats per token after 6 rounds." in said
    assert "Loss on the clients' own rows Mean weighted" not in said
