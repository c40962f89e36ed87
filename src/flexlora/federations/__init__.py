"""Where clients may be, one kind of place per file."""
