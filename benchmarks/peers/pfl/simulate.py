"""Rounds of Apple's pfl: FederatedAveraging in its SimulatedBackend, on one resident model.

pfl trains the users of a cohort one after another by changing the model in place. Under
``torch.distributed.run`` the users are assigned to several processes, the longest first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import recipe
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import save_file
from torch import Tensor


class Client(torch.nn.Module):
    """The module that pfl needs, with a loss on a batch; it adds up totals for the comparison."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.totals = torch.zeros(3, dtype=torch.float64)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch over its response tokens."""
        loss: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels
        ).loss
        count = int((labels != recipe.IGNORED).sum())
        real = int(attention_mask.sum())
        self.totals += torch.tensor([float(loss.detach()) * count, count, real])
        return loss

    def metrics(self, *_: object, **__: object) -> dict[str, Any]:
        """No metrics, because nothing is evaluated."""
        return {}


class TrainingOnly(FederatedAveraging):  # type: ignore[misc]
    """FederatedAveraging without its evaluation of every user before and after the first round."""

    def get_next_central_contexts(self, *given: Any, **named: Any) -> Any:
        """The contexts of pfl, with the evaluation off."""
        contexts, model, metrics = super().get_next_central_contexts(*given, **named)
        if contexts is not None:
            contexts = tuple(replace(one, do_evaluation=False) for one in contexts)
        return contexts, model, metrics


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """The end of each round."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
        """Go on."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


def users(work: recipe.Work) -> FederatedDataset:
    """A user for each client of each round, in order, so that a cohort is a round."""
    ids = [(round, client) for round in range(work.rounds) for client in range(work.clients)]
    features = {id: work.features(*id) for id in ids}

    def dataset(id: tuple[int, int]) -> PyTorchDataDataset:
        return PyTorchDataDataset(features[id], user_id=str(id), collate_fn=recipe.collate)

    return FederatedDataset(
        dataset,
        get_user_sampler("minimize_reuse", ids),
        {id: sum(len(row["input_ids"]) for row in rows) for id, rows in features.items()},
    )


def local_optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW on the factors only."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def run(work: recipe.Work, module: Client) -> list[float]:
    """Train all rounds in place; returns the seconds of each."""
    facts, cohort = work.facts, users(work)
    trained = [p for p in module.parameters() if p.requires_grad]
    model = PyTorchModel(
        module,
        local_optimizer_create=local_optimizer,
        central_optimizer=torch.optim.SGD(trained, lr=1.0),
    )
    backend = SimulatedBackend(cohort, cohort, postprocessors=[WeightByDatapoints()])
    clock, started = Clock(), time.perf_counter()
    TrainingOnly().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_batch_size=facts["batch_examples"],
            local_num_epochs=1,
            local_learning_rate=facts["learning_rate"],
            local_max_grad_norm=facts["clip_norm"],
        ),
        callbacks=[clock],
    )
    return [end - start for start, end in itertools.pairwise([started, *clock.ends])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads // options.workers)
    work = recipe.read(options.work)
    model = recipe.adapted(work)
    set_peft_model_state_dict(model, work.start())
    module = Client(model)
    seconds = run(work, module)
    if options.workers > 1:
        torch.distributed.all_reduce(module.totals)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(get_peft_model_state_dict(model), options.out / "adapter.safetensors")
        names = ("loss_total", "loss_tokens", "tokens")
        recipe.finish(options.out, seconds, dict(zip(names, module.totals.tolist(), strict=True)))


if __name__ == "__main__":
    main()
