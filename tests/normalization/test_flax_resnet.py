"""Our layers in the residual network of flax's ImageNet example, where its own stand.

The form is that of the example: `norm` is a partial of the layer with `use_running_average`,
momentum, epsilon, dtype and the name of the mapped axis; the last norm of a block starts at zero;
the network is initialised with one example, in training, outside of the mapped axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from regjax import normalization

pytestmark = pytest.mark.usefixtures("default_promotion")
RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(1, 2, size=(4, 2, 6, 6, 3)), jnp.float32)  # 4 devices
LABELS = jnp.asarray(RANDOM.integers(3, size=(4, 2)))
GROUPS = {"num_groups": 2, "batch_axes": None, "track_running": True}
LAYERS = {
    "BatchNorm": {"epsilon": 1e-5},
    "GhostBatchNorm": {"epsilon": 1e-5, "ghost_size": 2},
    "NoisyBatchNorm": {"epsilon": 1e-5},
    "MeanOnlyBatchNorm": {"use_scale": True},
    "LpNorm": {"epsilon": 1e-5},
    "GroupNormPlus": GROUPS,
    "BatchNormGroupNorm": GROUPS,
    "ParallelGroupBatchNorm": GROUPS,
}


class Block(linen.Module):
    conv: object
    norm: object

    @linen.compact
    def __call__(self, x):
        y = linen.relu(self.norm()(self.conv(6, (3, 3))(x)))
        y = self.norm(scale_init=linen.initializers.zeros_init())(self.conv(6, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(self.conv(6, (1, 1), name="conv_proj")(x))
        return linen.relu(x + y)


class ResNet(linen.Module):
    layer: object
    remat: bool = False

    @linen.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(linen.Conv, use_bias=False, dtype=jnp.float32)
        norm = functools.partial(
            self.layer,
            use_running_average=not train,
            momentum=0.9,
            dtype=jnp.float32,
            axis_name="batch",
        )
        x = linen.relu(norm(name="bn_init")(conv(4, (3, 3), name="conv_init")(x)))
        x = (linen.remat(Block) if self.remat else Block)(conv, norm, name="block")(x)
        return linen.Dense(3)(x.mean((1, 2)))


def trained(module, num_steps=2):
    """(variables, losses, outputs in evaluation) after steps on a mapped axis of four devices."""
    one = {"params": jax.random.key(0)}
    variables = jax.jit(module.init)(one, jnp.ones((1, 6, 6, 3)))

    def step(variables, x, y):
        def loss_fn(params):
            logits, new = module.apply(
                {**variables, "params": params},
                x,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        params = jax.tree.map(
            lambda p, g: p - 0.1 * g, variables["params"], jax.lax.pmean(grads, "batch")
        )
        return {"params": params, **new}, jax.lax.pmean(loss, "batch")

    spread = jax.jit(jax.vmap(step, axis_name="batch", in_axes=(None, 0, 0), out_axes=(0, None)))
    losses = []
    for _ in range(num_steps):
        replicas, loss = spread(variables, IMAGES, LABELS)
        jax.tree.map(lambda a: np.testing.assert_allclose(a - a[:1], 0, atol=1e-5), replicas)
        variables = jax.tree.map(lambda a: a[0], replicas)
        losses.append(loss)
    outputs = module.apply(variables, IMAGES[0], train=False)
    return variables, jnp.stack(losses), outputs


def test_batch_norm_trains_as_flax_does():
    biased = {"unbiased_running_variance": False}
    ours = functools.partial(normalization.linen.BatchNorm, epsilon=1e-5, **biased)
    expected = trained(ResNet(functools.partial(linen.BatchNorm, epsilon=1e-5)))
    for remat in (False, True):
        found = trained(ResNet(ours, remat=remat))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected
        )


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "BatchNorm"])
def test_every_layer_stands_where_flax_s_batch_norm_stands(name):
    layer = functools.partial(getattr(normalization.linen, name), **LAYERS[name])
    variables, losses, outputs = trained(ResNet(layer), num_steps=1)
    assert jnp.all(jnp.isfinite(losses))
    assert jnp.all(jnp.isfinite(outputs))
    kept = jax.tree.leaves(variables["batch_stats"])
    assert kept
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in kept)
    # As in the example the residual branch is the bias of its last norm at the start.
    start = ResNet(layer).init({"params": jax.random.key(0)}, jnp.ones((1, 6, 6, 3)))
    last = [v["scale"] for v in start["params"]["block"].values() if "scale" in v]
    assert sum(bool(jnp.all(scale == 0)) for scale in last) == 1


NORM = {"momentum": 0.8, "epsilon": 1e-5}
BIASED = {**NORM, "unbiased_running_variance": False}
X = jnp.asarray(RANDOM.normal(1, 2, size=(8, 5)), jnp.float32)


def scanned(kind, options):
    """Outputs, statistics and slopes of three layers by linen's `scan`, each rematerialised."""

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.tanh(kind(False, **options)(linen.Dense(5)(x))), None

    stack = linen.scan(
        linen.remat(Layer),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    variables = stack.init(jax.random.key(0), X, None)

    def loss(params):
        (y, _), new = stack.apply({**variables, "params": params}, X, None, mutable=["batch_stats"])
        return jnp.sum(y**3), new

    renamed = lambda tree: jax.tree.leaves(tree)  # the names hold the class of the layer
    return renamed((variables, jax.value_and_grad(loss, has_aux=True)(variables["params"])))


def test_linen_scan_and_remat():
    ours = scanned(normalization.linen.BatchNorm, BIASED)
    theirs = scanned(linen.BatchNorm, NORM)
    assert any(leaf.shape == (3, 5) for leaf in ours)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


class Stage(nnx.Module):
    def __init__(self, kind, options, rngs):
        self.linear = nnx.Linear(5, 5, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.norm = kind(5, **options, rngs=rngs)
        self.last = kind(5, **options, scale_init=zeros, rngs=rngs)

    def __call__(self, x):
        y = nnx.tanh(self.norm(self.linear(x)))
        return x + self.last(y) + 0.1 * y


def nnx_stack(kind, options, how):
    make = lambda rngs: Stage(kind, options, rngs)
    stack = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))
    forward = lambda x, stage: stage(x)
    if how == "remat":
        forward = nnx.remat(forward)
    run = nnx.scan(forward, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    value, slope = nnx.value_and_grad(lambda m: jnp.sum(run(X, m) ** 3))(stack)
    trained_state = nnx.to_pure_dict(nnx.state(stack))
    stack.eval()
    return value, nnx.to_pure_dict(slope), trained_state, run(X, stack)


@pytest.mark.parametrize("how", ["scan", "remat"])
def test_nnx_scan_vmap_remat_and_modes(how):
    ours = nnx_stack(normalization.nnx.BatchNorm, BIASED, how)
    theirs = nnx_stack(nnx.BatchNorm, NORM, how)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)
