"""The flax modules hold the arrays of the layers and nothing else: all three agree."""

import dataclasses
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from regjax import normalization

pytestmark = pytest.mark.usefixtures("default_promotion")
RANDOM = np.random.default_rng(0)
OPTIONS = {
    "BatchNorm": {"momentum": 0.8},
    "GhostBatchNorm": {"ghost_size": 4},
    "NoisyBatchNorm": {"momentum": 0.7},
    "MeanOnlyBatchNorm": {},
    "LpNorm": {"order": 1},
    "GroupNormPlus": {"num_groups": 4, "batch_axes": None, "track_running": True},
    "BatchNormGroupNorm": {"num_groups": 4},
    "ParallelGroupBatchNorm": {"num_groups": 4},
}


def batch():
    return jnp.asarray(RANDOM.normal(1, 2, size=(8, 3, 3, 8)), jnp.float32)


@pytest.mark.parametrize("name", OPTIONS)
def test_linen_nnx_and_the_layer_agree_over_three_updates(name):
    options = OPTIONS[name]
    layer = getattr(normalization.nnx, name).layer_type(**options)
    params, state = layer.init_params(8), layer.init_state(8)
    one = getattr(normalization.nnx, name)(8, rngs=nnx.Rngs(0), **options)
    other = getattr(normalization.linen, name)(**options)
    variables = other.init(jax.random.key(0), batch(), use_running_average=True)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    for _ in range(3):
        x = batch()
        seed = nnx.Rngs(0).dropout.fork() if layer.needs_key else None
        key = None if seed is None else seed()
        y, state = layer.apply(params, state, x, train=True, key=key)
        if layer.needs_key:
            one.rngs = nnx.Rngs(0).dropout.fork()
        np.testing.assert_array_equal(one(x), y)
        rngs = {} if key is None else {"dropout": key}
        z, new = other.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"], rngs=rngs
        )
        variables = {**variables, **new}
        if not layer.needs_key:  # linen folds the module's path into its key
            np.testing.assert_array_equal(z, y)
    for key, value in state.items():
        np.testing.assert_array_equal(getattr(one, key)[...], value)
        np.testing.assert_array_equal(variables["batch_stats"][key], value)
    one.eval()
    x = batch()
    y, _ = layer.apply(params, state, x, train=False)
    np.testing.assert_array_equal(one(x), y)
    np.testing.assert_array_equal(other.apply(variables, x, use_running_average=True), y)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_have_one_name_and_one_default(name):
    fields = {
        f.name: f.default for f in dataclasses.fields(getattr(normalization.nnx, name).layer_type)
    }
    in_linen = {f.name: f.default for f in dataclasses.fields(getattr(normalization.linen, name))}
    assert fields.items() <= in_linen.items()
    extra = set(in_linen) - set(fields)
    ours = {"use_running_average", "rng_collection", "bias_init", "scale_init"}
    assert extra == {*ours, "name", "parent"}
    signature = inspect.signature(getattr(normalization.nnx, name)).parameters
    assert fields.items() <= {k: p.default for k, p in signature.items()}.items()


@pytest.mark.parametrize("name", OPTIONS)
def test_adapters_train_and_evaluate_them(name):
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, train: bool):
            norm = getattr(normalization.linen, name)(**OPTIONS[name])
            return linen.Dense(3)(norm(x, use_running_average=not train).mean((1, 2)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.norm = getattr(normalization.nnx, name)(8, rngs=rngs, **OPTIONS[name])
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(x).mean((1, 2)))

    module = Linen()
    layer = getattr(normalization.nnx, name).layer_type(**OPTIONS[name])
    x, key = batch(), jax.random.key(3) if layer.needs_key else None
    for model in (
        regjax.from_linen(module, module.init(jax.random.key(0), x, train=False)),
        regjax.from_nnx(Nnx(nnx.Rngs(0))),
    ):
        assert model.has_batch_statistics == bool(layer.init_state(8))
        loss = lambda p: jnp.sum(model.apply(p, model.state, x, train=True, key=key)[0] ** 2)  # noqa: B023
        slope = jax.jit(jax.grad(loss))(model.params)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
        _, state = model.apply(model.params, model.state, x, train=True, key=key)
        statistics = jax.tree.leaves(layer.init_state(8))
        moved = jax.tree.leaves(
            jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state, model.state)
        )
        assert sum(moved) >= len(statistics)


def test_noise_is_fresh_and_off_in_evaluation():
    module = normalization.nnx.NoisyBatchNorm(8, rngs=nnx.Rngs(0))
    x = batch()
    assert jnp.abs(module(x) - module(x)).max() > 0.1
    module.eval()
    np.testing.assert_array_equal(module(x), module(x))
    with pytest.raises(ValueError, match="`rngs` must be given"):
        normalization.nnx.NoisyBatchNorm(8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        normalization.nnx.BatchNorm(8, momentun=0.9)


_SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from regjax import normalization as n
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).normal(3, 2, size=(64, 4)).astype("float32")
x += np.arange(64, dtype="float32")[:, None]
for one, spread in (
    (n.BatchNorm(), n.BatchNorm(axis_name="data")),
    (n.LpNorm(order=float("inf")), n.LpNorm(order=float("inf"), axis_name="data")),
    (n.MeanOnlyBatchNorm(), n.MeanOnlyBatchNorm(axis_name="data")),
):
    params, state = one.init_params(4), one.init_state(4)
    y, new = one.apply(params, state, x, train=True)
    step = jax.jit(lambda x: one.apply(params, state, x, train=True))
    for run in (
        lambda: step(jax.device_put(x, NamedSharding(mesh, P("data")))),
        lambda: jax.jit(jax.shard_map(
            lambda x: spread.apply(params, state, x, train=True), mesh=mesh,
            in_specs=P("data"), out_specs=(P("data"), P()), check_vma=False))(x),
    ):
        z, after = jax.block_until_ready(run())
        np.testing.assert_allclose(z, y, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, new)
print("same")
"""


def test_a_batch_on_eight_devices_gives_the_statistics_of_one():
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", _SHARDED], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "same", result.stderr[-2000:]
