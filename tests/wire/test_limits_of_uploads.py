"""The limits of an upload, at the limit and one beyond it."""

import pytest
import torch

from flexlora.errors import ProtocolError
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.interface import Client, ModuleSpec, Upload, UploadSpec
from flexlora.wire import validate

CLIENT = Client("anna", {"model.q": 2}, "small", 17)
EXPECTED = UploadSpec({"model.q": ModuleSpec((11, 7), 1, 2)})


def check(examples: int, most_examples: int | None = None, norm: float = 1.0) -> None:
    """Validate an upload of so many examples, whose ``B`` has this norm."""
    B, A = torch.zeros(11, 2), torch.ones(2, 7)
    B[3, 1] = norm
    adapter = Adapter({"model.q": Factors(B, A)})
    sent = Upload("anna", 4, adapter, examples)
    validate.upload(sent, CLIENT, 4, EXPECTED, most_examples)


def test_a_client_counts_as_many_examples_as_it_has_or_as_it_may():
    check(17)
    check(23, most_examples=23)
    for examples, most in ((18, None), (24, 23), (17, 5)):
        with pytest.raises(ProtocolError, match=f"counts {examples} examples"):
            check(examples, most)


def test_a_factor_may_have_the_largest_norm():
    check(17, norm=validate.LARGEST_NORM)
    with pytest.raises(ProtocolError, match="above the limit"):
        check(17, norm=validate.LARGEST_NORM * (1 + 1e-6))
