"""A corpus from data partitioned by Flower, for example with ``flwr_datasets``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa

from flexlora.data.columns import Columns
from flexlora.data.corpora.objects import exported
from flexlora.data.corpora.table import of_table
from flexlora.data.corpus import Corpus
from flexlora.errors import DataError


class Federated(Protocol):
    """The part of ``flwr_datasets.FederatedDataset`` that ``read`` uses."""

    def load_partition(self, partition_id: int) -> Any:
        """The ``datasets.Dataset`` of one partition."""
        ...


def read(federated: Federated, partitions: int, columns: Columns) -> Corpus:
    """The corpus in which partition i is the client named ``str(i)``, for i below ``partitions``.

    The partitions define the clients, so ``columns.client`` is not read.

    Raises:
        DataError: there are no partitions, a column is missing in one, or a value is null
            or ill-typed.
    """
    if partitions < 1:
        raise DataError(f"Cannot read {partitions} partitions; give at least 1.")
    tables = []
    for number in range(partitions):
        table = exported(federated.load_partition(number))
        client = pa.repeat(str(number), table.num_rows)
        tables.append(table.append_column("_client", client))
    whole = pa.concat_tables(tables, promote_options="permissive")
    return of_table(whole, replace(columns, client="_client"), "The federated dataset")
