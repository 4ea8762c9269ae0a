"""What whole runs of the command line share: a data set that is made, and optax's promotion."""

import jax
import pytest

from regjax.experiments import _spectrum_run
from tests.experiments.test_training import make_dataset


@pytest.fixture
def small_data(monkeypatch):
    """Whatever the name, the data set is the small one that is made."""
    monkeypatch.setattr(_spectrum_run, "load", lambda name, **options: make_dataset())


@pytest.fixture
def standard_promotion():
    """JAX's own promotion of types, for optax's transformations."""
    with jax.numpy_dtype_promotion("standard"):
        yield
