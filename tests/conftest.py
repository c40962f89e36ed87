import pytest
import torch

from ingredients import random_factors

torch.set_num_threads(1)


@pytest.fixture
def factors():
    return random_factors
