"""Who is let in, under which name and at which rank."""

import json

import pytest

from flexlora.config.experiment import Ranks
from flexlora.config.ranks import RankType
from flexlora.deployment.server import run_files
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.registry import (
    FILE,
    MOST_EXAMPLES,
    ClientInfo,
    ClientRegistry,
)
from flexlora.deployment.server.run_files import NODES

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
LABELS = {
    "examples": "number of examples",
    "attention": "attention rank",
    "feed_forward": "feed-forward rank",
}
NODE = 2**63 + 11
"""Flower's numbers go up to 2 ** 64."""


def said(client="clinic", **changes):
    """What a well-behaved node says of itself."""
    usual = {"examples": 13, "attention": 5, "feed_forward": 5, "device": "cpu"}
    return {"client": client, **usual, "tokens_per_second": 170.5, "kept": False, **changes}


def roll(folder, limit=None, **options) -> ClientRegistry:
    limit = RankLimits(RankType(8, 8), {}) if limit is None else limit
    return ClientRegistry(folder, limit, MODULES, **{"bound": False, **options})


def limit(**section) -> RankLimits:
    return RankLimits.of(Ranks.model_validate(section))


TYPES = {"wide": {"attention": 3, "feed_forward": 7}, "small": {"attention": 2, "feed_forward": 2}}


def test_a_client_is_written_down_with_what_it_says(tmp_path):
    clients = roll(tmp_path)
    name, entry = clients.admit(said(), NODE)
    assert name == "clinic" and entry == ClientInfo(NODE, 5, 5, 13, "cpu", 170.5)
    assert list(clients) == ["clinic"] and len(clients) == 1
    found = clients["clinic"]
    assert (found.id, found.rank_type, found.examples) == ("clinic", "r5", 13)
    assert found.ranks == dict.fromkeys(MODULES, 5)


def test_clients_are_in_the_order_of_their_names_whenever_they_came(tmp_path):
    clients = roll(tmp_path)
    for number, name in enumerate(["cedar", "ash", "birch"]):
        clients.admit(said(name), number + 2)
    assert list(clients) == ["ash", "birch", "cedar"]


@pytest.mark.parametrize(
    ("own", "most", "given", "kind"),
    [
        ((5, 5), (8, 8), (5, 5), "r5"),
        ((9, 9), (8, 8), (8, 8), "r8"),
        ((9, 2), (3, 7), (3, 2), "r3-2"),
        ((MOST_EXAMPLES, MOST_EXAMPLES), (3, 7), (3, 7), "r3-7"),
        ((1, 1), (8, 8), (1, 1), "r1"),
    ],
)
def test_a_rank_is_within_both_limits(tmp_path, own, most, given, kind):
    clients = roll(tmp_path, RankLimits(RankType(*most), {}))
    _, entry = clients.admit(said(attention=own[0], feed_forward=own[1]), NODE)
    assert (entry.attention, entry.feed_forward) == given and entry.rank_type == kind
    assert list(clients["clinic"].ranks.values()) == list(given)


@pytest.mark.parametrize(
    ("own", "most", "kind"),
    [
        ((5, 0), (8, 8), "r5-0"),
        ((5, 5), (0, 4), "r0-4"),
    ],
)
def test_a_client_may_train_some_modules_alone(tmp_path, own, most, kind):
    clients = roll(tmp_path, RankLimits(RankType(*most), {}))
    _, entry = clients.admit(said(attention=own[0], feed_forward=own[1]), NODE)
    assert entry.rank_type == kind
    rank, place = max((entry.attention, 0), (entry.feed_forward, 1))
    assert clients["clinic"].ranks == {MODULES[place]: rank}


def test_a_client_that_its_limit_leaves_nothing_is_refused(tmp_path):
    clients = roll(tmp_path, RankLimits(RankType(0, 4), {}))
    with pytest.raises(
        ValueError, match=r"'clinic' would train nothing: its own limits and the server's .*"
    ):
        clients.admit(said(feed_forward=0), NODE)
    assert len(clients) == 0


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (MODULES[:1], "none of the adapted modules is of that type"),
        ([*MODULES, "model.layers.0.mixer.w"], "is neither in an attention nor"),
    ],
)
def test_a_client_without_a_module_is_refused_before_it_is_written_down(tmp_path, modules, message):
    clients = ClientRegistry(tmp_path, RankLimits(RankType(8, 8), {}), modules, bound=False)
    with pytest.raises(ValueError, match=message):
        clients.admit(said(attention=0), NODE)
    assert len(clients) == 0 and not (tmp_path / FILE).exists()


def test_where_all_must_train_all_modules_fewer_are_refused(tmp_path):
    clients = roll(tmp_path, all_modules=True)
    with pytest.raises(
        ValueError, match=r"with attention 5, feed_forward 0, .* join with --modules all"
    ):
        clients.admit(said(feed_forward=0), NODE)
    clients.admit(said(), NODE)
    # What the server trains with nobody is nothing to miss.
    some = roll(tmp_path / "some", RankLimits(RankType(8, 0), {}), all_modules=True)
    (tmp_path / "some").mkdir()
    assert some.admit(said(), NODE)[1].rank_type == "r5-0"


def test_alike_are_those_of_one_rank_in_what_they_train(tmp_path):
    clients = roll(tmp_path, one_rank=True)
    assert clients.admit(said(attention=8, feed_forward=0), NODE)[1].rank_type == "r8-0"
    with pytest.raises(ValueError, match="requires one rank"):
        clients.admit(said(attention=5, feed_forward=0), NODE)


def test_kinds_and_counts_are_of_those_who_are_there(tmp_path):
    clients = roll(tmp_path, RankLimits(RankType(9, 9), {}))
    for name, (attention, feed_forward) in {
        "ash": (5, 5),
        "birch": (2, 7),
        "cedar": (5, 5),
        "elm": (2, 2),
    }.items():
        clients.admit(said(name, attention=attention, feed_forward=feed_forward), 3)
    assert list(clients.kinds) == ["r2", "r2-7", "r5"]
    assert clients.counts == {"r2": 1, "r2-7": 1, "r5": 2}
    assert clients.kinds["r2-7"] == dict(zip(MODULES, (2, 7), strict=True))
    clients.admit(said("cedar", attention=2, feed_forward=2), 3)
    assert clients.counts == {"r2": 2, "r2-7": 1, "r5": 1}


@pytest.mark.parametrize(
    "name",
    [
        *(None, 7, True, "", "x" * 101, ["clinic"], {"clinic": 1}, 1.5, "x" * 10**6),
        *("\n\x1b[2J", "clinic\n", " clinic", "clinic\u202e", "\ud800", "a\0b", "\u3164", 10**400),
        "e" + "\u0301" * 9,
    ],
)
def test_what_is_no_name_is_refused(tmp_path, name):
    clients = roll(tmp_path)
    with pytest.raises(
        ValueError, match=r"Invalid client name .{0,60}; a name has 1 to 100 characters"
    ) as error:
        clients.admit(said(name), NODE)
    assert len(str(error.value)) < 200
    assert len(clients) == 0 and not (tmp_path / FILE).exists()


def test_any_printable_text_is_a_name(tmp_path):
    clients = roll(tmp_path)
    names = ["../../etc/passwd", "a/b", "Klinik Süd", "東京", "x" * 100, "<b>"]
    for number, name in enumerate(names):
        clients.admit(said(name), number)
    assert sorted(names) == list(roll(tmp_path))


@pytest.mark.parametrize("field", ["examples", "attention", "feed_forward"])
@pytest.mark.parametrize(
    "value",
    [-1, True, False, None, 2.0, "3", [3], MOST_EXAMPLES + 1, 10**400, float("nan")],
)
def test_what_is_no_count_is_refused(tmp_path, field, value):
    clients = roll(tmp_path)
    with pytest.raises(
        ValueError, match=rf"Client 'clinic' sent an invalid {LABELS[field]}: '"
    ) as error:
        clients.admit(said(**{field: value}), NODE)
    assert len(str(error.value)) < 200
    assert len(clients) == 0 and not (tmp_path / FILE).exists()


@pytest.mark.parametrize("field", ["examples", "attention", "feed_forward"])
def test_what_is_left_out_is_refused(tmp_path, field):
    held = said()
    del held[field]
    with pytest.raises(ValueError, match=rf"sent an invalid {LABELS[field]}: 'None'"):
        roll(tmp_path).admit(held, NODE)


def test_device_and_speed_are_for_people_alone(tmp_path):
    clients = roll(tmp_path)
    _, entry = clients.admit(said(device="d" * 999, tokens_per_second="fast"), NODE)
    assert entry.device == "d" * 37 + "..." and entry.tokens_per_second is None
    for device in ([[]] * 3_000_000, "a\n\x1b[2J\ud800", 10**5000, {"a": float("nan")}):
        _, entry = clients.admit(said(device=device, tokens_per_second=True), NODE)
        assert len(entry.device) <= 40 and entry.device.isprintable()
        assert entry.tokens_per_second is None
    for speed in (float("inf"), float("nan"), 10**400, -1, [1], 1e13):
        assert clients.admit(said(tokens_per_second=speed), NODE)[1].tokens_per_second is None
    _, entry = clients.admit(said(device=None, tokens_per_second=3), NODE)
    assert entry.device == "None" and entry.tokens_per_second == 3.0


@pytest.mark.parametrize("speed", [10**400, float("nan"), float("inf"), -1e308 * 10])
def test_a_speed_that_is_no_number_neither_stops_the_server_nor_enters_the_journal(tmp_path, speed):
    """JSON as Python reads it has NaN, Infinity and whole numbers of any length."""
    try:
        clients = roll(tmp_path)
        _, entry = clients.admit(said(tokens_per_second=speed), NODE)
    except ValueError:
        return  # refused: as well
    json.dumps(entry.tokens_per_second, allow_nan=False)


def test_a_client_that_comes_again_is_written_down_anew(tmp_path):
    clients = roll(tmp_path)
    clients.admit(said(), NODE)
    clients.admit(said(attention=2, feed_forward=2, examples=17), NODE + 1)
    assert len(clients) == 1
    assert clients.entries["clinic"] == ClientInfo(NODE + 1, 2, 2, 17, "cpu", 170.5)


def test_the_roll_outlives_the_server(tmp_path):
    clients = roll(tmp_path)
    for number, name in enumerate(["cedar", "ash"]):
        clients.admit(said(name, attention=number + 2), NODE + number)
    again = roll(tmp_path)
    assert again.entries == clients.entries and list(again) == ["ash", "cedar"]
    assert again["ash"] == clients["ash"] and again.kinds == clients.kinds
    again.admit(said("birch"), 5)
    assert list(roll(tmp_path)) == ["ash", "birch", "cedar"]


def test_a_crash_while_the_roll_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    clients = roll(tmp_path)
    clients.admit(said("ash"), 2)

    def broken(path, target):
        raise OSError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", broken)
        with pytest.raises(OSError, match="power"):
            clients.admit(said("birch"), 3)
    assert list(roll(tmp_path)) == ["ash"]


# Names that belong to keys


def known(folder, **nodes):
    run_files.write_numbers(folder, NODES, nodes)


def test_a_bound_name_belongs_to_the_node_whose_key_was_let_in_under_it(tmp_path):
    known(tmp_path, clinic=NODE, hospital=NODE + 1)
    clients = roll(tmp_path, bound=True)
    clients.admit(said("clinic"), NODE)
    with pytest.raises(
        ValueError, match="gives the name 'clinic', but its key is registered under an"
    ):
        clients.admit(said("clinic", examples=999), NODE + 1)
    with pytest.raises(ValueError, match="gives the name 'hospital'"):
        clients.admit(said("hospital"), NODE)
    with pytest.raises(ValueError, match="gives the name 'practice'"):
        clients.admit(said("practice"), NODE + 1)
    assert list(clients) == ["clinic"] and clients["clinic"].examples == 13


def test_without_a_list_of_keys_nobody_is_bound_to_a_name(tmp_path):
    with pytest.raises(ValueError, match="is registered under another name"):
        roll(tmp_path, bound=True).admit(said(), NODE)


def test_keys_that_come_while_the_run_goes_on_count(tmp_path):
    clients = roll(tmp_path, bound=True)
    known(tmp_path, clinic=NODE)
    clients.admit(said(), NODE)
    known(tmp_path, clinic=NODE, hospital=7)
    clients.admit(said("hospital"), 7)
    assert list(clients) == ["clinic", "hospital"]


def test_roll_is_bound_unless_it_is_said(tmp_path):
    with pytest.raises(ValueError, match="another name"):
        ClientRegistry(tmp_path, RankLimits(RankType(8, 8), {}), MODULES).admit(said(), NODE)


# Methods of one rank


def test_where_one_rank_is_needed_it_is_the_server_s(tmp_path):
    """Its state has that rank from the start, and other ranks do not fit."""
    clients = roll(tmp_path, one_rank=True)
    with pytest.raises(
        ValueError, match=r"'ash' would train with rank 3, .* the server's .*--rank 8"
    ):
        clients.admit(said("ash", attention=3, feed_forward=3), 2)
    clients.admit(said("ash", attention=9, feed_forward=8), 2)
    assert clients.counts == {"r8": 1}


def test_a_client_that_is_not_named_is_not_let_in(tmp_path):
    clients = roll(tmp_path, limit(types=TYPES, clients={"ash": "wide"}))
    clients.admit(said("ash"), 2)
    with pytest.raises(ValueError, match=r"no ranks\.rank for clients that are not listed"):
        clients.admit(said("elm"), 3)
    assert list(clients) == ["ash"]
