"""Small networks for pruning: plain, residual and concatenating, in nnx and linen, and as trees."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import regjax

IMAGES = np.random.default_rng(7).normal(size=(8, 6, 6, 2)).astype(np.float32)
UNITS = {
    "plain": {"first/kernel": 6, "second/kernel": 5, "dense/kernel": 7},
    "residual": {"stem/kernel": 4, "a/kernel": 5, "b/kernel": 6, "c/kernel": 3},
    "joined": {"left/kernel": 4, "right/kernel": 5, "mix/kernel": 3},
}


class Nnx(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind = kind
        conv = lambda inputs, outputs, **options: nnx.Conv(
            inputs, outputs, (3, 3), rngs=rngs, **options
        )
        norm = lambda channels: nnx.BatchNorm(channels, momentum=0.8, rngs=rngs)
        if kind == "plain":
            self.first, self.norm, self.second = conv(2, 6), norm(6), conv(6, 5)
            self.dense, self.head = nnx.Linear(45, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
        elif kind == "residual":
            self.stem, self.norm = conv(2, 4, use_bias=False), norm(4)
            self.a, self.a_norm, self.a_out = conv(4, 5), norm(5), conv(5, 4)
            self.b, self.shortcut = conv(4, 6), conv(4, 6, use_bias=False)
            self.c, self.c_out = conv(6, 3), conv(3, 6)
            self.head = nnx.Linear(6, 3, rngs=rngs)
        else:
            self.left, self.right, self.norm = conv(2, 4), conv(2, 5), norm(11)
            self.mix, self.head = conv(11, 3), nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return FORWARD[self.kind](lambda name: getattr(self, name), x)


class Linen(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x, train=False):
        shapes = {
            "plain": {"first": 6, "second": 5},
            "residual": {"stem": 4, "a": 5, "a_out": 4, "b": 6, "shortcut": 6, "c": 3, "c_out": 6},
            "joined": {"left": 4, "right": 5, "mix": 3},
        }[self.kind]

        def layer(name):
            if "norm" in name:
                return linen.BatchNorm(use_running_average=not train, momentum=0.8, name=name)
            if name in shapes:
                use_bias = name not in ("stem", "shortcut")
                return linen.Conv(shapes[name], (3, 3), use_bias=use_bias, name=name)
            return linen.Dense(7 if name == "dense" else 3, name=name)

        return FORWARD[self.kind](layer, x)


def _plain(layer, x):
    x = nnx.relu(layer("norm")(layer("first")(x)))
    x = nnx.avg_pool(jnp.tanh(layer("second")(x)), (2, 2), (2, 2))
    x = nnx.sigmoid(layer("dense")(x.reshape(x.shape[0], -1)))  # 1/2 at 0: the unit must be cut off
    return layer("head")(x)


def _residual(layer, x):
    x = nnx.relu(layer("norm")(layer("stem")(x)))
    x = nnx.relu(x + layer("a_out")(nnx.relu(layer("a_norm")(layer("a")(x)))))
    x = nnx.relu(layer("b")(x)) + layer("shortcut")(x)
    x = nnx.silu(x + layer("c_out")(nnx.gelu(layer("c")(x))))
    return layer("head")(jnp.mean(x, (1, 2)))


def _joined(layer, x):
    branches = [nnx.relu(layer("left")(x)), layer("right")(x), x]
    x = nnx.leaky_relu(layer("norm")(jnp.concatenate(branches, -1)))
    x = nnx.max_pool(nnx.relu(layer("mix")(x)), (2, 2), (2, 2))
    return layer("head")(jnp.max(x, (1, 2)))


FORWARD = {"plain": _plain, "residual": _residual, "joined": _joined}


def randomized(model, seed=0):
    """The (abstract) model with random arrays, so that no bias is 0, no scale 1 and no mean 0."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        spread = 1 / np.sqrt(max(1, leaf.size // leaf.shape[-1])) if leaf.ndim > 1 else 0.4
        values = random.normal(size=leaf.shape) * spread + (1.0 if leaf.ndim == 1 else 0.0)
        return jnp.asarray(np.abs(values) + 0.1 if leaf.ndim == 1 else values, leaf.dtype)

    return model._replace(
        params=jax.tree.map(draw, model.params), state=jax.tree.map(draw, model.state)
    )


@functools.cache
def nnx_model(kind):
    return randomized(regjax.from_nnx(nnx.eval_shape(lambda: Nnx(kind, nnx.Rngs(0)))))


@functools.cache
def linen_model(kind):
    module = Linen(kind)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    return randomized(regjax.from_linen(module, variables))


def packaged_model(kind, norm, **sizes):
    """A network of the library, its arrays abstract."""
    return regjax.from_nnx(
        nnx.eval_shape(lambda: kind((6, 6, 2), 3, normalization=norm, rngs=nnx.Rngs(0), **sizes))
    )


def tree_params(*sizes, seed=0, dtype=np.float32):
    """Kernels and biases of a perceptron, [{"w": ..., "b": ...}, ...]."""
    random = np.random.default_rng(seed)
    return [
        {
            "w": jnp.asarray(random.normal(size=(i, o)) / np.sqrt(i), dtype),
            "b": jnp.asarray(random.normal(size=o), dtype),
        }
        for i, o in itertools.pairwise(sizes)
    ]


def perceptron(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


MAKERS = {"nnx": nnx_model, "linen": linen_model}
