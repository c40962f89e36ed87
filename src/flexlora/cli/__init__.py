"""The command line: thin calls into the library, one file per group of commands.

A command imports what it needs when it runs, so that ``flexlora --help`` answers at once: PyTorch
and transformers take seconds to import.
"""
