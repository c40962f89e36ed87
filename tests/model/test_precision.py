"""The precision that a machine chooses for itself."""

import dataclasses

import pytest
import torch

from flexlora.deployment.server import server_run
from flexlora.errors import ProtocolError
from flexlora.federation import rounds, setup
from flexlora.federation.prepared import PreparedRun
from flexlora.model import Source, precision
from support import models


@pytest.fixture(autouse=True)
def measured_anew():
    precision.fastest.cache_clear()
    yield
    precision.fastest.cache_clear()


def machine(monkeypatch, native: bool, single: float = 1.0, half: float = 1.0) -> None:
    """A machine whose products take so many seconds."""
    monkeypatch.setattr(precision, "_native", lambda kind: native)
    seconds = {torch.float32: single, torch.bfloat16: half}
    monkeypatch.setattr(precision, "_seconds", lambda kind, dtype: seconds[dtype])


@pytest.mark.parametrize(
    ("native", "half", "dtype"),
    [
        (True, 0.14, "bfloat16"),
        (True, 0.7, "bfloat16"),
        (True, 0.9, "float32"),
        (True, 2.0, "float32"),
        (False, 0.14, "float32"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_native_and_faster(monkeypatch, native, half, dtype):
    machine(monkeypatch, native, 1.0, half)
    chosen, (notice,) = Source("model", dtype="auto").chosen()
    assert chosen == Source("model", dtype=dtype)
    assert notice.startswith(f'model.dtype is "auto": {dtype}, as ')


def test_a_precision_that_is_named_stays(monkeypatch):
    machine(monkeypatch, True, 1.0, 0.1)
    for dtype in ("float32", "bfloat16", "float16"):
        source = Source("model", dtype=dtype)
        assert source.chosen() == (source, ())


def test_real_clients_are_told_a_precision(tmp_path):
    """Each machine would choose its own."""
    settings = models.settings(tmp_path, model={"dtype": "auto"})
    with pytest.raises(ProtocolError, match=r"set model\.dtype to .float32., or"):
        server_run.check(settings)


def test_it_is_measured_on_this_machine():
    chosen = precision.fastest("cpu")
    able = torch.cpu.get_capabilities()
    native = able.get("amx_bf16") or able.get("avx512_bf16") or able.get("bf16")
    assert chosen.dtype == "float32" if not native else chosen.dtype in ("float32", "bfloat16")
    assert chosen is precision.fastest("cpu")


@pytest.mark.parametrize(("half", "dtype"), [(0.1, torch.bfloat16), (2.0, torch.float32)])
def test_a_run_has_the_precision_in_its_config_and_says_so(monkeypatch, tmp_path, half, dtype):
    machine(monkeypatch, True, 1.0, half)
    models.save(tmp_path / "model")
    model = {"dtype": "auto"}
    none = {"seen_clients": 0, "unseen_clients": 0, "base": False, "truncated": False}
    settings = models.settings(tmp_path, model=model, evaluation=none, federation={"rounds": 1})

    def prepared(base=None) -> PreparedRun:
        return setup.prepare(settings, models.corpus(), base=base)

    ready = prepared()
    name = str(dtype).removeprefix("torch.")
    assert ready.base.model.dtype == dtype and ready.experiment.model.dtype == name
    start, *others = rounds.run(ready, tmp_path / "run")
    assert start["config"]["model"]["dtype"] == name
    assert any(name in notice and "auto" in notice for notice in start["notices"])
    uploaded = [e for e in others if e["event"] == "finish"]
    assert len(uploaded) == 1
    # Of a model that is loaded it is what it was loaded in, whatever the machine is now.
    precision.fastest.cache_clear()
    machine(monkeypatch, True, 1.0, 0.1 if half > 1 else 2.0)
    again = prepared(ready.base)
    assert again.experiment.model == dataclasses.replace(settings.model, dtype=name)


def test_factors_and_optimizer_stay_in_float32(tmp_path):
    """Whatever the weights are: what travels and what is aggregated is float32."""
    models.save(tmp_path / "model")
    half = models.settings(tmp_path, model={"dtype": "bfloat16"}, federation={"rounds": 1})
    ready = setup.prepare(half, models.corpus())
    for module, factors in ready.fresh().items():
        assert factors.B.dtype == factors.A.dtype == torch.float32, module
    *_, finish = rounds.run(ready, tmp_path / "run")
    assert finish["event"] == "finish"
