"""The example of a method of one's own does what its first lines say."""

from pathlib import Path

from support import models
from support.commands import python

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
CONFIG = """
seed = 3
[model]
name = "{model}"
[data]
path = "rows.csv"
prompt = "plain"
max_tokens = 32
clients = 3
columns = {{ category = "", split = "" }}
[ranks]
rank = 2
[method]
name = "fedit"
[federation]
rounds = 1
cohort = 2
[evaluation]
seen_clients = 0
unseen_clients = 0
base = false
truncated = false
[run]
threads = 1
clients_at_once = 1
"""


def test_it_obeys_the_laws(tmp_path):
    result = python("-m", "flexlora", "laws", EXAMPLE, "--option", "max_norm=0.5", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "Clipped FedIT: no law is broken." in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines())


def test_a_run_uses_it_and_can_be_resumed(tmp_path):
    models.save(tmp_path / "model")
    rows = [f"c{n % 3},the cat sees {n},a,one two" for n in range(12)]
    (tmp_path / "rows.csv").write_text("\n".join(["client,instruction,input,output", *rows]))
    (tmp_path / "config.toml").write_text(CONFIG.format(model=tmp_path / "model"))
    words = ["-m", "flexlora", "run", "config.toml", "--plugin", EXAMPLE, "--out", "run"]
    options = {"FLEXLORA_CACHE": str(tmp_path / "cache")}
    result = python(*words, cwd=tmp_path, **options)
    assert result.code == 0, result.err
    assert str(EXAMPLE) in (tmp_path / "run" / "config.json").read_text()
    again = python("-m", "flexlora", "run", "--resume", "run", cwd=tmp_path, **options)
    assert again.code == 0, again.err
