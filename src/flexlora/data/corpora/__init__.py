"""Where rows come from, one kind of source a file; each gives a ``Corpus``."""
