"""What couples examples is refused where data are split, by itself, on values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

import regjax
from regjax import WeightedMean, curvature, diagnostics, pruning
from tests import oracles

INPUTS = jax.random.normal(jax.random.key(0), (16, 4)) + 1
TARGETS = jax.random.randint(jax.random.key(1), (16,), 0, 3)
PARAMS = {"a": jax.random.normal(jax.random.key(2), (4, 5)), "b": jnp.zeros((5, 3))}


def standardised(inputs):
    return (inputs - jnp.mean(inputs, 0, keepdims=True)) / (
        jnp.std(inputs, 0, keepdims=True) + 1e-3
    )


def coupled_model(params, inputs):
    """Batch norm in train mode, below a head of zeros: each loss is log 3."""
    return standardised(inputs @ params["a"]) @ params["b"]


def coupled(params, inputs, targets):
    return oracles.cross_entropy(coupled_model(params, inputs), targets)


def summed(params, inputs, targets):
    return oracles.cross_entropy(inputs @ params["a"] @ params["b"], targets) * len(inputs)


def masked_quotient(params, inputs, targets):
    losses = jnp.square(inputs @ params["a"])[:, 0]
    mask = (targets > 0).astype(jnp.float32)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def with_bound_key(params, inputs, targets):
    """One mask for the whole batch."""
    kept = jax.random.bernoulli(jax.random.key(7), 0.5, (len(inputs), 5)).astype(jnp.float32)
    return oracles.cross_entropy(inputs @ params["a"] * kept @ (params["b"] + 1), targets)


def uncoupled(params, inputs, targets):
    return oracles.cross_entropy(jnp.tanh(inputs @ params["a"]) @ params["b"], targets)


COUPLED = [coupled, summed, masked_quotient, with_bound_key]


@pytest.mark.parametrize("loss_fn", COUPLED, ids=lambda f: f.__name__)
def test_whoever_splits_the_data_finds_out(loss_fn):
    direction = jax.tree.map(jnp.ones_like, PARAMS)
    batch = (INPUTS, TARGETS)
    source = [(INPUTS[:8], TARGETS[:8]), (INPUTS[8:], TARGETS[8:])]
    rates = jnp.array([0.1])
    uses = [
        lambda loss: curvature.hessian(loss, PARAMS, *batch, chunk_size=4),
        lambda loss: curvature.stream(curvature.hessian, loss, PARAMS, source),
        lambda loss: diagnostics.line_probe(
            loss, PARAMS, *batch, learning_rates=rates, chunk_size=4
        ),
        lambda loss: curvature.hessian_noise_power(loss, PARAMS, direction, *batch),
        lambda loss: pruning.gradient_matrix(loss, PARAMS, *batch),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"`(loss_fn|gate_loss)` must be the mean over indep"):
            use(loss_fn)
    curvature.hessian(loss_fn, PARAMS, *batch)  # of all data at once it is what it is


def test_a_head_of_zeros_hides_the_coupling_from_the_values_alone():
    value = functools.partial(coupled, PARAMS)
    whole, one, two = (
        value(INPUTS, TARGETS),
        value(INPUTS[:5], TARGETS[:5]),
        value(INPUTS[5:], TARGETS[5:]),
    )
    np.testing.assert_allclose(whole, (5 * one + 11 * two) / 16, rtol=1e-6)
    with pytest.raises(ValueError, match="has another gradient"):
        regjax.check_separable(coupled, PARAMS, INPUTS, TARGETS)


@pytest.mark.parametrize("build", ["gauss_newton", "empirical_fisher", "fisher"])
def test_models_are_tested_too(build):
    targets = () if build == "fisher" else (TARGETS,)
    losses = () if build == "fisher" else (oracles.cross_entropy,)
    options = {"key": None, "num_samples": None} if build == "fisher" else {}

    def make(model, **others):
        function = getattr(curvature, build)
        return function(model, *losses, PARAMS, INPUTS, *targets, **options, **others)

    name = "model_fn" if build == "fisher" else "output_loss_fn"
    with pytest.raises(ValueError, match=f"`{name}` must be the mean over independent examples"):
        make(coupled_model, chunk_size=4)
    make(coupled_model)
    sound = lambda params, inputs: jnp.tanh(inputs @ params["a"]) @ params["b"]
    np.testing.assert_allclose(make(sound, chunk_size=4).dense(), make(sound).dense(), atol=1e-6)


def test_one_test_for_a_function_and_its_shapes(monkeypatch):
    calls = []
    compare = regjax._separable._Check.compare
    monkeypatch.setattr(
        regjax._separable._Check, "compare", lambda *args: (calls.append(1), compare(*args))
    )
    for _ in range(3):
        loss = lambda p, x, y: 3 * uncoupled(p, x, y)
        curvature.hessian(loss, PARAMS, INPUTS, TARGETS, chunk_size=5)
    assert len(calls) == 1
    curvature.hessian(loss, PARAMS, INPUTS[:12], TARGETS[:12], chunk_size=5)
    assert len(calls) == 2


def test_it_is_skipped_by_name_alone():
    for loss_fn in (coupled, Partial(coupled)):
        declared = regjax.assume_separable(loss_fn)
        operator = curvature.hessian(declared, PARAMS, INPUTS, TARGETS, chunk_size=8)
        halves = [curvature.hessian(loss_fn, PARAMS, INPUTS[i::2], TARGETS[i::2]) for i in (0, 1)]
        assert operator.size == halves[0].size
    model = regjax.from_nnx(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    loss = regjax.model_loss(model, lambda o, y: jnp.mean(o[:, 0] ** 3), mode="train_per_chunk")
    curvature.hessian(loss, model.params, INPUTS, TARGETS, chunk_size=8)
    loss = regjax.model_loss(model, lambda o, y: jnp.mean(o[:, 0] ** 3), mode="train")
    with pytest.raises(ValueError, match="`chunk_size` must not split"):
        curvature.hessian(loss, model.params, INPUTS, TARGETS, chunk_size=8)


def test_the_remedies_are_named():
    with pytest.raises(ValueError) as raised:
        curvature.hessian(coupled, PARAMS, INPUTS, TARGETS, chunk_size=4)
    for remedy in ("WeightedMean", "key", "train_per_chunk", "chunk_size", "assume_separable"):
        assert remedy in str(raised.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_of_narrow_types_is_no_coupling(dtype):
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (PARAMS, INPUTS))
    params["b"] = jnp.ones((5, 3), dtype)
    loss = lambda p, x, y: oracles.cross_entropy(
        (jnp.tanh(x @ p["a"]) @ p["b"]).astype(jnp.float32), y
    )
    curvature.hessian(loss, params, inputs, TARGETS, chunk_size=4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_trained_network_and_any_scale_of_the_loss_pass(scale):
    """At a minimum gradients are rounding, which is no mean of anything."""
    weights = jnp.linalg.lstsq(INPUTS, INPUTS @ jnp.ones((4, 2)))[0]
    loss = lambda params, x: scale * jnp.mean((x @ params - x @ jnp.ones((4, 2))) ** 2)
    curvature.hessian(loss, weights, INPUTS, chunk_size=4)
    curvature.hessian(loss, jnp.ones((4, 2)), INPUTS, chunk_size=4)


def test_small_cross_entropies_pass():
    """Losses of 1e-5 are mostly the rounding of logits of 10."""
    params = {"w": jnp.eye(3) * 14}
    inputs = jax.nn.one_hot(TARGETS, 3)
    loss = lambda p, x, y: oracles.cross_entropy(x @ p["w"], y)
    assert loss(params, inputs, TARGETS) < 1e-5
    curvature.hessian(loss, params, inputs, TARGETS, chunk_size=4)
    regjax.check_separable(loss, params, inputs, TARGETS)


def test_weighted_means_must_add_up():
    sound = lambda p, x, y: WeightedMean(jnp.sum((x @ p["a"]) ** 2), jnp.int32(len(x)))
    regjax.check_separable(sound, PARAMS, INPUTS, TARGETS)
    wrong = lambda p, x, y: WeightedMean(jnp.mean((x @ p["a"]) ** 2), jnp.int32(len(x)))
    with pytest.raises(ValueError, match="must be the mean over independent examples"):
        regjax.check_separable(wrong, PARAMS, INPUTS, TARGETS)
    constant = lambda p, x, y: WeightedMean(jnp.sum((x @ p["a"]) ** 2), jnp.float32(16))
    with pytest.raises(ValueError, match=r"has the weight 16, .* have 32 together"):
        regjax.check_separable(constant, PARAMS, INPUTS, TARGETS)


def test_a_product_of_all_data_sees_their_weight_too():
    nothing = lambda p, x, y: WeightedMean(jnp.sum((x @ p["a"]) ** 2), 0 * jnp.int32(len(x)))
    for use in (
        lambda: curvature.hvp(nothing, PARAMS, PARAMS, INPUTS, TARGETS),
        lambda: regjax.regularizers.gradient_norm_penalty(nothing, PARAMS, INPUTS, TARGETS),
    ):
        with pytest.raises(ValueError, match=r"\.weight` must be positive and finite, got 0"):
            use()


CLASS_WEIGHTS = jnp.array([0.2, 1.0, 3.0])


def over_tokens(params, inputs, targets, mask):
    losses = jnp.square(inputs @ params["a"])[:, 0]
    return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def over_classes(params, inputs, targets, mask):
    weights = CLASS_WEIGHTS[targets]
    return jnp.sum(jnp.square(inputs @ params["a"])[:, 0] * weights) / jnp.sum(weights)


def one_for_no_weight(params, inputs, targets, mask):
    losses = jnp.square(inputs @ params["a"])[:, 0]
    return WeightedMean(jnp.sum(losses * mask), jnp.maximum(jnp.sum(mask), 1.0))


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("loss_fn", [over_tokens, over_classes, one_for_no_weight])
def test_what_the_first_data_do_not_show_is_found(loss_fn, size):
    """All examples but the last ones are whole, and the labels are sorted."""
    batch = INPUTS, jnp.sort(TARGETS), jnp.ones(16).at[14:].set(0.0)
    source = [tuple(leaf[i : i + size] for leaf in batch) for i in range(0, 16, size)]
    with pytest.raises(ValueError, match="`loss_fn` must be the mean over independent examples"):
        curvature.stream(curvature.hessian, loss_fn, PARAMS, source)
    # The test is remembered for the function: other data may be padded.
    whole = INPUTS, 0 * TARGETS, jnp.ones(16)
    with pytest.raises(ValueError, match="`loss_fn` must be the mean over independent examples"):
        curvature.hessian(loss_fn, PARAMS, *whole, chunk_size=size)


def test_data_that_give_no_number_tell_nothing():
    """An example of zeros has no direction, and its losses no mean."""
    batch = INPUTS, jnp.full(16, 2.0), jax.random.split(jax.random.key(0), 16)

    def loss(params, inputs, counts, keys):
        unit = inputs / jnp.linalg.norm(inputs, axis=1, keepdims=True)
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        outputs = unit @ params["a"] @ params["b"] + noise
        return jnp.mean(jnp.sum(outputs**2, 1) / counts)

    operator = curvature.hessian(loss, PARAMS, *batch, chunk_size=4)
    expected = curvature.hessian(loss, PARAMS, *batch)
    np.testing.assert_allclose(operator.dense(), expected.dense(), atol=1e-5)


def test_what_is_declared_is_not_lost_on_the_way(monkeypatch):
    """Through gates, parts, displacements and aux: none of them is tested behind a user's back."""
    monkeypatch.setattr(
        regjax._separable._Check, "compare", lambda *args: pytest.fail("tested all the same")
    )
    declared, batch = regjax.assume_separable(coupled), (INPUTS, TARGETS)
    structure = pruning.find_structure(coupled_model, PARAMS, INPUTS)
    gates = pruning.unit_gates(structure, PARAMS)
    pruning.oracle_importance(
        pruning.gated_loss(structure, declared, PARAMS), gates, *batch, chunk_size=8
    )
    part, chosen = regjax.subset(declared, PARAMS, wrt={"a": True, "b": False})
    curvature.hessian(part, chosen, *batch, chunk_size=8)
    with_aux = regjax.assume_separable(lambda *args: (coupled(*args), {}))
    curvature.hessian(regjax.without_aux(with_aux), PARAMS, *batch, chunk_size=8)
    options = {"key": jax.random.key(0), "max_matvecs": 2, "chunk_size": 8}
    diagnostics.spherical_sharpness(
        declared, {"a": PARAMS["a"], "b": PARAMS["b"] + 1}, *batch, **options
    )
    diagnostics.spherical_sharpness_by_group(
        declared, {"a": PARAMS["a"], "b": PARAMS["b"] + 1}, *batch, **options
    )
