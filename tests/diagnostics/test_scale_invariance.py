"""Networks whose scale-invariant leaves are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import regjax
from regjax import diagnostics, transforms

pytestmark = pytest.mark.usefixtures("default_promotion")
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
FLAT = jnp.asarray(RANDOM.normal(size=(16, 6)), jnp.float32)
IMAGES = jnp.asarray(RANDOM.normal(size=(8, 6, 6, 2)), jnp.float32)


class Dense(linen.Module):
    """Dense, a normalization, ReLU, Dense; a bias on both sides of the normalization."""

    norm: type

    @linen.compact
    def __call__(self, inputs, train: bool):
        options = {"use_running_average": not train} if self.norm is linen.BatchNorm else {}
        ones = linen.initializers.ones
        hidden = self.norm(epsilon=0.0, bias_init=ones, name="norm", **options)(
            linen.Dense(5, bias_init=ones, name="first")(inputs)
        )
        return linen.Dense(3, bias_init=ones, name="last")(linen.tanh(hidden))


class Conv(linen.Module):
    @linen.compact
    def __call__(self, inputs, train: bool):
        hidden = linen.Conv(4, (3, 3), use_bias=False, name="first")(inputs)
        hidden = linen.GroupNorm(num_groups=2, epsilon=0.0, name="norm")(hidden)
        return linen.Dense(3, name="last")(linen.tanh(hidden).mean((1, 2)))


def report(module, inputs, mode="train", change=lambda params: params, **options):
    model = regjax.from_linen(module, module.init(KEY, inputs, train=False))
    function = regjax.model_function(model, mode=mode)
    return diagnostics.scale_invariant_mask(
        function, change(model.params), inputs, key=jax.random.key(1), **options
    )


@pytest.mark.parametrize("per_filter", [True, False])
def test_batch_norm_frees_each_filter_of_the_kernel_before_it(per_filter):
    found = report(Dense(linen.BatchNorm), FLAT, per_filter=per_filter)
    assert found.mask == {
        "first": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "last": {"kernel": False, "bias": False},
    }
    # The bias before the norm does not matter at all, which is another thing.
    assert float(found.function_change["first"]["bias"]) < 1e-3
    assert float(found.relative_gradient_norm["first"]["bias"]) < 1e-5
    assert float(found.radial_fraction["first"]["kernel"]) < 1e-5
    assert float(found.function_change["last"]["kernel"]) > 0.05


@pytest.mark.parametrize(
    ("module", "inputs"), [(Dense(linen.LayerNorm), FLAT), (Conv(), IMAGES)], ids=["layer", "group"]
)
def test_other_norms_free_only_whole_kernels(module, inputs):
    # A bias before the layer norm keeps its scale against the kernel's: without it.
    without_bias = lambda params: {
        **params,
        "first": {name: leaf * (name == "kernel") for name, leaf in params["first"].items()},
    }
    assert report(module, inputs, per_filter=False, change=without_bias).mask["first"]["kernel"]
    assert not report(module, inputs, per_filter=True, change=without_bias).mask["first"]["kernel"]


def test_stored_statistics_leave_every_scale():
    found = report(Dense(linen.BatchNorm), FLAT, mode="evaluation")
    assert not any(jax.tree.leaves(found.mask))


def test_a_dead_filter_is_insensitive_and_not_invariant():
    def dead(params):
        # Zero outgoing weights: no functional of the outputs depends on this filter.
        kernel = params["last"]["kernel"].at[2].set(0)
        return {**params, "last": {**params["last"], "kernel": kernel}}

    found = report(Dense(linen.BatchNorm), FLAT, change=dead)
    assert float(found.relative_gradient_norm["first"]["kernel"]) == 0
    assert found.mask["first"]["kernel"] is False


def test_the_mask_fits_rescale_weights():
    module = Dense(linen.BatchNorm)
    model = regjax.from_linen(module, module.init(KEY, FLAT, train=False))
    function = regjax.model_function(model, mode="train")
    mask = diagnostics.scale_invariant_mask(function, model.params, FLAT, key=KEY).mask
    tx = transforms.rescale_weights(mask=mask)
    zero = jax.tree.map(jnp.zeros_like, model.params)
    updates, _ = tx.update(zero, tx.init(model.params), model.params)
    after = optax.apply_updates(model.params, updates)
    np.testing.assert_allclose(jnp.linalg.norm(after["first"]["kernel"], axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(
        function(after, FLAT), function(model.params, FLAT), rtol=1e-3, atol=1e-4
    )


def test_error_texts():
    function = lambda params, x: params["a"] * x
    with pytest.raises(ValueError, match="`tol` must be non-negative, got -1"):
        diagnostics.scale_invariant_mask(function, {"a": jnp.ones(2)}, 1.0, key=KEY, tol=-1)
    with pytest.raises(TypeError, match="must be real floating point, got int32"):
        diagnostics.scale_invariant_mask(function, {"a": jnp.ones(2, jnp.int32)}, 1.0, key=KEY)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        diagnostics.scale_invariant_mask(function, {"a": jnp.ones(2)}, 1.0, key=0)


def test_each_of_the_two_probes_is_needed():
    w = jnp.asarray([0.6, 0.8], jnp.float32)
    find = lambda f: diagnostics.scale_invariant_mask(lambda p, _: f(p), {"w": w}, None, key=KEY)
    direction = lambda p: p["w"] / jnp.linalg.norm(p["w"])
    # At |w| = 1 the radial derivative vanishes, farther off the scale matters.
    turning = find(lambda p: direction(p) + (jnp.sum(p["w"] ** 2) - 1) ** 2)
    assert float(turning.radial_fraction["w"]) < 1e-5
    assert not turning.mask["w"]
    # A constant hides the change of the outputs, not the slope.
    hidden = find(lambda p: 1e6 + p["w"])
    assert float(hidden.function_change["w"]) < 1e-5
    assert not hidden.mask["w"]
    assert find(direction).mask["w"]
