import random

import numpy as np
import pytest
import torch


def seed_all(seed: int) -> None:
    """Seed the three global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def is_same(left, right) -> bool:
    """Say whether two batches are equal, bit for bit, and built alike."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_same, left, right))
    return left == right


def read_epochs(loader_class, dataset, num_epochs=2, **settings):
    """Seed, build a loader, and read all of its batches."""
    seed_all(7)
    loader = loader_class(dataset, **settings)
    return [batch for _ in range(num_epochs) for batch in loader]


@pytest.fixture(autouse=True)
def _few_cores_are_fine(recwarn):
    """torch warns of more workers than cores, which these tests have on small machines."""
    import warnings

    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
