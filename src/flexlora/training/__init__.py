"""Local training: the optimiser and the loop."""
