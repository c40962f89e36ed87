"""Federated LoRA fine-tuning of language models across clients with different LoRA ranks.

The subsystems, in the order in which they build on each other. A subsystem imports only from those
above it, which a test checks.

    errors          the library's exception types
    seeds           random generators, each with an address
    storage         files: atomic writes, checksums, locks, tensors; untrusted text made safe
    addresses       HOST:PORT, loopback, listening sockets
    lowrank         factor pairs, their weighted sums, truncated SVDs
    journal         what a run writes down, and how it is read
    data            rows -> tokens: corpora, partitions, prompts, packing
    peft_format     adapters as PEFT stores them: read, write, check, merge
    model           the base model in memory, and the layers that carry adapters
    training        local training: the optimiser and the loop; jobs without a federation
    evaluation      generated text and losses -> scores
    config          a TOML file -> frozen settings
    method          the method interface, and what its authors build on
    methods         the federated methods, one per file
    wire            downloads and uploads <-> bytes, checked
    federation      one run: clients, rounds, transports, checkpoints, comparisons
    laws            what every method must obey, and what checks a method against it
    deployment      real clients over Flower: server, nodes, keys
    reporting       a journal -> tables, pages, metrics
    cli             the command line

In every subsystem a file in the singular defines an interface, and the folder in the plural has its
implementations, one per file. The ``__init__`` of a subsystem names what other subsystems may
import; ``docs/api.md`` lists what users import from ``flexlora`` itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexlora.data import Columns as Columns
    from flexlora.data import Corpus as Corpus
    from flexlora.errors import AdapterError as AdapterError
    from flexlora.errors import ConfigError as ConfigError
    from flexlora.errors import DataError as DataError
    from flexlora.errors import FlexloraError as FlexloraError
    from flexlora.errors import ProtocolError as ProtocolError
    from flexlora.federation.compose import load as load
    from flexlora.federation.prepared import PreparedRun as PreparedRun
    from flexlora.federation.rounds import run as run
    from flexlora.federation.setup import prepare as prepare
    from flexlora.lowrank import SVD as SVD
    from flexlora.lowrank import Adapter as Adapter
    from flexlora.lowrank import Factors as Factors
    from flexlora.lowrank import LowRankSum as LowRankSum
    from flexlora.method import Averager as Averager
    from flexlora.method import Client as Client
    from flexlora.method import Cohort as Cohort
    from flexlora.method import Download as Download
    from flexlora.method import Feature as Feature
    from flexlora.method import Info as Info
    from flexlora.method import Mean as Mean
    from flexlora.method import Method as Method
    from flexlora.method import Regularizer as Regularizer
    from flexlora.method import RoundContext as RoundContext
    from flexlora.method import ServerOptimizer as ServerOptimizer
    from flexlora.method import State as State
    from flexlora.method import Turn as Turn
    from flexlora.method import Upload as Upload
    from flexlora.model import Source as Source
    from flexlora.peft_format import check as check
    from flexlora.peft_format import merge as merge
    from flexlora.training import Training as Training
    from flexlora.training.adapters import train_adapters as train_adapters
    from flexlora.training.finished import JobResult as JobResult
    from flexlora.training.job import Job as Job

    __version__: str

_PUBLIC = {
    # To run federations.
    "load": "federation.compose",
    "prepare": "federation.setup",
    "PreparedRun": "federation.prepared",
    "run": "federation.rounds",
    "Corpus": "data",
    # To train adapters without a federation.
    "train_adapters": "training.adapters",
    "Job": "training.job",
    "JobResult": "training.finished",
    "Training": "training",
    "Columns": "data",
    "Source": "model",
    # On adapters in PEFT's format.
    "merge": "peft_format",
    "check": "peft_format",
    # The values.
    "Adapter": "lowrank",
    "Factors": "lowrank",
    "LowRankSum": "lowrank",
    "SVD": "lowrank",
    # To write a method.
    "Method": "method",
    "Info": "method",
    "Feature": "method",
    "Mean": "method",
    "Cohort": "method",
    "RoundContext": "method",
    "State": "method",
    "Client": "method",
    "Download": "method",
    "Turn": "method",
    "Upload": "method",
    # Other plug-ins.
    "Averager": "method",
    "Regularizer": "method",
    "ServerOptimizer": "method",
    # The exceptions.
    "FlexloraError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "AdapterError": "errors",
    "ProtocolError": "errors",
}
"""The public names and where each is defined. A new one needs a line here, and the same import
above, for type checkers; a test holds the two together, and ``docs/api.md`` follows this order."""

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """A public name, imported on first use: PyTorch takes seconds to import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("flexlora")
    if name in _PUBLIC:
        return getattr(import_module(f"flexlora.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'flexlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for Tab completion."""
    return [*_PUBLIC, "__all__", "__doc__", "__version__"]
