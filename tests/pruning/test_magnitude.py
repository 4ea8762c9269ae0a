"""Scores without data, against norms by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import pruning
from regjax.models import ConvNet


def two_producers(params, x):
    """Units that are sums of two layers, with a scale, and a third layer behind."""
    hidden = x @ params["a"] + x @ params["b"] + params["bias"][None]
    hidden = jax.nn.relu(hidden * params["scale"][None])
    return hidden @ params["out"]


def plain_problem():
    random = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (3, 5), "bias": (5,), "scale": (5,), "out": (5, 2)}
    params = {k: jnp.asarray(random.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return params, pruning.find_structure(two_producers, params, jnp.ones((2, 3)))


def test_norms_of_a_group_with_two_producers():
    params, structure = plain_problem()
    ((name, _),) = structure.groups.items()
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    expected = np.sqrt((p["a"] ** 2).sum(0) + (p["b"] ** 2).sum(0))
    np.testing.assert_allclose(pruning.incoming_norm(structure, params)[name], expected, rtol=1e-5)
    expected = np.sqrt((p["out"] ** 2).sum(1))
    np.testing.assert_allclose(pruning.outgoing_norm(structure, params)[name], expected, rtol=1e-5)
    expected = np.abs(p["scale"])
    found = jax.jit(pruning.scale_magnitude)(structure, params)[name]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_norms_of_a_convolutional_network():
    network = ConvNet((4, 4, 1), 3, width=4, depth=2, normalization="batch", rngs=nnx.Rngs(0))
    model = regjax.from_nnx(network)
    x = jnp.zeros((2, 4, 4, 1))
    structure = pruning.find_structure(regjax.model_function(model), model.params, x)
    kernels = [model.params[f"layer_{i}"]["layer"]["kernel"] for i in range(2)]
    incoming = list(pruning.incoming_norm(structure, model.params).values())
    outgoing = list(pruning.outgoing_norm(structure, model.params).values())
    for kernel, found in zip(kernels, incoming, strict=True):
        np.testing.assert_allclose(found, np.sqrt((kernel**2).sum((0, 1, 2))), rtol=1e-5)
    np.testing.assert_allclose(outgoing[0], np.sqrt((kernels[1] ** 2).sum((0, 1, 3))), rtol=1e-5)
    # Behind the flattening of 1 x 1 positions each unit owns one row of the head.
    head = model.params["head"]["kernel"]
    np.testing.assert_allclose(outgoing[1], np.sqrt((head**2).sum(1)), rtol=1e-5)
    scales = pruning.scale_magnitude(structure, model.params)
    assert [scale.shape for scale in scales.values()] == [(4,), (4,)]
    np.testing.assert_array_equal(next(iter(scales.values())), 1)


def test_single_weights_and_chance():
    params = {"w": jnp.asarray([[1.0, -3.0], [0.5, 2.0]]), "b": jnp.asarray([-0.1, 4.0])}
    magnitudes = pruning.weight_magnitude(params)
    masks = pruning.mask_lowest(magnitudes, pruning.full_masks(params), 2)
    np.testing.assert_array_equal(masks["w"], [[True, True], [False, True]])
    np.testing.assert_array_equal(masks["b"], [False, True])
    one, same, other = (
        pruning.random_scores(params, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert one["w"].shape == (2, 2)
    np.testing.assert_array_equal(one["w"], same["w"])
    assert jnp.all(one["w"] != other["w"])
    assert jnp.unique(jnp.concatenate([one["w"].ravel(), one["b"]])).size == 6


def test_error_texts():
    unscaled = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
    params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
    structure = pruning.find_structure(unscaled, params, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"must have a scale in each group, got none in \['in'\]"):
        pruning.scale_magnitude(structure, params)
    with pytest.raises(TypeError, match=r"`params\['in'\]` must be real floating point"):
        pruning.incoming_norm(structure, {**params, "in": jnp.ones((3, 4), jnp.int32)})
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        pruning.random_scores(params, key=0)
