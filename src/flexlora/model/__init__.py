"""The base model in memory, with the layers that carry adapters."""

from flexlora.model.base import Base
from flexlora.model.blocks import kind
from flexlora.model.inputs import to_device
from flexlora.model.layers.attention import AttentionPass, Layer
from flexlora.model.peft_export import export
from flexlora.model.source import Source
from flexlora.model.trainable import FlatAdapter, Scale, leaf

__all__ = [
    "AttentionPass",
    "Base",
    "FlatAdapter",
    "Layer",
    "Scale",
    "Source",
    "export",
    "kind",
    "leaf",
    "to_device",
]
