"""What a model is measured by, one file each: what it writes, and what it expects."""
