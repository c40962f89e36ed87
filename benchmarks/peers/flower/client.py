"""The ClientApp, written as in Flower's FlowerTune LLM example.

A call gets the global factors, puts them into the model, trains with a trainer of
transformers, and returns the factors. FlowerTune loads the base model in each call; with
``keep`` in the message's config the process keeps it instead. It is a separate module, so that
Ray's workers import it: if they received it by value with every call, they would lose the
model they keep.
"""

from __future__ import annotations

import functools
import tempfile

import recipe
import torch
import transformers
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

app = ClientApp()


@functools.cache
def resident(folder: str) -> PeftModel:
    """The model, loaded once in each process."""
    return recipe.adapted(recipe.read(folder))


def arguments(work: recipe.Work, folder: str) -> transformers.TrainingArguments:
    """A trainer with the recipe of all contestants: one batch is one step, in the given order."""
    facts = work.facts
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=facts["batch_examples"],
        num_train_epochs=1,
        learning_rate=facts["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=facts["clip_norm"],
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        fp16=False,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def fit(model: PeftModel, work: recipe.Work, features: list[recipe.Feature]) -> list[float]:
    """Train on the rows and return the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=arguments(work, folder),
            train_dataset=features,
            data_collator=recipe.collate,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@app.query()
def ready(message: Message, context: Context) -> Message:
    """Start the process before the measurement: the imports, and the model if it is kept."""
    how = message.content.config_records["config"]
    if how["keep"]:
        resident(str(how["work"]))
    return Message(content=RecordDict({"metrics": MetricRecord({"ready": 1})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's turn."""
    how = message.content.config_records["config"]
    torch.set_num_threads(int(str(how["threads"])))
    work = recipe.read(str(how["work"]))
    client = int(context.node_config["partition-id"])
    features = work.features(int(str(how["server-round"])) - 1, client)
    model = resident(str(how["work"])) if how["keep"] else recipe.adapted(work)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    losses, batch = fit(model, work, features), work.facts["batch_examples"]
    counts = [
        recipe.loss_tokens(features[start : start + batch])
        for start in range(0, len(features), batch)
    ]
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": len(features),
        "loss_total": sum(n * loss for n, loss in zip(counts, losses, strict=True)),
        "loss_tokens": sum(counts),
        "tokens": sum(len(feature["input_ids"]) for feature in features),
    }
    content = RecordDict()
    content["arrays"] = ArrayRecord(get_peft_model_state_dict(model))
    content["metrics"] = MetricRecord(metrics)
    return Message(content=content, reply_to=message)
