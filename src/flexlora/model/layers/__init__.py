"""Layers that replace those of a base model: the same results with fewer passes over memory."""
