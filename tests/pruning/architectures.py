"""Forward passes with their parameters and inputs: (forward or module, parameters, inputs)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import regjax
from regjax import models

RANDOM = np.random.default_rng(11)


def draw(*shape):
    spread = np.sqrt(max(1, np.prod(shape[:-1])))
    return jnp.asarray(RANDOM.normal(size=shape) / spread, jnp.float32)


IMAGES, ROWS, SERIES = draw(2, 6, 6, 3), draw(3, 4), draw(2, 4, 5)
TOKENS = jnp.asarray(RANDOM.integers(0, 7, (3, 5)))


def convolve(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def pooled(p, x):
    return jnp.mean(x, (1, 2)) @ p["o"]


def in_groups(groups):
    return lambda p, x: pooled(
        p, convolve(nnx.relu(convolve(convolve(x, p["a"]), p["d"], groups)), p["b"])
    )


def gated(p, x):
    value, gate = jnp.split(x @ p["a"] + p["v"], 2, axis=1)
    return (value * nnx.sigmoid(gate)) @ p["o"]


def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), v)


def fused(p, x):
    q, k, v = jnp.moveaxis((x @ p["a"]).reshape(*x.shape[:2], 3, 3, -1), 2, 0)
    return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]


def grouped_queries(p, x):
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], -1, 3) for n in "qkv")
    return attend(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)).reshape(2, 4, 12) @ p["o"]


def rotated(p, x):
    cos, sin = (f(jnp.arange(4.0))[None, :, None, None] for f in (jnp.cos, jnp.sin))

    def turn(h):
        one, other = h[..., :2], h[..., 2:]
        return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], -1)

    q, k, v = ((x @ p[n]).reshape(2, 4, 2, 4) for n in "qkv")
    return attend(turn(q), turn(k), v).reshape(2, 4, 8) @ p["o"]


def layer_norm(h, scale, bias):
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * scale + bias


def gpt2(p, tokens):
    """Fused projections, heads by number, a norm in front, the embedding tied to the outputs."""
    h = p["tokens"][tokens] + p["positions"][: tokens.shape[1]]
    for layer in p["layers"]:
        heads = layer_norm(h, layer["s1"], layer["b1"]) @ layer["qkv"] + layer["c"]
        q, k, v = (part.reshape(*tokens.shape, 2, 4) for part in jnp.split(heads, 3, -1))
        h = h + attend(q, k, v).reshape(*tokens.shape, 8) @ layer["out"]
        h = h + nnx.gelu(layer_norm(h, layer["s2"], layer["b2"]) @ layer["up"]) @ layer["down"]
    return layer_norm(h, p["s"], p["b"]) @ p["tokens"].T


def gpt2_layer():
    shapes = {"s1": (8,), "b1": (8,), "qkv": (8, 24), "c": (24,), "out": (8, 8), "s2": (8,),
              "b2": (8,), "up": (8, 12), "down": (12, 8)}  # fmt: skip
    return {name: draw(*shape) for name, shape in shapes.items()}


def squeezed(p, x):
    h = nnx.relu(convolve(x, p["a"]))
    shares = nnx.sigmoid(nnx.relu(h.mean((1, 2)) @ p["s1"]) @ p["s2"])
    return pooled(p, convolve(h * shares[:, None, None], p["b"]))


def dense(p, x):
    for name in "ab":
        x = jnp.concatenate([x, nnx.relu(convolve(x, p[name]))], -1)
    return pooled(p, x)


def layers_scanned(p, x):
    step = lambda h, w: (h + jnp.tanh(h @ w["u"]) @ w["d"], None)
    return jax.lax.scan(step, x @ p["i"], p["s"])[0] @ p["o"]


def recurrent(p, x):
    def step(h, now):
        h = nnx.relu(now @ p["i"] + h @ p["r"])
        return h, h

    start = jnp.zeros((x.shape[0], 6))
    return jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0))[1].mean(0) @ p["o"]


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x)


straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < 1),))


@jax.custom_jvp
def leaky(x, slope):
    return jnp.where(x > 0, x, slope * x)


# A derivative that is not that of the function.
leaky.defjvp(lambda at, by: (leaky(*at), jnp.where(at[0] > 0, 2.0, 0.5) * by[0]))


def tree(forward, inputs, **shapes):
    make = lambda: regjax.from_callable(
        forward,
        jax.tree.map(lambda s: draw(*s), shapes, is_leaf=lambda s: isinstance(s, tuple)),
    )
    return make, inputs


class Transformer(nnx.Module):
    """A vision transformer with a class token."""

    def __init__(self, norm=True, **options):
        rngs = nnx.Rngs(0)
        linear = lambda inputs, outputs: nnx.Linear(inputs, outputs, rngs=rngs)
        self.patches = nnx.Conv(3, 8, (2, 2), strides=(2, 2), rngs=rngs)
        self.token, self.positions = nnx.Param(draw(1, 1, 8)), nnx.Param(draw(1, 10, 8))
        self.norm = nnx.LayerNorm(8, rngs=rngs) if norm else nnx.identity
        self.attention = nnx.MultiHeadAttention(4, 8, 16, rngs=rngs, decode=False, **options)
        self.up, self.down, self.head = linear(8, 12), linear(12, 8), linear(8, 3)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        h = self.patches(x).reshape(x.shape[0], 9, 8)
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, 8))
        h = jnp.concatenate([token, h], 1) + self.positions[...]
        h = h + self.attention(self.norm(h))
        h = h + self.down(self.dropout(nnx.gelu(self.up(self.norm(h)))))
        return self.head(h[:, 0])


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.Dense(8)(x)
        h = h + linen.MultiHeadDotProductAttention(4, qkv_features=16)(linen.LayerNorm()(h))
        return linen.Dense(3)(h + linen.Dense(8)(linen.gelu(linen.Dense(12)(h))))


class Block(linen.Module):
    @linen.compact
    def __call__(self, h, _):
        return h + linen.Dense(5)(linen.relu(linen.Dense(7)(h))), None


class LinenScan(linen.Module):
    @linen.compact
    def __call__(self, x):
        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return linen.Dense(2)(linen.scan(linen.remat(Block), **split)()(linen.Dense(5)(x), None)[0])


class MobileNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.relu(linen.Conv(8, (1, 1))(x))
        h = linen.relu(linen.Conv(8, (3, 3), feature_group_count=8)(h))
        return linen.Dense(3)(linen.Conv(4, (1, 1))(h).mean((1, 2)))


def linen_model(module, inputs):
    return (lambda: regjax.from_linen(module, module.init(jax.random.key(0), inputs))), inputs


def nnx_model(make, inputs):
    return (lambda: regjax.from_nnx(make())), inputs


def chain(*layers):
    """Layers in a row: (inputs, outputs) is a linear one, a function of rngs makes another."""

    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(*(
            nnx.Linear(*layer, rngs=rngs) if isinstance(layer, tuple) else
            layer(rngs) if getattr(layer, "__name__", "") == "<lambda>" else layer
            for layer in layers
        ))  # fmt: skip

    return make


MIDDLE = lambda rngs: lambda x: x.mean((1, 2))
"""Name: ((make, inputs), units of each group)."""
UNITS = {
    "nnx attention": (nnx_model(Transformer, IMAGES), [4, 4, 12]),
    "nnx attention without norm": (
        nnx_model(lambda: Transformer(norm=False), IMAGES), [8, 4, 4, 12]
    ),
    "nnx attention, fewer keys": (nnx_model(lambda: Transformer(num_kv_heads=2), IMAGES),
                                  [2, 4, 12]),
    "linen attention": (linen_model(LinenTransformer(), SERIES), [4, 4, 12]),
    "GPT": (
        nnx_model(lambda: models.GPT(
            7, context=5, width=8, depth=2, num_heads=2, rngs=nnx.Rngs(0)
        ), TOKENS),
        [2, 32, 2, 32],
    ),
    "GPT-2": (
        ((lambda: regjax.from_callable(gpt2, {
            "tokens": draw(7, 8), "positions": draw(9, 8), "s": draw(8), "b": draw(8),
            "layers": [gpt2_layer(), gpt2_layer()],
        })), TOKENS),
        [2, 12, 2, 12],
    ),
    "fused attention": (tree(fused, SERIES, a=(5, 18), o=(6, 2)), [3]),
    "grouped queries": (
        tree(grouped_queries, SERIES, q=(5, 12), k=(5, 6), v=(5, 6), o=(12, 2)), [2]
    ),
    "rotary positions": (tree(rotated, SERIES, q=(5, 8), k=(5, 8), v=(5, 8), o=(8, 2)), [2]),
    "gated unit": (tree(gated, ROWS, a=(4, 12), v=(12,), o=(6, 2)), [6]),
    "depthwise": (
        tree(in_groups(6), IMAGES, a=(1, 1, 3, 6), d=(3, 3, 1, 12), b=(1, 1, 12, 4), o=(4, 2)),
        [6, 4],
    ),
    "grouped": (
        tree(in_groups(3), IMAGES, a=(1, 1, 3, 6), d=(3, 3, 2, 9), b=(1, 1, 9, 4), o=(4, 2)),
        [3, 4],
    ),
    "mobile net": (linen_model(MobileNet(), IMAGES), [8, 4]),
    "group norm": (
        nnx_model(chain(
            lambda rngs: nnx.Conv(3, 8, (3, 3), rngs=rngs),
            lambda rngs: nnx.GroupNorm(8, num_groups=4, rngs=rngs),
            lambda rngs: nnx.Conv(8, 5, (1, 1), rngs=rngs), MIDDLE, (5, 2),
        ), IMAGES),
        [4, 5],
    ),
    "layer norm": (
        nnx_model(chain((4, 8), lambda rngs: nnx.LayerNorm(8, rngs=rngs), (8, 5), nnx.relu, (5, 2)),
                  ROWS),
        [5],
    ),
    "embedding": (
        nnx_model(chain(lambda rngs: nnx.Embed(7, 5, rngs=rngs), lambda rngs: lambda x: x.mean(1),
                        (5, 6), nnx.relu, (6, 2)), TOKENS),
        [5, 6],
    ),
    "squeezed": (
        tree(squeezed, IMAGES, a=(3, 3, 3, 6), s1=(6, 3), s2=(3, 6), b=(3, 3, 6, 4), o=(4, 2)),
        [6, 3, 4],
    ),
    "dense": (tree(dense, IMAGES, a=(3, 3, 3, 4), b=(3, 3, 7, 4), o=(11, 2)), [4, 4]),
    "scanned layers": (
        tree(layers_scanned, ROWS, i=(4, 5), s={"u": (3, 5, 6), "d": (3, 6, 5)}, o=(5, 2)), [5, 6]
    ),
    "linen scan": (linen_model(LinenScan(), ROWS), [5, 7]),
    "recurrent": (tree(recurrent, SERIES, i=(5, 6), r=(6, 6), o=(6, 2)), [6]),
    "LSTM": (
        nnx_model(chain(
            lambda rngs: nnx.RNN(nnx.LSTMCell(5, 6, rngs=rngs)), lambda rngs: lambda x: x[:, -1],
            (6, 2),
        ), SERIES),
        [6],
    ),
    "strided": (
        tree(lambda p, x: ((h := x @ p["a"])[:, ::2] * h[:, 1::2]) @ p["o"], ROWS,
             a=(4, 6), o=(3, 2)),
        [3],
    ),
    "maxout": (
        tree(lambda p, x: jnp.max((x @ p["a"]).reshape(3, 3, 2), 2) @ p["o"], ROWS,
             a=(4, 6), o=(3, 2)),
        [3],
    ),
    "transposed convolution": (
        nnx_model(chain(
            lambda rngs: nnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.relu,
            lambda rngs: nnx.ConvTranspose(6, 5, (3, 3), strides=(2, 2), rngs=rngs), nnx.relu,
            MIDDLE, (5, 2),
        ), IMAGES),
        [6, 5],
    ),
    "its own derivative": (
        tree(lambda p, x: leaky(straight_through(x @ p["a"]) @ p["b"], jnp.float32(0.3)) @ p["o"],
             ROWS, a=(4, 6), b=(6, 5), o=(5, 2)),
        [6, 5],
    ),
    "rematerialized": (
        tree(lambda p, x: jax.checkpoint(lambda h: nnx.relu(h) @ p["b"])(x @ p["a"]) @ p["o"],
             ROWS, a=(4, 6), b=(6, 5), o=(5, 2)),
        [6, 5],
    ),
    "nothing": (
        tree(lambda p, x: jax.lax.top_k(x @ p["a"], 3)[0] @ p["o"], ROWS, a=(4, 6), o=(3, 2)), []
    ),
}  # fmt: skip
