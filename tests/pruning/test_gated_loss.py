"""The loss of the gates: at ones the loss itself, and an argument of `jax.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import pruning
from regjax.models import MLP


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def problem(mode="evaluation"):
    network = MLP((3, 1, 1), 2, width=4, normalization="batch", rngs=nnx.Rngs(0))
    model, x = regjax.from_nnx(network), jnp.arange(12.0).reshape(4, 3, 1, 1) / 6
    structure = pruning.find_structure(regjax.model_function(model), model.params, x)
    loss_fn = regjax.model_loss(model, squared_error, mode=mode)
    return structure, loss_fn, model.params, (x, jnp.ones((4, 2)))


def test_gates_of_one_change_nothing_and_other_parameters_compile_nothing():
    structure, loss_fn, params, batch = problem()
    gates = pruning.unit_gates(structure, params)
    evaluate = jax.jit(lambda gate_loss, gates, *batch: gate_loss(gates, *batch))
    found = evaluate(pruning.gated_loss(structure, loss_fn, params), gates, *batch)
    np.testing.assert_allclose(found, loss_fn(params, *batch), rtol=1e-6)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    found = evaluate(pruning.gated_loss(structure, loss_fn, doubled), gates, *batch)
    np.testing.assert_allclose(found, loss_fn(doubled, *batch), rtol=1e-6)
    assert evaluate._cache_size() == 1
    # All gates closed: what is left is the bias of the head.
    closed = jax.tree.map(jnp.zeros_like, gates)
    params = {**params, "head": {**params["head"], "bias": jnp.asarray([3.0, 0.0])}}
    alone = pruning.gated_loss(structure, loss_fn, params)(closed, *batch)
    np.testing.assert_allclose(alone, (4 + 1) / 2, rtol=1e-6)


def test_it_says_what_its_loss_says():
    for mode, couples, differs in (
        ("evaluation", False, False), ("train", True, False), ("train_per_chunk", False, True)
    ):  # fmt: skip
        structure, loss_fn, params, _ = problem(mode)
        gate_loss = pruning.gated_loss(structure, loss_fn, params)
        assert (gate_loss.couples_examples, gate_loss.differs_by_chunk) == (couples, differs)


def test_error_texts():
    structure, loss_fn, params, batch = problem()
    with pytest.raises(TypeError, match="must be real floating point"):
        pruning.gated_loss(structure, loss_fn, {"a": jnp.arange(2)})
    gate_loss = pruning.gated_loss(structure, loss_fn, params)
    with pytest.raises(ValueError, match="`gates` must"):
        gate_loss({"other": jnp.ones(4)}, *batch)
