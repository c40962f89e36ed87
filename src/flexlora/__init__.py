"""Federated LoRA fine-tuning of language models across clients with different LoRA ranks.

The subsystems, in the order in which they build on each other. A folder imports only from those
above it; a test holds this.

    errors          the library's exception types
    seeds           random generators, each with an address
    storage         files: atomic writes, locks between processes, tensors read one by one
    lowrank         factor pairs, their weighted sums, truncated SVDs
    journal         what a run writes down, and how it is read
    data            rows -> tokens: corpora, partitions, prompts, packing
    peft_format     adapters as PEFT stores them: read, write, check, merge
    model           the base model in memory, and the layers that carry adapters
    training        local training: the optimiser and the loop
    evaluation      generated text and losses -> scores
    config          a TOML file -> frozen settings
    method          the method interface, and what its authors build on
    methods         the federated methods, one per file
    wire            downloads and uploads <-> bytes, checked
    federation      one run: clients, rounds, transports, checkpoints, comparisons
    deployment      real clients over Flower: server, nodes, keys
    reporting       a journal -> tables, pages, metrics
    cli             the command line

In every subsystem a file in the singular says what a thing is; a folder in the plural holds its
kinds, one per file. A package's ``__init__`` is the way in: it names what others may import.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexlora.lowrank import SVD, Adapter, Factors, LowRankSum
    from flexlora.method import Client, Download, Method, State, Upload
    from flexlora.peft_format import merge

__version__ = version("flexlora")

__all__ = [
    "SVD",
    "Adapter",
    "Client",
    "Download",
    "Factors",
    "LowRankSum",
    "Method",
    "State",
    "Upload",
    "merge",
]

_PLACES = {
    "lowrank": ("SVD", "Adapter", "Factors", "LowRankSum"),
    "method": ("Client", "Download", "Method", "State", "Upload"),
    "peft_format": ("merge",),
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for.

    Flower starts a process for every message, and PyTorch alone takes it seconds to import.
    """
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"flexlora.{module}"), name)
    raise AttributeError(f"module 'flexlora' has no attribute {name!r}")
