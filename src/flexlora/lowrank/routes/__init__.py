"""Ways to a truncated SVD, one per file; ``decomposition`` chooses between them by cost."""
