"""The rank that a client's means allow."""

import math

import pytest

from flexlora.config.ranks import RankType
from flexlora.deployment.node import capacity
from flexlora.deployment.node.capacity import Capacity
from flexlora.federation import setup
from flexlora.training.concurrency import bytes_to_train
from flexlora.training.loop import Trained
from support import models

LIMIT = RankType(40, 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The workplace of one client, with its 11 rows."""
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    ready = setup.prepare(models.settings(folder, ranks=ONE), models.corpus())
    here = ready.local
    rows = {"client3": here.rows["client3"]}
    return setup.ClientRuntime(**{**vars(here), "rows": rows})


ONE = {"types": None, "distribution": None, "rank": 4}


@pytest.fixture
def steps(monkeypatch):
    """Steps that cost a second for each ten of a rank, and are counted."""
    taken = []

    def step(here, rank):
        taken.append(rank)
        return Trained(
            adapter=None,
            examples=4,
            steps=1,
            tokens=500,
            computed=500,
            loss_total=1.0,
            loss_tokens=1,
            seconds=max(rank.attention, rank.feed_forward) / 10,
        )

    monkeypatch.setattr(capacity, "_step", step)
    return taken


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""
    return lambda count: monkeypatch.setattr(capacity, "free_bytes", lambda device: float(count))


def needed(place, attention, feed_forward):
    """What training at these ranks takes, by its definition."""
    numbers = 0
    for module, (out, in_) in place.base.shapes.items():
        numbers += (attention if "attn" in module else feed_forward) * (out + in_)
    return bytes_to_train(numbers, place.training)


@pytest.mark.parametrize(
    ("rank", "given"), [(1, (1, 1)), (24, (24, 24)), (30, (30, 24)), (99, (40, 24))]
)
def test_a_rank_that_is_given_is_taken_up_to_the_limit(place, steps, free, rank, given):
    free(0)  # the owner knows better
    found = Capacity(rank).propose(place, LIMIT)
    assert found.rank == RankType(*given) and found.tokens_per_second is None
    assert steps == []


def test_with_memory_enough_the_limit_is_taken_and_the_speed_measured(place, steps, free):
    free(1e12)
    found = Capacity().propose(place, LIMIT)
    assert found.rank == LIMIT and found.tokens_per_second == 500 / 4.0
    assert steps == [LIMIT]


@pytest.mark.parametrize(
    ("fits", "given"),
    [((40, 24), (40, 24)), ((20, 20), (20, 20)), ((10, 10), (10, 10)), ((1, 1), (1, 1))],
)
def test_less_memory_gives_a_smaller_rank(place, steps, free, fits, given):
    """Half of the free memory; each try is half of the last."""
    free(2 * needed(place, *fits))
    assert Capacity().propose(place, LIMIT).rank == RankType(*given)
    assert steps == [RankType(*given)]  # what does not fit is not tried out
    free(2 * needed(place, *fits) - 2)
    if given != (1, 1):
        assert Capacity().propose(place, LIMIT).rank.attention == given[0] // 2


def test_the_owners_memory_counts_where_it_is_less(place, steps, free):
    free(1e12)
    assert Capacity(memory_bytes=needed(place, 10, 10)).propose(place, LIMIT).rank == RankType(
        10, 10
    )
    free(2 * needed(place, 5, 5))
    assert Capacity(memory_bytes=needed(place, 10, 10)).propose(place, LIMIT).rank == RankType(5, 5)


@pytest.mark.parametrize(("seconds", "rank"), [(17.2, (40, 24)), (17.1, (20, 20)), (0.6, (1, 1))])
def test_less_time_gives_a_smaller_rank(place, steps, free, seconds, rank):
    """A turn of 11 rows has three steps of 4; one costs a second for each ten of the rank."""
    assert len(place.rows["client3"]) == 11 and place.training.batch_examples == 4
    free(1e12)
    assert Capacity(seconds=seconds).propose(place, LIMIT).rank == RankType(*rank)


@pytest.mark.parametrize(("epochs", "most", "turns"), [(2, None, 6), (2, 4, 4), (5, 1, 1)])
def test_a_turns_steps_are_the_terms(place, steps, free, epochs, most, turns):
    free(1e12)
    how = type(place.training)(**{**vars(place.training), "epochs": epochs, "max_steps": most})
    here = type(place)(**{**vars(place), "training": how})
    assert Capacity(seconds=turns * 5.72).propose(here, LIMIT).rank == LIMIT
    assert Capacity(seconds=turns * 5.7).propose(here, LIMIT).rank == RankType(20, 20)


@pytest.mark.parametrize(
    ("modules", "given"), [("attention", (30, 0)), ("feed_forward", (0, 24)), ("all", (30, 24))]
)
def test_a_client_may_train_some_modules_alone(place, steps, free, modules, given):
    assert Capacity(30, modules=modules).propose(place, LIMIT).rank == RankType(*given)


def test_modules_that_are_not_trained_need_no_memory(place, steps, free):
    free(2 * needed(place, 40, 0))
    assert Capacity(modules="attention").propose(place, LIMIT).rank == RankType(40, 0)
    assert Capacity().propose(place, LIMIT).rank.attention < 40


def test_a_client_that_the_server_leaves_nothing_to_train_is_told(place):
    with pytest.raises(ValueError, match="trains only attention, for which the server"):
        Capacity(3, modules="attention").propose(place, RankType(0, 24))


def test_modules_have_names():
    with pytest.raises(ValueError, match="not 'mlp'"):
        Capacity(3, modules="mlp")


def test_memory_and_time_count_both(place, steps, free):
    free(2 * needed(place, 20, 20))
    assert Capacity(seconds=4.4).propose(place, LIMIT).rank == RankType(10, 10)
    assert steps == [RankType(20, 20), RankType(10, 10)]


@pytest.mark.parametrize("limits", [{"memory_bytes": 1}, {"seconds": 1e-9}])
def test_where_not_even_rank_1_fits_it_is_said(place, steps, free, limits):
    free(1e12)
    with pytest.raises(ValueError, match=r"Even rank 1 is above .*raise --memory or --seconds"):
        Capacity(**limits).propose(place, LIMIT)


def test_a_machine_that_does_not_say_its_memory_has_no_limit_of_it(place, steps, free):
    free(math.inf)
    assert Capacity().propose(place, LIMIT).rank == LIMIT


@pytest.mark.parametrize("name", ["rank", "memory_bytes", "seconds"])
@pytest.mark.parametrize("value", [0, -1])
def test_nothing_is_no_limit(name, value):
    with pytest.raises(ValueError, match=rf"A client's {name} is {value}; give a number above 0"):
        Capacity(**{name: value})


@pytest.mark.parametrize("name", ["memory_bytes", "seconds"])
def test_a_limit_is_a_number(name):
    with pytest.raises(ValueError, match="give a number"):
        Capacity(**{name: math.nan})


def test_a_step_is_measured_on_the_clients_own_rows_and_leaves_nothing(place):
    """The real one: the base model is afterwards as it was."""
    before = {name: value.clone() for name, value in place.base.model.state_dict().items()}
    found = Capacity(seconds=600.0).propose(place, RankType(3, 2))
    assert found.rank == RankType(3, 2) and found.tokens_per_second > 0
    after = place.base.model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    assert all(layer.adapters == () for layer in place.base._layers.values())
