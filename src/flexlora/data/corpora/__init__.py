"""Readers of rows, one source format per file; each returns a ``Corpus``."""
