"""What flax's batch norm takes and gives, ours takes and gives too: the same numbers and trees."""

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
BIASED = {"unbiased_running_variance": False}
LAYERS = [
    "BatchNorm", "GhostBatchNorm", "NoisyBatchNorm", "MeanOnlyBatchNorm", "LpNorm",
    "GroupNormPlus", "BatchNormGroupNorm", "ParallelGroupBatchNorm",
]  # fmt: skip
OPTIONS = {
    "GhostBatchNorm": {"ghost_size": 2},
    **{name: {"num_groups": 2, "batch_axes": None, "track_running": True} for name in LAYERS[5:]},
}


def close(ours, theirs, tol):
    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(np.asarray(a, "c16"), np.asarray(b, "c16"), rtol=tol, atol=tol)

    jax.tree.map(same, ours, theirs)


CASES = [
    {},
    {"axis": 1},
    {"axis": 0, "use_fast_variance": False},
    {"use_scale": False},
    {"use_bias": False, "param_dtype": jnp.float16},
    {"dtype": jnp.float16},
    {"momentum": 0.5, "epsilon": 1e-2},
]
TYPES = [jnp.float32, jnp.float16, jnp.int32]


def example(dtype=jnp.float32, masked=False):
    x = jnp.asarray(RANDOM.normal(3, 4, size=(4, 3, 5, 6))).astype(dtype)
    mask = jnp.asarray(RANDOM.random((4, 3, 5, 1)) > 0.4) if masked else None
    if masked and dtype != jnp.int32:
        x = jnp.where(mask, x, jnp.nan)  # what does not count is not looked at
    return x, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [*CASES, {"axis": (1, -1)}, {"force_float32_reductions": False}]
)
def test_linen(options, masked):
    for dtype in TYPES if options == {} else TYPES[:1]:
        x, mask = example(dtype, masked)
        inits = {
            "scale_init": linen.initializers.uniform(),
            "bias_init": linen.initializers.normal(),
        }
        theirs = linen.BatchNorm(**options, **inits)
        ours = normalization.linen.BatchNorm(**options, **inits, **BIASED)
        halves = jnp.float16 in (dtype, *options.values())
        tol = 1e-2 if halves else 1e-4
        y, one = theirs.init_with_output(jax.random.key(0), x, False, mask=mask)
        z, other = ours.init_with_output(jax.random.key(0), x, False, mask=mask)
        close(other, one, 0)
        close(z, y, tol)
        y, one = theirs.apply(one, x, False, mask=mask, mutable=["batch_stats"])
        z, state = ours.apply(other, x, False, mask=mask, mutable=["batch_stats"])
        close(z, y, tol)
        close(state, one, tol)
        other = {**other, **state}
        close(ours.apply(other, x, True), theirs.apply(other, x, True), tol)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_nnx(options, masked):
    x, mask = example(masked=masked)
    inits = {"scale_init": nnx.initializers.uniform(), "bias_init": nnx.initializers.normal()}
    make = lambda kind, **more: kind(
        x.shape[options.get("axis", -1)], **options, **inits, rngs=nnx.Rngs(0), **more
    )
    theirs, ours = make(nnx.BatchNorm), make(normalization.nnx.BatchNorm, **BIASED)
    promoted = make(
        normalization.nnx.BatchNorm, promote_dtype=nnx.nn.dtypes.promote_dtype, **BIASED
    )
    state = lambda module: nnx.to_pure_dict(nnx.state(module))
    tol = 1e-2 if jnp.float16 in options.values() else 1e-4
    for module in (ours, promoted):
        close(state(module), state(theirs), 0)
    y = theirs(x, mask=mask)
    for module in (ours, promoted):
        close(module(x, mask=mask), y, tol)
        close(state(module), state(theirs), tol)
        close(module(x, True), theirs(x, True), tol)
        view = nnx.view(module, use_running_average=True)
        close(view(x), theirs(x, True), tol)
        assert not module.use_running_average


def test_complex_inputs():
    x = jnp.asarray(
        RANDOM.normal(size=(4, 3, 2)) + 1j * RANDOM.normal(size=(4, 3, 2)), jnp.complex64
    )
    theirs, ours = linen.BatchNorm(False), normalization.linen.BatchNorm(False, **BIASED)
    y, one = theirs.init_with_output(jax.random.key(0), x)
    z, other = ours.init_with_output(jax.random.key(0), x)
    close(z, y, 1e-4)
    state = [m.apply(v, x, mutable=["batch_stats"])[1] for m, v in ((ours, other), (theirs, one))]
    close(*state, 1e-4)
    evaluated = [
        kind(True).apply({**other, **state[0]}, x)
        for kind in (normalization.linen.BatchNorm, linen.BatchNorm)
    ]
    close(*evaluated, 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_modes_by_position_and_precedence(name):
    x, options = example()[0], OPTIONS.get(name, {})
    module = getattr(normalization.nnx, name)(6, rngs=nnx.Rngs(0), **options)
    before = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    evaluated = module(x, True)  # the call wins
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)), before
    )
    module.eval()
    np.testing.assert_array_equal(module(x), evaluated)
    with pytest.raises(ValueError, match="`use_running_average` must be given to the module or"):
        getattr(normalization.nnx, name)(6, use_running_average=None, rngs=nnx.Rngs(0), **options)(
            x
        )
    face = getattr(normalization.linen, name)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
        face(**options).init(rngs, x)
    with pytest.raises(ValueError, match="was passed to the constructor and at call time"):
        face(True, **options).init(rngs, x, True)


@pytest.mark.parametrize("name", LAYERS)
def test_channels_along_any_axis(name):
    x, options = example()[0], OPTIONS.get(name, {})
    last = getattr(normalization.nnx, name).layer_type(**options)
    params, state = last.init_params(6), last.init_state(6)
    key = jax.random.key(0) if last.needs_key else None
    y, new = last.apply(params, state, x, train=True, key=key)
    first = type(last)(axis=1, **options)
    z, moved = first.apply(params, state, jnp.moveaxis(x, -1, 1), train=True, key=key)
    close(jnp.moveaxis(z, 1, -1), y, 1e-6)
    close(moved, new, 1e-6)


@pytest.mark.parametrize("name", ["BatchNorm", "GhostBatchNorm", "MeanOnlyBatchNorm", "LpNorm"])
def test_masks_leave_the_batch_that_counts(name):
    """Without the examples that do not count the statistics are the same."""
    x, options = example()[0], OPTIONS.get(name, {})
    layer = getattr(normalization.nnx, name).layer_type(use_scale=True, **options)
    params, state = layer.init_params(6), layer.init_state(6)
    longer = jnp.concatenate([x, jnp.full_like(x, 1e3)])
    counts = jnp.arange(8).reshape(8, 1, 1, 1) < 4
    run = lambda p, x, mask: layer.apply(p, state, x, train=True, mask=mask)
    y, new = run(params, x, None)
    z, masked = run(params, longer, counts)
    close(z[:4], y, 1e-5)
    close(masked, new, 1e-5)  # ghosts without values tick nothing
    slope = lambda x, mask, n: jax.grad(lambda x: jnp.sum(run(params, x, mask)[0][:n] ** 3))(x)
    close(slope(longer, counts, 4)[:4], slope(x, None, 4), 1e-3)
    assert jnp.all(slope(longer, counts, 4)[4:] == 0)
    nothing, kept = run(params, x, jnp.zeros((), bool))
    assert jnp.all(nothing == 0 if name == "GhostBatchNorm" else jnp.isnan(nothing))
    close(kept, state, 0)


def test_several_initialisations_and_calls():
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x):
            norm = normalization.linen.BatchNorm(
                name="norm", use_running_average=False, axis_name="batch"
            )
            x = norm(x)
            return x, norm(x)

    (one, other), variables = Twice().init_with_output(jax.random.key(0), example()[0])
    np.testing.assert_allclose(one, other, rtol=5e-3, atol=1e-4)
    assert variables["params"]["norm"].keys() == {"scale", "bias"}
    # An example by itself, under a mapped axis that `init` does not know.
    x = jnp.asarray(RANDOM.normal(size=(8, 5)), jnp.float32)
    module = normalization.linen.BatchNorm(False, axis_name="batch", **BIASED)
    variables = module.init(jax.random.key(0), x[0])
    run = lambda x: module.apply(variables, x, mutable=["batch_stats"])
    y, state = jax.vmap(run, axis_name="batch", out_axes=(0, None))(x)
    theirs = linen.BatchNorm(False)
    z, expected = theirs.apply(variables, x, mutable=["batch_stats"])
    close(y, z, 1e-4)
    close(state, expected, 1e-5)


def test_partitions_and_metadata():
    box = linen.with_partitioning(linen.initializers.ones, ("model",))
    module = normalization.linen.BatchNorm(False, scale_init=box)
    x = example()[0]
    variables = module.init(jax.random.key(0), x)
    assert isinstance(variables["params"]["scale"], linen.Partitioned)
    names = linen.get_partition_spec(variables)["params"]
    assert names["scale"] == jax.sharding.PartitionSpec("model")
    y, _ = module.apply(variables, x, mutable=["batch_stats"])
    z, _ = module.apply(linen.unbox(variables), x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, z)
    model = regjax.from_linen(normalization.linen.BatchNorm(scale_init=box), variables)
    slope = jax.grad(lambda p: jnp.sum(model.apply(p, model.state, x, train=True)[0] ** 3))
    assert isinstance(slope(model.params)["scale"], linen.Partitioned)
    module = normalization.nnx.BatchNorm(6, scale_metadata={"role": "gain"}, bias_metadata={"a": 1})
    assert (module.scale.role, module.bias.a) == ("gain", 1)
    with pytest.raises(ValueError, match="`rngs` must be given with `scale_init`, got None"):
        normalization.nnx.BatchNorm(6, scale_init=nnx.initializers.uniform())
    assert normalization.nnx.BatchNorm(6, use_bias=False).bias is None


def test_a_variance_beyond_all_numbers_is_said():
    """flax's outputs are the bias then, without a word."""
    module = normalization.nnx.BatchNorm(6)
    outputs = module(1e25 * example()[0])
    assert jnp.all(jnp.isnan(outputs))
    np.testing.assert_array_equal(module.var[...], 1)
    constant = normalization.nnx.BatchNorm(6, epsilon=0.0)(jnp.ones((4, 6)))
    np.testing.assert_array_equal(constant, 0)


@pytest.mark.parametrize("order", [1, 2, float("inf")])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_of_any_size(order, size):
    layer = normalization.LpNorm(order=order, epsilon=0.0)
    params, state, x = layer.init_params(6), layer.init_state(6), example()[0]
    y, _ = layer.apply(params, state, x, train=True)
    z, new = layer.apply(params, state, x * size, train=True)
    close(z, y, 1e-5)
    assert jnp.all(jnp.isfinite(new["norm"]))


def test_arrays_of_the_caller_are_not_written():
    module = normalization.nnx.BatchNorm(6)
    own = np.zeros(6, np.float32)
    own.flags.writeable = False
    module.mean.set_value(own)
    module(example()[0])
    np.testing.assert_array_equal(own, 0)
    assert jnp.any(module.mean[...] != 0)


def test_mutable_references_and_a_gradient_beside_them():
    """flax's own refuse it: they write a value with a derivative."""
    x = jnp.asarray(RANDOM.normal(size=(16, 6)), jnp.float32)
    with nnx.var_defaults(ref=True):
        module = normalization.nnx.BatchNorm(6, **BIASED)
        slope = jax.grad(lambda x: jnp.sum(module(x) ** 3))(x)
    plain = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    close(slope, jax.grad(lambda x: jnp.sum(nnx.clone(plain)(x) ** 3))(x), 1e-4)
    plain(x)
    close(module.var[...], plain.var[...], 1e-5)


_GROUPS = """
import warnings; warnings.simplefilter("ignore")
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from flax import linen
from regjax import normalization as n
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).normal(3, 2, size=(8, 4)).astype("float32")
x += np.arange(8, dtype="float32")[:, None]
options = dict(axis_name="data", use_running_average=False)
def run(module, groups, x):
    variables = module.init(jax.random.key(0), x)
    out = jax.jit(jax.shard_map(
        lambda x: module.apply(variables, x, mutable=["batch_stats"]), mesh=mesh,
        in_specs=P("data"), out_specs=(P("data"), P() if groups is None else P("data")),
        check_vma=groups is None))(x)
    return jax.block_until_ready(out)
for groups in (None, [[0, 1], [2, 3]], [[0, 2], [3, 1]]):
    both = dict(options, axis_index_groups=groups)
    a = run(linen.BatchNorm(**both), groups, x)
    b = run(n.linen.BatchNorm(unbiased_running_variance=False, **both), groups, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)
    for kind in (n.linen.LpNorm, n.linen.MeanOnlyBatchNorm):
        run(kind(**both), groups, x)
mask = np.arange(8)[:, None] < 5
layer, alone = n.BatchNorm(axis_name="data"), n.BatchNorm()
params, state = alone.init_params(4), alone.init_state(4)
y, new = alone.apply(params, state, x, train=True, mask=mask)
z, after = jax.block_until_ready(jax.jit(jax.shard_map(
    lambda x, m: layer.apply(params, state, x, train=True, mask=m), mesh=mesh,
    in_specs=(P("data"), P("data")), out_specs=(P("data"), P())))(x, mask))
np.testing.assert_allclose(z, y, atol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, new)
print("same")
"""


def test_groups_of_devices_and_masks_over_them():
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", _GROUPS], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "same", result.stderr[-2000:]
