"""One network in two forms: a list of layers, and the layers stacked in arrays."""

import jax
import jax.numpy as jnp
import numpy as np

import regjax

LAYERS, WIDTH, HEADS = 3, 4, 2


def layer(random):
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / 2, jnp.float32)
    return {
        "query": {"kernel": draw(WIDTH, HEADS, 2), "bias": draw(HEADS, 2)},
        "out": {"kernel": draw(HEADS, 2, WIDTH), "bias": draw(WIDTH)},
        "mlp": {"kernel": draw(WIDTH, WIDTH), "bias": draw(WIDTH)},
        "norm": {"scale": 1 + draw(WIDTH)},
    }


def unrolled(seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    # Layers of several sizes, as they are after training.
    sizes = [0.1 * 5.0**i for i in range(LAYERS)]
    blocks = [jax.tree.map(lambda leaf, size=size: size * leaf, layer(random)) for size in sizes]
    return {"blocks": blocks, "head": {"kernel": draw(WIDTH, 2), "bias": draw(2)}}


def stack(tree, axis=0):
    """The stacked form of a tree like `unrolled()`."""
    join = lambda *leaves: jnp.stack(leaves, axis)
    return {**tree, "blocks": jax.tree.map(join, *tree["blocks"])}


def unstack(tree, axis=0):
    """The list of layers again."""
    take = lambda i: jax.tree.map(lambda leaf: jnp.take(leaf, i, axis), tree["blocks"])
    return {**tree, "blocks": [take(i) for i in range(LAYERS)]}


def layout(axis=0):
    return {"blocks": regjax.Layout(stack=axis), "head": None}


def apply_layer(params, x):
    query = jnp.einsum("nd,dhk->nhk", x, params["query"]["kernel"]) + params["query"]["bias"][None]
    out = jnp.einsum("nhk,hkd->nd", jnp.tanh(query), params["out"]["kernel"])
    x = x + out + params["out"]["bias"][None]
    x = x / jnp.sqrt(jnp.mean(x**2, 1, keepdims=True) + 0.1) * params["norm"]["scale"][None]
    return x + jnp.tanh(x @ params["mlp"]["kernel"] + params["mlp"]["bias"][None])


def head(params, x):
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def unrolled_model(params, x):
    for block in params["blocks"]:
        x = apply_layer(block, x)
    return head(params, x)


def stacked_model(axis):
    def model(params, x):
        blocks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), params["blocks"])
        x, _ = jax.lax.scan(lambda x, block: (apply_layer(block, x), None), x, blocks)
        return head(params, x)

    return model


def loss_of(model):
    return lambda params, x, y: jnp.mean((model(params, x) - y) ** 2)


def batch(num_examples=6):
    random = np.random.default_rng(5)
    return tuple(
        jnp.asarray(random.normal(size=(num_examples, n)), jnp.float32) for n in (WIDTH, 2)
    )


def assert_same(one, other, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), one, other)
