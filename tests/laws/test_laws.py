"""Every method against every law that means something for it."""

import pytest
import torch

from flexlora import methods
from flexlora.laws import LAWS, verdict

NAMES = methods.shipped()
APPLY = {
    "fixed point": len(NAMES) - 1,
    "exactness": len(NAMES) - 1,
    "rank bound": len(NAMES) - 2,
    "gauge": len(NAMES) - 12,
    "missed rounds": 4,
    "scale": len(NAMES) - 2,
    "parts": len(NAMES) - 2,
    "equal ranks": 15,
}
"""For how many methods each law means something; for the others, all of them."""


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_every_method_obeys(law, tmp_path_factory):
    torch.set_num_threads(1)
    verdicts = {
        name: verdict(methods.make(name), law, tmp_path_factory.mktemp(name)) for name in NAMES
    }
    broken = {name: v.reason for name, v in verdicts.items() if v.outcome == "broken"}
    assert not broken
    holding = [name for name, v in verdicts.items() if v.outcome == "holds"]
    assert len(holding) == APPLY.get(law.name, len(NAMES))


def test_exemptions_name_laws_and_reasons():
    names = {law.name for law in LAWS}
    assert len(names) == len(LAWS) and all(law.statement for law in LAWS)
    for name in NAMES:
        exempt = methods.make(name).info.exempt
        assert exempt.keys() <= names and all(len(reason) > 10 for reason in exempt.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name):
    method = methods.make(name)
    assert type(method).__name__.lower() == name
    assert method.info.paper.startswith("arXiv ") or name == "flexfold"
    assert method.info.title and method.info.up and method.info.down and method.info.server
    assert method.needs


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'flexlora'"):
        methods.make("FlexLoar")
    with pytest.raises(ValueError, match=r"no option 'splt'.*Did you mean 'split'"):
        methods.make("flexlora", {"splt": "left"})
