"""The layers that a base model gets in place of its own: the same numbers, fewer passes."""
