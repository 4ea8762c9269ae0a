"""Building a network."""

import jax
import numpy as np
import pytest

from regjax._nnx import from_nnx
from regjax.experiments import TrainSettings, _network
from tests.compilations import programs


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.optimized
def test_a_network_is_drawn_by_one_program_as_it_is_by_flax(model):
    settings = TrainSettings(model=model, width=13)
    with programs() as names:
        drawn = _network.build(settings, (8, 8, 1), 10)
    assert names.count("_drawn") == 1
    assert "_truncated_normal" not in names
    expected = from_nnx(_network._module(settings, (8, 8, 1), 10))
    found, wanted = ((one.params, one.state) for one in (drawn, expected))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
