"""The finished adapter on a client's disk: checked, the server's to the bit, or truncated."""

import json

import pytest
import torch

from flexlora import peft_format, wire
from flexlora.deployment.node import finished
from flexlora.errors import AdapterError, ProtocolError
from flexlora.lowrank import Adapter, Factors
from flexlora.peft_format import CONFIG, WEIGHTS
from flexlora.storage import sha256
from support import models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.save(folder / "model")
    return models.settings(folder).model.load()


@pytest.fixture
def adapter(base) -> Adapter:
    """Factors of rank 7 in attention and of rank 5 elsewhere."""
    draw = torch.Generator().manual_seed(4)
    made = {}
    for module, (rows, columns) in base.shapes.items():
        rank = 7 if "self_attn" in module else 5
        made[module] = Factors(
            torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
        )
    return Adapter(made)


def sent(folder, adapter: Adapter, kind: str = "adapter"):
    """A file as the server sends it."""
    file = folder / "sent"
    file.write_bytes(wire.encode(adapter, {"kind": kind}, torch.float32))
    return file


@pytest.fixture
def served(base, adapter, tmp_path):
    """The server's own directory, and its digest."""
    peft_format.write(adapter, tmp_path / "served", base_model="org/served")
    return tmp_path / "served", sha256(tmp_path / "served" / WEIGHTS)


def test_it_is_the_servers_file_to_the_bit_with_a_config_of_the_clients_own(
    base, adapter, served, tmp_path
):
    folder, digest = served
    out = tmp_path / "deep" / "adapter"
    assert finished.write(sent(tmp_path, adapter), base, out, digest) == digest
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    config = json.loads((out / CONFIG).read_text())
    assert config["base_model_name_or_path"] == base.published
    # As a simulation writes it: PEFT's classes find it, and its modules are named once.
    assert config["task_type"] == "CAUSAL_LM"
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in adapter}
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]


def test_an_earlier_adapter_is_replaced_and_nothing_else(base, adapter, served, tmp_path):
    out, (_, digest) = tmp_path / "out", served
    peft_format.write({next(iter(adapter)): adapter[next(iter(adapter))]}, out)
    finished.write(sent(tmp_path, adapter), base, out, digest)
    assert sha256(out / WEIGHTS) == digest
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(AdapterError, match=r"thesis\.tex"):
        finished.write(sent(tmp_path, adapter), base, out, digest)
    assert (out / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("digest", ["ab" * 32, None, 7, ["x"]])
def test_another_digest_is_refused_and_nothing_is_written(base, adapter, tmp_path, digest):
    with pytest.raises(ProtocolError, match="The adapter that arrived has the SHA-256"):
        finished.write(sent(tmp_path, adapter), base, tmp_path / "out", digest)
    assert [path.name for path in tmp_path.iterdir()] == ["sent"]


def test_truncated_it_is_the_best_approximation_of_each_rank(base, adapter, served, tmp_path):
    ranks = {module: 3 for module in adapter if "self_attn" in module}
    out, (_, digest) = tmp_path / "out", served
    assert finished.write(sent(tmp_path, adapter), base, out, digest, ranks) == digest
    written = peft_format.read(out).adapter
    assert set(written) == set(ranks)
    for module in ranks:
        product = adapter[module].B.double() @ adapter[module].A.double()
        U, S, Vt = torch.linalg.svd(product, full_matrices=False)
        best = (U[:, :3] * S[:3]) @ Vt[:3]
        got = written[module].B.double() @ written[module].A.double()
        assert torch.linalg.matrix_norm(got - best) < 1e-5 * torch.linalg.matrix_norm(best)


def changed(adapter: Adapter, module: str, factors: Factors) -> Adapter:
    return Adapter({**adapter, module: factors})


def test_what_does_not_fit_the_base_model_is_refused(base, adapter, tmp_path):
    module = next(iter(adapter))
    B, A = adapter[module].B, adapter[module].A
    wrong = {
        "a module 'model.evil'": changed(adapter, "model.evil", Factors(B, A)),
        "of shape": changed(adapter, module, Factors(B[:-1].contiguous(), A)),
        "NaN or infinity": changed(adapter, module, Factors(B / 0, A)),
    }
    for words, each in wrong.items():
        with pytest.raises(ProtocolError, match=words):
            finished.write(sent(tmp_path, each), base, tmp_path / "out", "x")
    with pytest.raises(ProtocolError, match="sent 'download', not an adapter"):
        finished.write(sent(tmp_path, adapter, "download"), base, tmp_path / "out", "x")


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"PK\x03\x04" + b"0" * 99, b"\xff" * 99])
def test_other_bytes_are_refused_before_anything_is_made_of_them(base, tmp_path, data):
    (tmp_path / "sent").write_bytes(data)
    with pytest.raises(ProtocolError):
        finished.write(tmp_path / "sent", base, tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["sent"]


def test_the_line_that_loads_it_is_python():
    line = finished.loading("org/it's", "C:\\adapters\\mine")
    compile(line, "-", "eval")
