import pytest

from flexlora.data import Columns
from flexlora.data.corpora import flower

from .test_hub import Rows


class Federated:
    """What is used of ``flwr_datasets.FederatedDataset``."""

    def load_partition(self, partition_id):
        return Rows(10 * partition_id, 3 + 2 * partition_id)


def test_a_partition_is_a_client():
    columns = Columns(category="who", split=None)
    corpus = flower.read(Federated(), 3, columns)
    assert corpus.keys("client").tolist() == ["0"] * 3 + ["1"] * 5 + ["2"] * 7
    assert corpus.example(4).output == "out 11"
    assert corpus.keys("category").tolist()[3:5] == ["0", "1"]


def test_faults_are_refused():
    with pytest.raises(ValueError, match="Cannot read 0 partitions"):
        flower.read(Federated(), 0, Columns())
    with pytest.raises(ValueError, match="federated dataset has no column 'kind'"):
        flower.read(Federated(), 2, Columns(category="kind"))
