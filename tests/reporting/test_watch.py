"""The status page: what it reads, what it says, to whom, and that its script works."""

import base64
import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from flexlora import addresses
from flexlora.journal import JOURNAL, LossKind, Record
from flexlora.journal.lines import checked_line
from flexlora.reporting import watch
from flexlora.reporting.watch import Estimate, curve, page, words
from flexlora.reporting.watch.run_state import LOGGED, RunState

pytest.importorskip("fastapi", reason="needs the extra flexlora[watch]")
prometheus = pytest.importorskip("prometheus_client.parser", reason="needs flexlora[watch]")

EVIL = "<script>alert('x')</script>&\u202eexe"
CONFIG = {
    "method": {"name": "flexlora"},
    "model": {"name": "tiny/<b>llama</b>"},
    "federation": {"rounds": 5, "cohort": 3, "quorum": 2},
}
TYPES = {"small": [2], "wide": [2, 5]}


def start(**changes):
    facts = {"config": CONFIG, "version": "0.1.0", "clients": 4, "ranks": TYPES}
    return {"event": "start", "time": 100.0, **facts, "resumed": False, **changes}


def joined(name, time=101.0, **changes):
    facts = {"rank_type": "", "ranks": [7], "examples": 29, "device": "cpu"}
    event = {"event": "joined", "time": time, "round": 1, "client": name, **facts}
    return {**event, "tokens_per_second": None, **changes}


def asked(name, round=1, time=102.0):
    return {"event": "asked", "time": time, "round": round, "client": name}


def upload(name, round=1, time=110.0, rank_type="wide"):
    facts = {"examples": 13, "tokens": 300, "computed": 290, "steps": 3, "loss_total": 34.0}
    facts |= {"loss_tokens": 17, "seconds": 2.0, "bytes_up": 3072, "bytes_down": 2048}
    event = {"event": "client", "time": time, "round": round, "client": name}
    return {**event, "rank_type": rank_type, **facts}


def lost(name, reason="It did not answer.", round=1, kind="no_answer"):
    event = {"event": "lost", "time": 120.0, "round": round, "client": name, "reason": reason}
    return event if kind is None else {**event, "kind": kind}


def finished_round(number=1, time=130.0):
    facts = {"cohort": ["a", "b"], "received": 2, "examples": 26, "tokens": 600, "loss_total": 68.0}
    facts |= {"loss_tokens": 34, "seconds": 12.0, "aggregate_seconds": 0.5, "bytes_up": 6144}
    event = {"event": "round", "time": time, "round": number, **facts}
    return {**event, "bytes_down": 4096, "update_norm": 1.5}


def evaluation(adapter="global", round=1, loss_total=3.0):
    row = {"examples": 4, "rouge_l": 1.0, "exact_match": 2, "loss_total": loss_total}
    rows = [{**row, "client": "a", "seen": seen, "loss_tokens": 2} for seen in (True, False)]
    return {
        "event": "evaluation",
        "round": round,
        "adapter": adapter,
        "seconds": 1,
        "clients": rows,
    }


def write(folder, *events):
    with (folder / JOURNAL).open("ab") as journal:
        journal.writelines(checked_line(event) for event in events)


def standing(*events):
    found = RunState()
    for event in events:
        found.add(event)
    return found


def get(url, path="", method="GET", host=None):
    """The status, headers and text that a real request brings."""
    place = url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(place, timeout=20)
    try:
        connection.request(method, f"/{path}", headers={"Host": host or place})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    with watch.start(folder) as page_of:
        yield folder, page_of.url


# --- how a run stands ----------------------------------------------------------------------


def test_clients_go_through_their_states():
    now = standing(start(), *(joined(name) for name in "abcd"))
    assert now.by_state == {"idle": 4, "training": 0, "answered": 0, "lost": 0}
    for event in (asked("a"), asked("b"), asked("c"), upload("a"), lost("c")):
        now.add(event)
    assert [now.state_of(name) for name in "abcd"] == ["answered", "training", "lost", "idle"]
    assert now.by_state == {"idle": 1, "training": 1, "answered": 1, "lost": 1}
    now.add(finished_round())
    assert [now.state_of(name) for name in "abcd"] == ["idle", "idle", "lost", "idle"]
    now.add(asked("c", round=2))
    assert now.state_of("c") == "training"
    now.add(lost("c", round=2))
    now.add(joined("c"))
    assert now.state_of("c") == "idle"
    client = now.clients["c"]
    assert (client.lost, client.turns, client.examples) == (2, 0, 29)


def test_a_simulation_has_no_clients_that_join():
    now = standing(start(), upload("a"), upload("b", rank_type="small"))
    assert now.clients["a"].ranks == (2, 5) and now.clients["b"].ranks == (2,)
    assert now.clients["a"].tokens_per_second == 150
    assert (now.totals["tokens"], now.totals["bytes_up"]) == (600, 6144)
    now.add(upload("a", round=2))
    assert now.clients["a"].bytes_down == 4096 and now.clients["a"].turns == 2
    assert now.state_of("b") == "idle"


def test_rounds_and_uploads_are_counted():
    now = standing(start())
    assert (now.round, now.rounds, now.planned, now.wanted) == (1, 0, 5, 3)
    for event in (upload("a"), upload("b"), finished_round(), evaluation(), upload("a", round=2)):
        now.add(event)
    assert (now.round, now.rounds) == (2, 1)
    assert now.loss == 2.0 and now.tokens_per_second == 50
    assert now.scores["global", "unseen"].rouge_l == 25
    now.add(finished_round(5))
    assert now.round == 5
    assert standing(start(config={"federation": {"fraction": 0.5}})).wanted == 2


def test_a_round_that_is_short_of_its_quorum_waits():
    short = {"event": "short", "round": 1, "attempt": 1, "received": 1, "quorum": 2}
    now = standing(start(), asked("a"), asked("b"), upload("a"), lost("b"), short)
    assert now.state == "short"
    now.add(asked("c"))
    assert now.state == "short"
    now.add(upload("c"))
    assert now.state == "running"


def test_a_run_ends_stops_and_goes_on():
    assert RunState().state == "waiting"
    now = standing(start(), asked("a"))
    assert now.state == "running"
    now.add({"event": "stopped", "reason": "ValueError: nobody"})
    assert now.state == "stopped" and now.state_of("a") == "idle"
    now.add(start(resumed=True))
    assert now.state == "running" and now.state_of("a") == "idle"
    now.add({"event": "finish", "rounds": 5, "seconds": 9.0, "adapter": "x"})
    assert now.state == "finished"
    now.add({"event": "an event of a later version"})
    assert now.state == "finished"


@pytest.mark.parametrize("kind", [kind for kind in LossKind if kind is not LossKind.NOT_NEEDED])
def test_a_loss_is_counted_by_its_kind_and_not_by_its_words(kind):
    now = standing(start(), lost("a", "It was not needed any more.", kind=kind.value))
    assert now.losses == {kind: 1}
    assert now.state_of("a") == "lost" and now.clients["a"].lost == 1


def test_a_client_that_was_not_needed_has_not_failed():
    now = standing(start(), asked("a"), lost("a", "Any words.", kind="not_needed"))
    assert now.losses == {LossKind.NOT_NEEDED: 1}
    assert now.state_of("a") == "idle" and now.clients["a"].lost == 0


def test_losses_of_journals_without_kinds_are_of_another_kind():
    now = standing(start(), lost("a", "It did not answer.", kind=None))
    assert now.losses == {LossKind.OTHER: 1} and now.state_of("a") == "lost"


# --- in words ------------------------------------------------------------------------------


def shown(*events, at=200.0):
    return words.status(standing(*events), "my-run", at)["shown"]


def test_the_page_says_how_far_the_run_is():
    said = shown(
        start(), upload("a"), finished_round(), asked("a", 2), upload("b", 2), evaluation()
    )
    assert said["progress"] == {"share": pytest.approx((1 + 1 / 3) / 5, abs=1e-3)} | {
        "text": "round 2 of 5: 1 of 3 uploads"
    }
    assert said["title"] == "round 2 of 5: 1 of 3 uploads · my-run"
    assert said["about"] == "flexlora on tiny/<b>llama</b> (flexlora 0.1.0)"
    facts = {label: (value, note) for label, value, note in said["facts"]}
    assert facts["Training loss"] == ("2.000", "nats per token, last round")
    assert facts["Last round"] == ("12.0 s", "of which 0.5 s aggregation")
    assert facts["Received"] == ("6.0 KiB", "6.0 KiB in the last round")
    assert facts["Last event"] == ("90 s ago", "in the journal")
    assert said["scores"][0]["cells"] == ["global", "1", "seen", "4", "25.0", "50.0", "1.500"]


def test_a_row_says_all_of_a_client():
    said = shown(start(), joined("b", ranks=[2, 7]), asked("b"), joined("a"), asked("a"), lost("a"))
    first, second = said["clients"]
    assert first["state"] == "lost"
    assert first["cells"] == [
        "a", "rank 7", "29", "failed: It did not answer.", "–", "0 B", "0 B", "0", "1", "99 s ago",
    ]  # fmt: skip
    assert second["cells"][1:4] == ["ranks 2, 7", "29", "training for 98 s"]
    assert said["count"] == "2 of 4 clients have been active: 1 training, 1 failed."


def test_the_time_left_is_shown_and_of_a_finished_run_the_time_it_took():
    now = standing(start(), finished_round())

    def fact(left):
        return words.status(now, "my-run", 200.0, left=left)["shown"]["facts"][0]

    assert fact(None) == ["Time left", "–", "not known yet"]
    assert fact(Estimate(125.0, False)) == ["Time left", "2 min 05 s", "estimated"]
    assert fact(Estimate(7.0, True)) == ["Time left", "7 s", "without evaluations"]
    now.add({"event": "finish", "rounds": 5, "seconds": 61.0, "adapter": "x"})
    assert fact(None) == ["Took", "1 min 01 s", "since it was started or resumed"]


def test_ranks_are_spelled():
    config = CONFIG | {"ranks": {"types": {"wide": {"attention": 2, "feed_forward": 5}}}}
    said = shown(
        start(config=config),
        upload("a"),
        joined("b", rank_type="r4-0", ranks=[0, 4]),
        joined("c", rank_type="r8", ranks=[8]),
        joined("d", rank_type="", ranks=[]),
        upload("e", rank_type="small"),
        joined("f", rank_type="attention 4, feed_forward 0", ranks=[0, 4]),
        joined("g", rank_type="rank 8", ranks=[8]),
    )
    assert [row["cells"][1] for row in said["clients"]] == [
        "wide: attention 2, feed_forward 5",
        "attention 4, feed_forward 0",
        "rank 8",
        "–",
        "small: rank 2",
        "attention 4, feed_forward 0",
        "rank 8",
    ]


def test_the_last_events_say_who_when_and_why():
    refused = {"event": "refused", "time": 103.0, "round": 1, "reason": "Its rows have no answers."}
    said = shown(
        start(),
        joined("north"),
        refused,
        refused | {"client": "lake"},
        lost("north", "It did not answer within 90 s."),
        lost("south", "x", kind="not_needed"),
        {"event": "stray", "round": 1, "client": "south", "reason": "It came late."},
        {"event": "short", "round": 1, "attempt": 1, "received": 1, "quorum": 2},
        finished_round(),
        evaluation("base", 0),
        {"event": "stopped", "time": 150.0, "reason": "ProtocolError: nobody"},
        start(resumed=True),
    )
    texts = [row["cells"][2] for row in reversed(said["events"])]
    assert texts == [
        "run started",
        "client north connected",
        "a client was rejected: Its rows have no answers.",
        "client lake was rejected: Its rows have no answers.",
        "no usable upload from client north: It did not answer within 90 s.",
        "upload from client south not used: enough uploads had arrived",
        "late or repeated answer from client south, ignored: It came late.",
        "1 of 2 uploads for the quorum",
        "round aggregated: 2 uploads",
        "evaluated: base",
        "run stopped: ProtocolError: nobody",
        "run resumed",
    ]
    bad = [row["cells"][2].split(":")[0] for row in said["events"] if row["state"] == "bad"]
    assert len(bad) == 5 and "client lake was rejected" in bad
    when, number, _ = said["events"][-3]["cells"]
    assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d:43", when) and number == "1"


def test_an_expiring_certificate_is_said_and_is_bad_until_it_is_renewed():
    note = "server.crt expires on 2031-02-03, in 9 days; renew it"
    event = {"event": "certificate", "time": 103.0, "round": 1, "note": note, "renewed": False}
    said = shown(start(), event, event | {"note": "the gate shows it anew", "renewed": True})
    assert [(row["cells"][2], row["state"]) for row in said["events"]] == [
        ("the gate shows it anew", ""),
        (note, "bad"),
        ("run started", ""),
    ]


def test_only_the_latest_events_are_kept():
    now = standing(start(), *(joined(f"client-{i}") for i in range(LOGGED + 7)))
    assert len(now.log) == LOGGED
    said = words.status(now, "my-run", 200.0)["shown"]["events"]
    assert len(said) == words.MOST_EVENTS
    assert said[0]["cells"][2] == f"client client-{LOGGED + 6} connected"


def test_the_curve_has_the_losses_of_training_and_of_evaluation():
    losses = (4.0, 2.0, 1.0)
    rounds = [finished_round(n) | {"loss_total": 34 * loss} for n, loss in enumerate(losses, 1)]
    found = curve.loss_curve(
        standing(start(), evaluation("base", 0, 6.0), *rounds, evaluation("global", 3, 3.0))
    )
    training, unseen, seen, own = found.lines
    assert (found.top, found.bottom, found.first, found.last) == (
        "4.000", "1.000", "round 0", "round 3",
    )  # fmt: skip
    assert (training.last, unseen.last, seen.last) == ("1.000", "1.500", "1.500") and not own.last

    def places(path):
        return [tuple(map(float, xy)) for xy in re.findall(r"([\d.]+) ([\d.]+)", path)]

    # The largest loss is on top, and rounds go to the right at equal distances.
    xs, ys = zip(*places(training.line), strict=True)
    assert ys == (12.0, pytest.approx(129.3, abs=0.1), 188.0)
    assert xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.2) and xs[2] == 940.0
    assert places(seen.line)[0][0] == 60.0
    assert training.points.count("h0") == 3 and len(places(training.points)) == 3


def test_what_clients_evaluate_themselves_is_in_the_curve_and_the_log():
    event = {"event": "client_evaluation", "round": 2, "clients": [{}, {}], "loss": 1.25}
    said = shown(start(), event | {"missing": {"north": "It did not answer."}})
    assert said["curve"]["lines"][3] | {"line": "", "points": ""} == {
        "name": "clients' own rows", "last": "1.250", "line": "", "points": "",
    }  # fmt: skip
    assert said["events"][0]["cells"][2] == "2 clients evaluated rows of their own; 1 did not"
    none = event | {"clients": [], "missing": {}, "loss": None}
    assert shown(start(), none)["curve"]["top"] == ""


def test_a_curve_of_one_round_is_a_point_and_one_of_none_is_hidden():
    nothing = curve.loss_curve(standing(start()))
    assert nothing.top == "" and len(nothing.lines) == 4
    assert 'id="loss" hidden' in page.render(shown(start()))
    one = curve.loss_curve(standing(start(), finished_round()))
    assert one.lines[0].points == "M500.0 100.0h0" and one.last == ""
    assert 'id="loss" hidden' not in page.render(shown(start(), finished_round()))


def test_a_curve_of_many_rounds_stays_small_and_ends_at_the_last():
    now = standing(start(), *(finished_round(n) for n in range(1, 1302)))
    line = curve.loss_curve(now).lines[0]
    assert line.line.count("L") < curve.MOST_POINTS and line.points == ""
    assert re.search(r"L940\.0 [\d.]+$", line.line)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"base": True, "every": 0, "seen_clients": 2}, "Not evaluated yet."),
        (
            {"base": False, "every": 0, "seen_clients": 2},
            "The first evaluation is after the last round.",
        ),
        (
            {"seen_clients": 0, "unseen_clients": 0},
            "The server evaluates nothing with this config.",
        ),
    ],
)
def test_an_empty_table_says_what_is_to_come_and_of_a_finished_run_nothing(settings, text):
    config = CONFIG | {"evaluation": settings}
    assert shown(start(config=config))["empty"]["scores"] == text
    end = {"event": "finish", "rounds": 5, "seconds": 9.0, "adapter": "x"}
    said = page.render(shown(start(config=config), end))
    assert 'data-empty="Nothing was evaluated."' in said and "yet" not in said.split("<script")[0]


def test_events_without_times_are_shown_without():
    events = (start(), asked("a"), asked("b"), upload("b"), finished_round(), asked("a", 2))
    bare = [{k: v for k, v in event.items() if k != "time"} for event in events]
    said = shown(*bare)
    assert [row["cells"][3] for row in said["clients"]] == ["training", "idle"]
    assert [row["cells"][-1] for row in said["clients"]] == ["–", "–"]


def test_who_was_not_needed_is_no_alarm():
    (row,) = shown(start(), lost("a", kind="not_needed"))["clients"]
    assert row["state"] == "idle" and row["cells"][3] == "idle: its upload was not needed"


def test_names_are_in_the_order_of_people():
    names = ["client-10", "client-9", "client-9a", "b", "1", "9" * 5000, "٣", ""]
    said = [row["cells"][0] for row in shown(start(), *map(asked, names))["clients"]]
    assert said.index("client-9") < said.index("client-9a") < said.index("client-10")
    assert said[0] == "" and said.index("1") < said.index("9" * 59 + "…") < said.index("b")


def test_of_many_clients_the_last_heard_of_are_shown():
    events = [asked(f"client-{i}") for i in range(words.MOST_CLIENTS + 37)]
    said = words.status(standing(start(), *events, upload("client-3")), "my-run", 200.0)
    names = [row["name"] for row in said["clients"]]
    assert len(names) == words.MOST_CLIENTS
    assert "client-3" in names and "client-36" not in names and "client-236" in names
    assert said["shown"]["more"] == "37 less recently active clients not shown."
    assert said["clients_not_listed"] == 37


def test_long_and_invisible_text_is_made_visible():
    said = shown(start(), lost("a" * 99, "x" * 999), lost("north\u202egnp.exe\ud800"))
    first, second = said["clients"]
    assert first["cells"][0] == "a" * 59 + "…" and len(first["cells"][3]) == len("failed: ") + 160
    assert second["cells"][0] == "north\ufffdgnp.exe\ufffd"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s ago"), (-3, "0 s ago"), (119, "119 s ago"), (120, "2 min ago"), (9000, "2 h ago"),
     (260000, "3 days ago")],
)  # fmt: skip
def test_how_long_ago(seconds, text):
    said = shown(start(), upload("a"), at=110.0 + seconds)
    assert said["clients"][0]["cells"][-1] == text


# --- the page ------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The tags of a page, and the text that stands in some of them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "style", "script"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("td", "style", "script"):
            self.cells[-1] += data


def test_names_never_become_markup():
    events = (start(), joined(EVIL, rank_type=EVIL), lost(EVIL, EVIL), evaluation(adapter=EVIL))
    text = page.render(words.status(standing(*events), EVIL, 200.0)["shown"])
    tags = Reader(text).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert "alert" not in page.SCRIPT and "<script>alert" not in text and "<b>llama" not in text
    assert text.count("&lt;script&gt;alert") >= 5
    assert not any(name.startswith("on") for _, found in tags for name in found)


def test_the_page_is_whole_and_fetches_nothing():
    tags = Reader(page.render(shown(start()))).tags
    links = {v for _, found in tags for k, v in found.items() if k in ("src", "href")}
    assert links == {"data:,", "status.json", "metrics", ""}
    assert "url(" not in page.STYLE and "innerHTML" not in page.SCRIPT


def test_the_script_has_a_place_for_all_that_is_said():
    said = shown(start(), asked("a"), evaluation())
    tags = Reader(page.render(said)).tags
    ids = {found["id"] for _, found in tags if "id" in found}
    assert set(re.findall(r'at\("(\w+)"\)', page.SCRIPT)) <= ids
    assert {"about", "count", "more", "updated", "scores", "clients", "facts"} <= ids
    assert len(said["clients"][0]["cells"]) == len(page.CLIENTS)
    assert len(said["scores"][0]["cells"]) == len(page.SCORES)


# --- the server ----------------------------------------------------------------------------


def test_the_page_stands_there_without_its_script(served):
    folder, url = served
    code, headers, text = get(url)
    assert code == 200 and "waiting for the run to start" in text
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    write(folder, start(), asked("hospital"), upload("hospital"), evaluation())
    cells = Reader(get(url)[2]).cells
    assert {"hospital", "wide: ranks 2, 5", "answered", "3.0 KiB", "25.0"} <= set(cells)
    assert "<h1>my-run</h1>" in get(url)[2]


def test_the_policy_allows_this_script_and_this_style_alone(served):
    _, url = served
    _, headers, text = get(url)
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


@pytest.mark.parametrize("path", ["", "status.json", "metrics", "nowhere", "docs", "../etc/passwd"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_every_answer_is_guarded_and_nothing_can_be_written(served, path, method):
    folder, url = served
    write(folder, start())
    before = (folder / JOURNAL).read_bytes()
    code, headers, text = get(url, path, method)
    known = path in ("", "status.json", "metrics")
    assert code == (404 if not known else 200 if method in ("GET", "HEAD") else 405)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Server" not in headers
    assert method != "HEAD" or text == ""
    assert (folder / JOURNAL).read_bytes() == before and len(list(folder.iterdir())) == 1


def test_the_status_follows_the_journal(served):
    folder, url = served
    write(folder, start(), asked(EVIL), upload(EVIL))
    found = json.loads(get(url, "status.json")[2])
    assert found["name"] == "my-run" and found["clients"][0]["name"] == EVIL
    assert (found["state"], found["round"], found["rounds_planned"]) == ("running", 1, 5)
    assert found["seconds_left"] is not None
    length = Record(folder).bytes
    write(folder, lost("a\ud800"), finished_round())
    found = json.loads(get(url, "status.json")[2])
    assert found["rounds_finished"] == 1 and found["losses"] == {"no_answer": 1}
    assert get(url)[0] == 200
    Record(folder).rewind(length)
    found = json.loads(get(url, "status.json")[2])
    assert found["rounds_finished"] == 0 and found["losses"] == {}
    assert found["totals"]["uploads"] == 1


def test_the_report_is_linked_and_served_once_there_is_one(served):
    folder, url = served
    write(folder, start())
    assert 'id="link" hidden' in get(url)[2] and get(url, "report.html")[0] == 404
    (folder / "report.html").write_text("<p>the report</p>")
    assert '<p id="link"><a id="report" href="report.html">' in get(url)[2]
    assert json.loads(get(url, "status.json")[2])["shown"]["report"] == "report.html"
    code, headers, text = get(url, "report.html")
    assert (code, text) == (200, "<p>the report</p>")
    # The policy of a report, whose figures need its own scripts, and still no connection.
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "script-src 'unsafe-inline'" in headers["Content-Security-Policy"]
    assert headers["X-Frame-Options"] == "DENY" and headers["Cache-Control"] == "no-store"


def test_a_page_for_others_does_not_serve_the_report(tmp_path, monkeypatch, capsys):
    """It contains rows of data."""
    write(tmp_path, start())
    (tmp_path / "report.html").write_text("rows")
    monkeypatch.setattr("flexlora.addresses.is_loopback", lambda host: False)
    with watch.start(tmp_path) as page_of:
        assert get(page_of.url, "report.html")[0] == 404
        assert 'id="link" hidden' in get(page_of.url)[2]


def test_a_journal_that_cannot_be_read_is_said(served):
    folder, url = served
    (folder / JOURNAL).write_text("{\n")
    for path in ("", "status.json", "metrics"):
        code, headers, text = get(url, path)
        assert code == 500 and "is not an event" in text
        assert headers["Content-Type"].startswith("text/plain")


def test_names_that_were_made_to_point_here_are_turned_away(served):
    _, url = served
    port = url.rstrip("/").rpartition(":")[2]
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert get(url, host=host)[0] == 200
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "[::1", " ", "::1"):
        assert get(url, host=host)[0] == 421, host


def test_metrics_are_what_prometheus_reads(served):
    folder, url = served
    events = [start(), upload(EVIL), upload("b"), lost("c"), lost("d", kind="client_error")]
    events += [lost("e", kind=None), finished_round()]
    write(folder, *events, evaluation(), evaluation("base", 0), asked("b", 2))
    code, headers, text = get(url, "metrics")
    assert code == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in prometheus.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["flexlora_rounds_total",] == 1 and found["flexlora_uploads_total",] == 2
    losses = {labels[0]: n for (name, *labels), n in found.items() if name == "flexlora_lost_total"}
    assert losses == dict.fromkeys(LossKind, 0) | {"no_answer": 1, "client_error": 1, "other": 1}
    assert found["flexlora_upload_bytes_total",] == 6144
    assert found["flexlora_download_bytes_total",] == 4096
    assert found["flexlora_tokens_total",] == 600 and found["flexlora_strays_total",] == 0
    assert found["flexlora_round",] == 2 and found["flexlora_rounds_planned",] == 5
    assert found["flexlora_training_loss",] == 2.0
    assert found["flexlora_round_seconds",] == 12 and found["flexlora_server_seconds",] == 0.5
    assert found["flexlora_evaluation_rouge_l", "global", "unseen"] == 25
    assert found["flexlora_evaluation_loss", "base", "seen"] == 1.5
    assert found["flexlora_clients", "training"] == 1 and found["flexlora_clients", "idle"] == 1
    assert "alert" not in text


def test_series_do_not_grow_with_clients_and_reasons(served):
    folder, url = served
    write(folder, start(), upload("a"), lost("b"), finished_round())
    few = len(get(url, "metrics")[2].splitlines())
    write(folder, *(lost(f"client-{i}", f"reason {i}", 2) for i in range(300)))
    assert len(get(url, "metrics")[2].splitlines()) == few


# --- starting and stopping -----------------------------------------------------------------


def test_a_page_that_is_stopped_frees_its_port(tmp_path):
    first = watch.start(tmp_path)
    port = int(first.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: "):
        watch.start(tmp_path, port=port)
    first.stop()
    first.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with watch.start(tmp_path, port=port) as again:
        assert get(again.url)[0] == 200


def test_an_address_that_others_reach_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flexlora.addresses.is_loopback", lambda host: False)
    with watch.start(tmp_path) as page_of:
        assert get(page_of.url, host="my.server")[0] == 200
        assert f"everyone who reaches {page_of.url}" in capsys.readouterr().err
    monkeypatch.undo()
    with watch.start(tmp_path):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.7", False), ("localhost.example", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host, alone):
    from flexlora.reporting.watch import server

    assert addresses.is_loopback(host) is alone
    assert (server._hosts(host) is None) is not alone


@pytest.mark.parametrize(
    ("text", "place"),
    [("127.0.0.1:8800", ("127.0.0.1", 8800)), ("[::1]:0", ("::1", 0)), ("here:80", ("here", 80))],
)
def test_addresses(text, place):
    assert watch.address(text) == place


@pytest.mark.parametrize("text", ["8800", "127.0.0.1", ":80", "a:b", "a:99999", "a:-1", "a:²", ""])
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=r"--listen takes HOST:PORT"):
        watch.address(text)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in ("server", "metrics"):
        monkeypatch.delitem(sys.modules, f"flexlora.reporting.watch.{name}", raising=False)
    monkeypatch.delattr("flexlora.reporting.watch.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"'uvicorn'.*pip install 'flexlora\[watch\]'"):
        watch.start  # noqa: B018


# --- the command ---------------------------------------------------------------------------


def test_the_command_wants_a_run(monkeypatch, capsys, tmp_path):
    from flexlora.cli import main

    monkeypatch.setattr(sys, "argv", ["flexlora", "watch", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert f"There is no run in {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    write(tmp_path, start(), asked("hospital"))
    words_ = [sys.executable, "-m", "flexlora", "watch", str(tmp_path), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(words_, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert "hospital" in get(url)[2]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0 and said == ""
    finally:
        process.kill()
        process.wait()


# --- in a browser --------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_the_script_fills_the_page_in_a_browser(tmp_path, monkeypatch):
    """What the browser ends with was written after it had the page, so the script put it there."""
    from flexlora.reporting.watch import server

    folder = tmp_path / "my-run"
    folder.mkdir()
    write(folder, start(), *(asked(f"early-{i}") for i in range(3)))
    late = [upload(EVIL), lost("early-2", EVIL), finished_round(), evaluation()]
    late += [asked("late", 2, time.time())]
    whole = server.app

    def app(folder, hosts=None):
        made = whole(folder, hosts)

        @made.middleware("http")
        async def then(request, answer):
            response = await answer(request)
            if request.url.path == "/" and late:
                write(folder, *late)
                late.clear()
            return response

        return made

    monkeypatch.setattr(server, "app", app)
    with watch.start(folder) as page_of:
        done = subprocess.run(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000",
                "--no-proxy-server", "--dump-dom", page_of.url,
            ],
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    assert not late, "The browser never asked for the page."
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr
    text = done.stdout
    cells = Reader(text.replace("\n", " ")).cells
    assert {"late", "training for 0 s", "early-0"} <= {re.sub(r"\d+ s$", "0 s", c) for c in cells}
    assert '<p id="course">round 2 of 5: 0 of 3 uploads<' in text and "<title>round 2 of" in text
    assert re.search(r'<path class="points" data-line="0" d="M[\d.]+ [\d.]+h0"', text)
    assert re.search(r'<section id="loss">', text) and 'id="top">2.000<' in text
    assert "round aggregated: 2 uploads" in cells
    assert re.search(r'<progress[^>]* value="0\.2"', text) and "<dd>2.000</dd>" in text
    assert [tag for tag, _ in Reader(text).tags].count("script") == 1
    assert "&lt;script&gt;alert" in text and "<script>alert" not in text
    assert re.search(r'<p id="fault"[^>]*hidden', text)
