"""The largest rank of each real client, by the section ``ranks`` of a config."""

import pytest

from flexlora.config.experiment import Ranks
from flexlora.config.ranks import RankType
from flexlora.deployment.server.limits import RankLimits

TYPES = {"wide": {"attention": 3, "feed_forward": 7}, "small": {"attention": 2, "feed_forward": 2}}


def limit(**section) -> RankLimits:
    return RankLimits.of(Ranks.model_validate(section))


def test_ranks_rank_is_the_most_for_all():
    found = limit(rank=6)
    assert found.for_client("anybody") == RankType(6, 6) and found.largest() == RankType(6, 6)


def test_ranks_clients_names_who_is_let_in():
    found = limit(types=TYPES, clients={"ash": "wide", "birch": "small"})
    assert found.for_client("ash") == RankType(3, 7) and found.for_client("birch") == RankType(2, 2)
    assert found.largest() == RankType(3, 7)
    with pytest.raises(ValueError, match=r"'elm' is not in ranks\.clients"):
        found.for_client("elm")


def test_the_largest_limit_is_so_in_both_kinds_of_layers():
    types = {"a": {"attention": 9, "feed_forward": 2}, "b": {"attention": 3, "feed_forward": 7}}
    assert limit(types=types, clients={"x": "a", "y": "b"}).largest() == RankType(9, 7)


def test_a_table_of_its_own_is_read(tmp_path):
    table = tmp_path / "ranks.toml"
    table.write_text(
        '[types]\nwide = { attention = 3, feed_forward = 7 }\n[clients]\nash = "wide"\n'
    )
    assert limit(table=str(table)).for_client("ash") == RankType(3, 7)


@pytest.mark.parametrize("share", ["uniform", {"wide": 1.0}])
def test_ranks_dealt_by_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"a fixed set of simulated clients.*ranks\.rank"):
        limit(types=TYPES, distribution=share)


def test_a_type_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"names the types \['huge'\]; there are \['wide', 'sm"):
        limit(types=TYPES, clients={"ash": "huge"})


def test_the_papers_types_may_be_named_as_in_a_simulation():
    assert limit(clients={"ash": "type3"}).for_client("ash") == RankType(30, 200)
