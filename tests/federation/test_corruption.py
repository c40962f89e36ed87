"""Any damage to any file of a stopped run is repaired, named, or without effect on the result."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from flexlora.errors import FlexloraError
from flexlora.federation import compose, rounds, setup
from flexlora.journal import Record
from flexlora.peft_format import WEIGHTS
from flexlora.reporting import page
from support import corruption, models, sizes

METHODS = (
    "flexlora",
    pytest.param("flora", marks=pytest.mark.slow),
    pytest.param("fedsalora", marks=pytest.mark.slow),
)
"""With a state alone, with updates that are merged for good, with parts that stay on clients."""

REFUSED = ("config.json", "private/")
"""What has no second copy: such a run may be refused, with the name of the file."""


class Stopped:
    """A finished run, and the same run stopped in its third round with two of four uploads."""

    def __init__(self, folder: Path, method: str) -> None:
        models.save(folder / "model")
        settings = models.settings(
            folder,
            method={"name": method},
            ranks={"rank": 3, "types": None, "distribution": None},
            evaluation={"base": False, "seen_clients": 0, "unseen_clients": 0, "truncated": False},
            run={"threads": 1, "clients_at_once": 1},
            training={"max_steps": 1},
        )
        self.ready = setup.prepare(settings, models.corpus())
        self.whole, self.half = folder / "whole", folder / "half"
        for _ in rounds.run(self.ready, self.whole):
            pass
        events = rounds.run(self.ready, self.half)
        for _ in events:
            uploads = [e["round"] for e in Record(self.half).events("client")]
            if uploads.count(3) == 2:
                break
        events.close()
        compose.store(settings, self.half)
        assert len(list(self.half.glob("uploads-00003/*.safetensors"))) >= 2

    def files(self) -> list[Path]:
        paths = (path.relative_to(self.half) for path in self.half.rglob("*") if path.is_file())
        return sorted(path for path in paths if not path.name.endswith((".lock", ".holder")))

    def outcome(self, target: Path, drawn: bool) -> str:
        """How the run ends: with the right adapter, with another one, or refused.

        Its page is ``drawn`` too, which takes longer than the run itself.
        """
        try:
            assert compose.stored(target) == self.ready.experiment
            for _ in rounds.run(self.ready, target, resume=True):
                pass
            if drawn:
                page.write(target)
        except FlexloraError as error:
            assert str(target) in str(error), error
            return "refused"
        return "same" if self.adapter(target) == self.adapter(self.whole) else "other"

    def adapter(self, folder: Path) -> bytes:
        return (folder / "rounds" / "00003" / "adapter" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module", params=METHODS)
def stopped(request, tmp_path_factory) -> Stopped:
    torch.set_num_threads(1)
    return Stopped(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.slow
@sizes.trials(8, 334)
def test_any_damage_is_repaired_named_or_harmless(stopped, tmp_path, unsynced, trials):
    seen = Counter(outcome(stopped, tmp_path / str(trial), trial) for trial in range(trials))
    print(dict(seen))
    assert seen["same"] > trials // 2


def outcome(stopped: Stopped, target: Path, trial: int) -> str:
    """How the run ends after the damage of this number: "same", or "refused" with good reason."""
    draw, files = random.Random(trial), stopped.files()
    shutil.copytree(stopped.half, target)
    file, how = draw.choice(files), draw.choice(corruption.KINDS)
    others = [target / other for other in files if other != file]
    other = how(target / file, others, draw)
    damaged = [file.as_posix(), *([other.relative_to(target).as_posix()] if other else [])]
    what = f"{trial}: {how.__name__} {damaged}"
    end = stopped.outcome(target, drawn=trial % 4 == 0)
    if end == "refused":
        # Two files at once may belong to both checkpoints.
        assert other or file.as_posix().startswith(REFUSED), what
    else:
        assert end == "same", what
    shutil.rmtree(target)
    return end
