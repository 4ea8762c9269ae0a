"""Weight normalization: identities of its gradient, and the three ways to have it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import normalization

RANDOM = np.random.default_rng(0)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def loss(w):
    """Something with a gradient in all directions."""
    return jnp.sum(jnp.sin(w) * jnp.arange(1, w.size + 1, dtype=w.dtype).reshape(w.shape) ** 0.5)


@pytest.mark.parametrize(("shape", "axis"), [((6, 4), -1), ((3, 3, 2, 5), -1), ((3, 3, 5, 2), -2)])
def test_gradients_are_those_of_the_paper(shape, axis, double):
    v = jnp.asarray(RANDOM.normal(size=shape))
    g = jnp.asarray(RANDOM.uniform(0.5, 2, size=shape[axis]))
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    wide = lambda a: np.expand_dims(a, others)
    normalize = partial(normalization.weight_normalize, layout=regjax.Layout(outputs=axis))
    w = normalize(v, g)
    norm = np.sqrt(np.sum(np.asarray(v) ** 2, others))
    np.testing.assert_allclose(w, wide(g / norm) * v, rtol=1e-12)
    slope = jax.grad(loss)(w)
    of_v, of_g = jax.grad(lambda v, g: loss(normalize(v, g)), argnums=(0, 1))(v, g)
    np.testing.assert_allclose(of_g, np.sum(slope * v, others) / norm, atol=1e-10)
    expected = wide(g / norm) * slope - wide(g * of_g / norm**2) * v
    np.testing.assert_allclose(of_v, expected, atol=1e-10)
    np.testing.assert_allclose(np.sum(of_v * v, others), 0, atol=1e-10)


def test_plain_steps_only_lengthen_the_direction(double):
    v, g = jnp.asarray(RANDOM.normal(size=(6, 4))), jnp.ones(4)
    slope = jax.jit(jax.grad(lambda v: loss(normalization.weight_normalize(v, g))))
    square, rate = np.sum(np.asarray(v) ** 2, 0), 0.05
    for _ in range(20):
        step = slope(v)
        v, square = v - rate * step, square + rate**2 * np.sum(np.asarray(step) ** 2, 0)
    np.testing.assert_allclose(np.sum(np.asarray(v) ** 2, 0), square, rtol=1e-9)


def test_length_of_the_direction_does_not_matter_and_a_zero_one_is_finite():
    v, g = jnp.asarray(RANDOM.normal(size=(6, 4)), jnp.float32), jnp.arange(1.0, 5.0)
    w = normalization.weight_normalize(v, g)
    np.testing.assert_allclose(normalization.weight_normalize(7 * v, g), w, rtol=1e-6)
    dead = v.at[:, 1].set(0)
    value, slope = jax.value_and_grad(lambda v: jnp.sum(normalization.weight_normalize(v, g) ** 2))(
        dead
    )
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(slope))
    assert jnp.all(normalization.weight_normalize(dead, g)[:, 1] == 0)
    assert jnp.all(slope[:, 1] == 0)


def test_split_trees_are_the_same_model():
    params = {"kernel": jnp.asarray(RANDOM.normal(size=(6, 4)), jnp.float32), "bias": jnp.ones(4)}
    split = normalization.split_weights(params, mask={"kernel": True, "bias": False})
    assert len(jax.tree.leaves(split)) == 3
    np.testing.assert_allclose(
        normalization.join_weights(split)["kernel"], params["kernel"], rtol=1e-6
    )
    with pytest.raises(ValueError, match="`mask` must have the tree structure"):
        normalization.split_weights(params, mask={"kernel": True})


def layers(kind):
    """(nnx layer, linen layer, inputs) of one kind."""
    if kind == "dense":
        inputs = jnp.asarray(RANDOM.normal(size=(5, 6)), jnp.float32)
        return nnx.Linear(6, 4, rngs=nnx.Rngs(0)), normalization.linen.WeightNormDense(4), inputs
    inputs = jnp.asarray(RANDOM.normal(size=(2, 5, 5, 3)), jnp.float32)
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    return layer, normalization.linen.WeightNormConv(4, (3, 3)), inputs


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_nnx_linen_and_tree_form_agree(kind, default_promotion):
    layer, module, inputs = layers(kind)
    before = layer(inputs)
    wrapped = normalization.nnx.WeightNorm(layer)
    np.testing.assert_allclose(wrapped(inputs), before, rtol=1e-5, atol=1e-6)
    wrapped.scale[...] = wrapped.scale[...] * jnp.arange(1.0, 5.0)
    kernel, bias = layer.kernel[...], layer.bias[...]
    params = {"kernel": kernel, "bias": bias, "scale": wrapped.scale[...]}
    np.testing.assert_allclose(
        module.apply({"params": params}, inputs), wrapped(inputs), rtol=1e-5, atol=1e-6
    )
    layer.kernel[...] = normalization.weight_normalize(kernel, wrapped.scale[...])
    np.testing.assert_allclose(layer(inputs), module.apply({"params": params}, inputs), atol=1e-5)
    # As flax's own layer, before the length is trained.
    start = module.init(jax.random.key(0), inputs)["params"]
    plain = {name: start[name] for name in ("kernel", "bias")}
    base = type(module).__mro__[2]
    fields = {"features": 4, **({"kernel_size": (3, 3)} if kind == "conv" else {})}
    np.testing.assert_allclose(
        base(**fields).apply({"params": plain}, inputs),
        module.apply({"params": start}, inputs),
        rtol=1e-5,
        atol=1e-6,
    )


def test_nnx_trains_the_length_and_never_writes_the_direction(default_promotion):
    layer, _, inputs = layers("dense")
    module = normalization.nnx.WeightNorm(layer)
    before = np.asarray(layer.kernel[...])
    module(inputs)
    np.testing.assert_array_equal(layer.kernel[...], before)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert paths == {("scale",), ("layer", "kernel"), ("layer", "bias")}
    model = regjax.from_nnx(module)
    tx = optax.sgd(0.1)

    def objective(params):
        return jnp.mean((model.apply(params, model.state, inputs, train=True)[0] - 1.0) ** 2)

    params, state = model.params, tx.init(model.params)
    for _ in range(3):
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.abs(params["scale"] - model.params["scale"]).min()) > 1e-4
    longer = jnp.linalg.norm(params["layer"]["kernel"], axis=0)
    assert jnp.all(longer > jnp.linalg.norm(model.params["layer"]["kernel"], axis=0))


SIZES = [1e-33, 1e-25, 1.0, 1e22, 1e36]


@pytest.mark.parametrize("size", SIZES)
def test_directions_of_any_size(size):
    """Squares under- and overflow outside of 1e-19 to 1e19."""
    start, g = RANDOM.normal(size=(6, 4)), jnp.arange(1.0, 5.0)
    v = jnp.asarray(start * size, jnp.float32)
    expected = normalization.weight_normalize(jnp.asarray(start, jnp.float32), g)
    np.testing.assert_allclose(normalization.weight_normalize(v, g), expected, rtol=1e-5)
    slope = jax.grad(lambda v: loss(normalization.weight_normalize(v, g)))
    right = np.asarray(slope(jnp.asarray(start, jnp.float32)), np.float64)
    if size < 1e36:  # beyond, the derivative is no number of float32
        np.testing.assert_allclose(np.asarray(slope(v), np.float64) * size, right, atol=1e-5)
    split = normalization.split_weights({"k": v}, mask={"k": True})["k"]
    length = np.sqrt(np.sum((np.asarray(v, np.float64)) ** 2, 0))
    np.testing.assert_allclose(np.asarray(split.g, np.float64) / length, 1, rtol=1e-5)
    np.testing.assert_allclose(normalization.join_weights(split), v, rtol=1e-5)


def test_double_precision_has_sizes_of_its_own(double):
    start, g = jnp.asarray(RANDOM.normal(size=(6, 4))), jnp.arange(1.0, 5.0)
    expected = normalization.weight_normalize(start, g)
    for size in (1e-300, 1e-170, 1e200, 1e300):
        np.testing.assert_allclose(
            normalization.weight_normalize(start * size, g), expected, rtol=1e-12
        )


def of_authors(kernel, epsilon=1e-5):
    """The authors' code: torch's `std`, which is unbiased, plus epsilon."""
    k = np.asarray(kernel, np.float64)
    axes = tuple(range(k.ndim - 1))
    return (k - k.mean(axes)) / (k.std(axes, ddof=1) + epsilon)


def of_timm(kernel, epsilon=1e-6):
    """timm's StdConv2d: a batch norm over the weights."""
    k = np.asarray(kernel, np.float64)
    axes = tuple(range(k.ndim - 1))
    return (k - k.mean(axes)) / np.sqrt(k.var(axes) + epsilon)


TIMM = {"epsilon": 1e-6, "degrees_of_freedom": 0, "epsilon_added_to": "variance"}


@pytest.mark.parametrize("norm", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 4), (3, 3, 512, 4)])
def test_standardized_weights_are_those_of_the_authors_and_of_timm(shape, norm):
    kernel = RANDOM.normal(size=shape)
    kernel *= norm / np.linalg.norm(kernel.reshape(-1, 4), axis=0)
    kernel = jnp.asarray(kernel, jnp.float32)
    ours = normalization.standardize_weight(kernel)
    np.testing.assert_allclose(ours, of_authors(kernel), rtol=1e-4, atol=1e-5)
    timm = normalization.standardize_weight(kernel, **TIMM)
    np.testing.assert_allclose(timm, of_timm(kernel), rtol=1e-4, atol=1e-5)
    if shape[-2] == 512 and norm == 0.1:  # 0.42 with epsilon inside of the root
        assert np.asarray(ours).std() == pytest.approx(0.993, abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("added_to", ["deviation", "variance"])
def test_without_epsilon_no_factor_changes_standardized_weights(size, added_to):
    start = RANDOM.normal(0.5, 1, size=(3, 3, 8, 4))
    options = {"epsilon": 0.0, "epsilon_added_to": added_to}
    standardize = lambda k: normalization.standardize_weight(k, **options)
    expected = standardize(jnp.asarray(start, jnp.float32))
    np.testing.assert_allclose(np.asarray(expected).std((0, 1, 2), ddof=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        standardize(jnp.asarray(start * size, jnp.float32)), expected, atol=1e-5
    )
    kernel, slope = jnp.asarray(start, jnp.float32), jnp.ones((3, 3, 8, 4)) * kernel_weights(start)
    gradient = jax.grad(lambda k: jnp.sum(standardize(k) * slope))(kernel)
    np.testing.assert_allclose(jnp.sum(gradient * kernel, (0, 1, 2)), 0, atol=1e-4)


def kernel_weights(like):
    return jnp.asarray(np.random.default_rng(1).normal(size=like.shape), jnp.float32)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.0}, TIMM, {**TIMM, "epsilon": 0.0}])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
def test_a_constant_filter_has_no_direction(value, options):
    constant = jnp.full((3, 3, 7, 4), value)
    assert jnp.all(normalization.standardize_weight(constant, **options) == 0)
    gradient = jax.grad(lambda k: jnp.sum(normalization.standardize_weight(k, **options) ** 2))
    assert jnp.all(jnp.isfinite(gradient(constant)))


def test_standardized_weights_along_another_axis_and_of_half_precision():
    kernel = jnp.asarray(RANDOM.normal(size=(3, 3, 5, 2)), jnp.float32)
    other = normalization.standardize_weight(kernel, layout=regjax.Layout(outputs=-2))
    expected = normalization.standardize_weight(jnp.swapaxes(kernel, -1, -2))
    np.testing.assert_allclose(other, jnp.swapaxes(expected, -1, -2), rtol=1e-6)
    assert normalization.standardize_weight(kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert jnp.all(
        jnp.isnan(normalization.standardize_weight(kernel.at[0, 0, 0, 0].set(jnp.nan))[..., 0])
    )


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_standardized_layers_agree(kind, default_promotion):
    layer, _, inputs = layers(kind)
    wrapped = normalization.nnx.WeightStandardized(layer)
    name = {"dense": "WeightStandardizedDense", "conv": "WeightStandardizedConv"}[kind]
    fields = {"features": 4, **({"kernel_size": (3, 3)} if kind == "conv" else {})}
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    outputs = getattr(normalization.linen, name)(**fields).apply({"params": params}, inputs)
    np.testing.assert_allclose(wrapped(inputs), outputs, rtol=1e-5, atol=1e-6)
    layer.kernel[...] = normalization.standardize_weight(layer.kernel[...])
    np.testing.assert_allclose(layer(inputs), outputs, rtol=1e-5, atol=1e-6)


def test_error_texts():
    with pytest.raises(
        ValueError, match=r"`kernel` must have axes of inputs beside .* shape \(3,\)"
    ):
        normalization.standardize_weight(jnp.ones(3))
    with pytest.raises(ValueError, match="`epsilon` must be non-negative, got -1"):
        normalization.standardize_weight(jnp.ones((2, 3)), epsilon=-1)
    with pytest.raises(ValueError, match="`epsilon_added_to` must be one of deviation, variance"):
        normalization.standardize_weight(jnp.ones((2, 3)), epsilon_added_to="std")
    with pytest.raises(ValueError, match="more than 1 weights to a unit, got shape"):
        normalization.standardize_weight(jnp.ones((1, 3)))
    for bad in (jnp.ones((2, 3), int), jnp.ones((2, 3), complex), jnp.ones((2, 3), bool)):
        with pytest.raises(TypeError, match="`kernel` must be real floating point"):
            normalization.standardize_weight(bad)
        with pytest.raises(TypeError, match="`v` must be real floating point"):
            normalization.weight_normalize(bad, jnp.ones(3))
    with pytest.raises(ValueError, match="must hold at least one number, got shape"):
        normalization.weight_normalize(jnp.ones((0, 3)), jnp.ones(3))
    beyond = regjax.Layout(outputs=2)
    with pytest.raises(ValueError, match="`outputs` has 2 for `v` of shape"):
        normalization.weight_normalize(jnp.ones((2, 3)), jnp.ones(3), layout=beyond)
    with pytest.raises(ValueError, match=r"`g` must have shape \(3,\), got \(2,\)"):
        normalization.weight_normalize(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(TypeError, match="must be an nnx module with a kernel, got function"):
        normalization.nnx.WeightNorm(lambda x: x)
    with pytest.raises(TypeError, match="must be an nnx module with a kernel, got BatchNorm"):
        normalization.nnx.WeightNorm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
