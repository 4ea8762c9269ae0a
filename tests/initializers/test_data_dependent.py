"""After the initialisation every layer's outputs have the chosen moments, in any flax model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from regjax import initializers, models, normalization

pytestmark = pytest.mark.usefixtures("default_promotion")
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(1, 3, size=(200, 6)), jnp.float32)
IMAGES = jnp.asarray(RANDOM.normal(1, 3, size=(60, 6, 6, 2)), jnp.float32)


class NnxPlain(nnx.Module):
    def __init__(self, wrap=lambda layer: layer, rngs=None):
        rngs = nnx.Rngs(0)
        sizes = [6, 8, 8, 3]
        self.layers = nnx.List(
            [wrap(nnx.Linear(n, m, rngs=rngs)) for n, m in itertools.pairwise(sizes)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = []

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.seen.append(x)
            if i < 2:
                x = self.dropout(nnx.leaky_relu(x, 0.1))
        return x


class LinenPlain(linen.Module):
    layer: type = linen.Dense

    @linen.compact
    def __call__(self, x, train: bool):
        for i, width in enumerate((8, 8, 3)):
            x = self.layer(width, name=f"dense_{i}")(x)
            self.sow("seen", "t", x)
            if i < 2:
                x = linen.Dropout(0.5, deterministic=not train)(linen.leaky_relu(x, 0.1))
        return x


def check(outputs, std=1.0):
    assert len(outputs) == 3
    for t in outputs:
        np.testing.assert_allclose(np.mean(t, 0), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(t, 0), std, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda layer: layer, normalization.nnx.WeightNorm])
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_nnx(wrap, std):
    module = NnxPlain(wrap)
    model = regjax.from_nnx(module)
    params = initializers.data_dependent(model, model.params, model.state, X, std=std)
    nnx.update(module, nnx.State(params))
    module.eval()
    module.seen = []
    module(X)
    check(module.seen, std)
    # The weight-normalized layer keeps its direction.
    if wrap is normalization.nnx.WeightNorm:
        jax.tree.map(
            np.testing.assert_array_equal,
            params["layers"][0]["layer"]["kernel"],
            model.params["layers"][0]["layer"]["kernel"],
        )


@pytest.mark.parametrize("layer", [linen.Dense, normalization.linen.WeightNormDense])
def test_linen(layer):
    module = LinenPlain(layer)
    variables = module.init(jax.random.key(0), X, train=False)
    variables = {"params": variables["params"]}
    model = regjax.from_linen(module, variables)
    params = initializers.data_dependent(model, model.params, model.state, X)
    _, seen = module.apply({"params": params}, X, train=False, mutable=["seen"])
    check(seen["seen"]["t"])


def test_linen_and_nnx_agree():
    module, other = LinenPlain(), NnxPlain()
    one = regjax.from_nnx(other)
    variables = {"params": {f"dense_{i}": one.params["layers"][i] for i in range(3)}}
    two = regjax.from_linen(module, variables)
    first = initializers.data_dependent(one, one.params, one.state, X)
    second = initializers.data_dependent(two, two.params, two.state, X)
    for i in range(3):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            first["layers"][i],
            second[f"dense_{i}"],
        )
    jitted = jax.jit(lambda p, x: initializers.data_dependent(one, p, one.state, x))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jitted(one.params, X),
        first,
    )


def test_fold_of_a_batch_norm_is_the_initialisation():
    module = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    model = regjax.from_nnx(module)
    params = initializers.data_dependent(model, model.params, model.state, X)
    t = X @ module.kernel[...]
    kernel, bias = normalization.fold_batch_norm(
        module.kernel[...], None, 1.0, 0.0, t.mean(0), t.var(0), epsilon=1e-10
    )
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_residual_nets_with_a_deviation_for_each_layer(norm):
    model = regjax.from_nnx(
        models.ResNet((6, 6, 2), 3, widths=(4, 6), normalization=norm, rngs=nnx.Rngs(0))
    )
    asked = []

    def std(path):
        asked.append(path)
        return 0.1 if "second" in path else 1.0

    params = initializers.data_dependent(model, model.params, model.state, IMAGES, std=std)
    assert asked[:3] == [
        ("stem", "layer"), ("block_0", "first", "layer"), ("block_0", "second", "layer")
    ]  # fmt: skip
    assert asked[-1] == ("head",)
    kernel = params["stem"]["layer"]["kernel"]
    t = jax.lax.conv_general_dilated(
        IMAGES, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(np.std(np.asarray(t).reshape(-1, 4), 0), 1, rtol=1e-3)
    if norm == "none":
        # An original bias may not stay where there is one.
        outputs, _ = model.apply(params, model.state, IMAGES, train=True)
        np.testing.assert_allclose(np.mean(outputs, 0), 0, atol=1e-3)
        np.testing.assert_allclose(np.std(outputs, 0), 1, rtol=1e-3)


def test_transposed_kernels_and_constant_units():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.up = nnx.ConvTranspose(2, 3, (2, 2), transpose_kernel=True, rngs=rngs)
            self.dead = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            self.last = self.up(x)
            return self.dead(jnp.zeros_like(self.last) + 5)

    module = Net()
    model = regjax.from_nnx(module)
    params = initializers.data_dependent(model, model.params, model.state, IMAGES)
    # A unit that does not vary keeps its kernel; its output is zero.
    np.testing.assert_array_equal(params["dead"]["kernel"], model.params["dead"]["kernel"])
    nnx.update(module, nnx.State(params))
    np.testing.assert_allclose(module(IMAGES), 0, atol=1e-5)
    t = np.asarray(module.last).reshape(-1, 3)
    np.testing.assert_allclose(t.std(0), 1, rtol=1e-3)
    np.testing.assert_allclose(t.mean(0), 0, atol=1e-3)


def test_mask_and_error_texts():
    model = regjax.from_nnx(NnxPlain())
    run = lambda model, x=X, **options: initializers.data_dependent(
        model, model.params, model.state, x, **options
    )
    mask = jax.tree.map(lambda leaf: False, model.params)
    mask["layers"][1] = {"kernel": True, "bias": False}
    params = run(model, mask=mask)
    np.testing.assert_array_equal(
        params["layers"][0]["kernel"], model.params["layers"][0]["kernel"]
    )
    assert jnp.any(params["layers"][1]["kernel"] != model.params["layers"][1]["kernel"])

    plain = regjax.from_callable(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 2))})
    with pytest.raises(TypeError, match="`model` must come from `from_linen` or `from_nnx`"):
        run(plain)

    class Odd(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
            self.table = nnx.Param(jnp.ones((3, 3)))
            self.standardized = normalization.nnx.WeightStandardized(
                nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            )

        def __call__(self, x):
            return self.standardized(self.linear(x) @ self.table[...])

    odd = regjax.from_nnx(Odd())
    with pytest.raises(ValueError, match=r"got standardized/layer/kernel, table|got table, stand"):
        run(odd)
    with pytest.raises(ValueError, match=r"each unit of layers/0 two values at least, got one"):
        run(model, X[:1])
    with pytest.raises(ValueError, match=r"`inputs` must give finite outputs of layers/0"):
        run(model, X.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="`std` must be positive, got 0"):
        run(model, std=0)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22])
def test_outputs_of_any_size(size, default_promotion):
    inputs = jnp.asarray(np.random.default_rng(0).normal(2, 1, size=(50, 6)), jnp.float32)
    model = regjax.from_nnx(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    small = {"kernel": model.params["kernel"] * size, "bias": model.params["bias"]}
    params = initializers.data_dependent(model, small, model.state, inputs, epsilon=0.0, std=2.0)
    outputs = np.asarray(model.apply(params, model.state, inputs, train=False)[0])
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(outputs.std(0), 2, rtol=1e-4)


def test_arguments_of_another_model_are_named(default_promotion):
    model = regjax.from_nnx(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    inputs, run = jnp.ones((5, 6)), initializers.data_dependent
    other = {"kernel": model.params["kernel"], "offset": model.params["bias"]}
    with pytest.raises(ValueError, match="`params` must have the tree structure of the model's"):
        run(model, other, model.state, inputs)
    with pytest.raises(ValueError, match="`std` must be finite, got inf"):
        run(model, model.params, model.state, inputs, std=float("inf"))
    with pytest.raises(ValueError, match="`inputs` must hold at least one example, got 0"):
        run(model, model.params, model.state, inputs[:0])
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        run(model, model.params, model.state, inputs, key=0)


@pytest.mark.parametrize("layer", [linen.Dense, normalization.linen.WeightNormDense])
def test_partitioned_kernels_are_initialised_and_keep_their_boxes(layer, default_promotion):
    inputs = jnp.asarray(np.random.default_rng(0).normal(2, 1, size=(50, 6)), jnp.float32)
    module = layer(4, kernel_init=linen.with_partitioning(linen.initializers.normal(), (None, "m")))
    model = regjax.from_linen(module, module.init(jax.random.key(0), inputs))
    params = initializers.data_dependent(model, model.params, model.state, inputs)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    assert isinstance(params["kernel"], linen.Partitioned)
    outputs = np.asarray(model.apply(params, model.state, inputs, train=False)[0])
    np.testing.assert_allclose(outputs.std(0), 1, rtol=1e-3)


def test_scanned_layers_are_refused():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 3, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.split_rngs(splits=4)(nnx.vmap(Block))(rngs)

        def __call__(self, x):
            step = nnx.scan(lambda x, block: block.dense(x), out_axes=nnx.Carry)
            return step(x, self.blocks)

    model = regjax.from_nnx(Net(nnx.Rngs(0)))
    text = (
        r"own for each layer, got a stack of layers in \['blocks'\]\['dense'\]\['bias'\] of shape"
    )
    with pytest.raises(ValueError, match=text):
        initializers.data_dependent(model, model.params, model.state, jnp.ones((5, 3)))
