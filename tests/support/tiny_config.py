"""A federation of the tiny model as people have it: a config file, a model folder, a table."""

from pathlib import Path

import pyarrow.parquet as pq

from support import models

CONFIG = """
seed = 3

[model]
name = "model"

[data]
path = "rows.parquet"
prompt = "plain"
max_tokens = 32
cache = "tokens"

[ranks]
types.small = { attention = 2, feed_forward = 2 }
types.large = { attention = 3, feed_forward = 3 }
distribution = { small = 0.5, large = 0.5 }

[training]
learning_rate = 0.02
batch_examples = 4
pack_tokens = 24

[federation]
rounds = 2
cohort = 3

[evaluation]
max_new_tokens = 3
max_prompt_tokens = 16
seen_clients = 2
unseen_clients = 0
rows_per_client = 1
truncated = false

[run]
threads = 1
clients_at_once = 1
"""


def write(folder: Path) -> Path:
    """Write the model, the rows and the config into ``folder``; the config's path."""
    models.save(folder / "model")
    pq.write_table(models.corpus().table, folder / "rows.parquet")
    path = folder / "tiny.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path
