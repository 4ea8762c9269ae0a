"""What the tests of several adapters ask of their networks."""

import jax
import jax.numpy as jnp
import numpy as np

import regjax
from regjax import pruning
from tests import oracles


def without_a_unit(model, inputs, name=""):
    """The model without a unit of the first group with `name` in its own, checked against gates."""
    function = regjax.model_function(model)
    structure = pruning.find_structure(function, model.params, inputs)
    group = next(group for group in structure.groups if name in group)
    gates = pruning.full_masks(pruning.unit_gates(structure, model.params))
    masks = {**gates, group: gates[group].at[1].set(False)}
    small = pruning.remove_units(structure, model, masks)
    gated = pruning.apply_gates(
        structure, model.params, jax.tree.map(lambda mask: mask.astype(jnp.float32), masks)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        regjax.model_function(small)(small.params, inputs),
        function(gated, inputs),
    )
    return small


def unrolled_loss(dense):
    """The loss of three residual layers whose arrays are stacked, one after the other."""

    def loss(params, inputs, targets):
        x = inputs
        for i in range(3):
            layer = jax.tree.map(lambda leaf: leaf[i], params["layers"])  # noqa: B023
            mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            h = (x - mean) / jnp.sqrt(variance + 1e-6)
            h = h * layer["norm"]["scale"][None] + layer["norm"]["bias"][None]
            x = x + jnp.tanh(h @ layer[dense]["kernel"] + layer[dense]["bias"][None])
        outputs = x @ params["head"]["kernel"] + params["head"]["bias"][None]
        return oracles.cross_entropy(outputs, targets)

    return loss
