import pytest
import torch

from support.factors import random_factors

torch.set_num_threads(1)


@pytest.fixture
def factors():
    return random_factors
