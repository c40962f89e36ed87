"""Fixtures for all tests: the tiny model, and random factors.

What takes seconds to import is imported by the fixtures that need it.
"""

import os
from pathlib import Path

import pytest
import torch

from support.factors import random_factors

torch.set_num_threads(1)


@pytest.fixture
def factors():
    return random_factors


@pytest.fixture
def unsynced(monkeypatch) -> None:
    """Files are not waited for: a test of many runs of which none meets a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """The tiny model as it is stored."""
    from support import models

    return models.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(model_folder):
    """The tiny model in memory, for the tests of one file."""
    from flexlora.model.source import Source

    return Source(str(model_folder)).load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder for the tests of one file, with the tiny model in ``model``."""
    from support import models

    folder = tmp_path_factory.mktemp("federation")
    models.save(folder / "model")
    return folder
