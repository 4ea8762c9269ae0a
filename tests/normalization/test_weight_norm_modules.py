"""Weight norm of any module, with the options of flax's: the same kernels, another start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from regjax import normalization

pytestmark = pytest.mark.usefixtures("default_promotion")
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(4, 6)), jnp.float32)
AXES = [-1, 0, (0, 1), None]


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(5)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return linen.DenseGeneral((2, 3))(linen.tanh(x))


@pytest.mark.parametrize("axes", [-1, 0, None])
@pytest.mark.parametrize("words", [{"kernel"}, {"Dense_0/kernel"}])
@pytest.mark.parametrize("use_scale", [True, False])
def test_linen_is_flax_with_its_initial_scale(axes, words, use_scale):
    """The same names and numbers, so that a checkpoint of flax's goes into ours."""
    options = {"feature_axes": axes, "variable_filter": words, "use_scale": use_scale}
    inits = {"epsilon": 1e-12, "scale_init": linen.initializers.uniform()}
    theirs = linen.WeightNorm(Net(), **options, **inits)
    ours = normalization.linen.WeightNorm(Net(), **options, **inits)
    y, one = theirs.init_with_output(jax.random.key(0), X)
    z, two = ours.init_with_output(jax.random.key(0), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), two, one)
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-6)
    slopes = [
        jax.jit(jax.grad(lambda p, m=m: jnp.sum(m.apply({**one, "params": p}, X) ** 3)))(
            one["params"]
        )
        for m in (ours, theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *slopes)


def test_linen_changes_no_function_at_the_start():
    variables = Net().init(jax.random.key(0), X)
    module = normalization.linen.WeightNorm(Net())
    wrapped = module.init(jax.random.key(0), X)
    assert set(wrapped["params"]) == {
        "layer_instance",
        "layer_instance/Dense_0/kernel/scale",
        "layer_instance/DenseGeneral_0/kernel/scale",
    }
    inner = {name: tree["layer_instance"] for name, tree in wrapped.items()}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), inner, variables)
    run = lambda m, v: m.apply(v, X, train=True, mutable=["batch_stats"])
    (y, ours), (z, theirs) = run(module, wrapped), run(Net(), inner)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        ours["batch_stats"]["layer_instance"],
        theirs["batch_stats"],
    )
    with pytest.raises(
        ValueError, match="`variable_filter` must match a parameter of layer_instance"
    ):
        normalization.linen.WeightNorm(Net(), variable_filter={"weight"}).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"`feature_axes` must be axes of each kernel, got \(5,\)"):
        normalization.linen.WeightNorm(Net(), feature_axes=5).init(jax.random.key(0), X)


def expected_kernel(kernel, scale, axes, epsilon):
    """NumPy."""
    kernel = np.asarray(kernel, np.float64)
    axes = () if axes is None else tuple(np.atleast_1d(axes) % kernel.ndim)
    others = tuple(i for i in range(kernel.ndim) if i not in axes)
    norm = np.sqrt(np.sum(kernel**2, others, keepdims=True) + epsilon)
    return np.expand_dims(np.asarray(scale, np.float64), others) * kernel / norm


@pytest.mark.parametrize("axes", [-1, 0, (0, 2), None])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_nnx_kernels_of_any_axes_against_numpy(axes, epsilon):
    layer = nnx.Conv(2, 4, (3,), rngs=nnx.Rngs(0))
    module = normalization.nnx.WeightNorm(
        layer,
        feature_axes=axes,
        epsilon=epsilon,
        scale_init=nnx.initializers.uniform(),
        rngs=nnx.Rngs(1),
    )
    x = jnp.asarray(RANDOM.normal(size=(2, 7, 2)), jnp.float32)
    y = module(x)
    made = expected_kernel(layer.kernel[...], module.scale[...], axes, epsilon)
    layer.kernel[...] = jnp.asarray(made, jnp.float32)
    np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-6)


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, rngs=rngs, decode=False)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        return self.drop(self.norm(self.attention(x))) * scale


def test_nnx_wraps_any_module_and_lets_its_state_tick():
    inner = Inner(nnx.Rngs(0))
    plain, module = nnx.clone(inner), normalization.nnx.WeightNorm(inner)
    x = jnp.asarray(RANDOM.normal(size=(3, 4, 6)), jnp.float32)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(inner, nnx.Param)))
    for _ in range(2):
        np.testing.assert_allclose(module(x, scale=2.0), plain(x, scale=2.0), rtol=1e-4, atol=1e-5)
    state = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Not(nnx.Param)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(inner, nnx.BatchStat))),
        nnx.to_pure_dict(nnx.state(plain, nnx.BatchStat)),
    )
    assert jax.tree.structure(state(inner)) == jax.tree.structure(state(plain))
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(inner, nnx.Param)), before
    )
    assert set(module.scale["attention"]) == {"query", "key", "value", "out"}
    module.eval()
    np.testing.assert_array_equal(module(x), module(x))
    slope = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(module)
    assert jnp.any(slope["scale"]["attention"]["query"]["kernel"][...] != 0)


def test_nnx_options():
    make = lambda **options: normalization.nnx.WeightNorm(
        nnx.Linear(6, 4, rngs=nnx.Rngs(0)), **options
    )
    plain = make(use_scale=False)
    assert plain.scale is None
    kernel = plain.layer.kernel[...]
    unit = kernel / jnp.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(plain(X), X @ unit, rtol=1e-5, atol=1e-6)
    assert make(param_dtype=jnp.bfloat16).scale.dtype == jnp.bfloat16
    half = make(dtype=jnp.float16, promote_dtype=nnx.nn.dtypes.promote_dtype)
    np.testing.assert_allclose(half(X), X @ kernel, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="`rngs` must be given with `scale_init`, got None"):
        make(scale_init=nnx.initializers.ones)
    with pytest.raises(ValueError, match=r"`variable_filter` must match a parameter .* bias, kern"):
        make(variable_filter=nnx.PathContains("weight"))
    with pytest.raises(ValueError, match=r"`feature_axes` must leave an axis to the norm, got"):
        make(feature_axes=(0, 1))
    with pytest.raises(ValueError, match=r"`feature_axes` must be axes of each kernel, got \(2,\)"):
        make(feature_axes=2)
    with pytest.raises(ValueError, match="`epsilon` must be non-negative, got -1"):
        make(epsilon=-1.0)


def test_linen_layers_take_an_initial_scale():
    module = normalization.linen.WeightNormDense(
        4, scale_init=linen.initializers.zeros, epsilon=1e-6
    )
    variables = module.init(jax.random.key(0), X)
    np.testing.assert_array_equal(variables["params"]["scale"], 0)
    np.testing.assert_array_equal(module.apply(variables, X), 0)
    bare = normalization.linen.WeightNormDense(4, use_scale=False)
    assert set(bare.init(jax.random.key(0), X)["params"]) == {"kernel", "bias"}
