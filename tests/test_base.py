from functools import partial

import jax.numpy as jnp
import pytest
from flax import nnx
from jax.tree_util import Partial

import regjax
from tests import oracles

INPUTS = jnp.arange(1.0, 6.0)


def mean(params, inputs):
    return jnp.mean(params * inputs)


def total(params, inputs):
    return jnp.sum(params * inputs)


def test_couples_examples_sees_through_partials():
    def coupled(params, batch, scale):
        return scale * jnp.var(params * batch)

    coupled.couples_examples = True
    for function in (
        coupled,
        partial(coupled, scale=2),
        Partial(coupled),
        partial(Partial(coupled)),
    ):
        assert regjax.couples_examples(function)
    for function in (oracles.loss_fn, partial(oracles.loss_fn), Partial(oracles.loss_fn)):
        assert not regjax.couples_examples(function)


def test_check_separable_accepts_a_mean_and_refuses_a_sum():
    regjax.check_separable(mean, jnp.float32(2), INPUTS)
    problem = oracles.problem()
    regjax.check_separable(oracles.loss_fn, problem.params, *problem.batch)
    # 1 and 4 examples: the sum is 30, the weighted mean of the sums (1 * 2 + 4 * 28) / 5.
    with pytest.raises(ValueError, match=r"gives 30, .* of 1 and 4 examples gives 22\.8\."):
        regjax.check_separable(total, jnp.float32(2), INPUTS)


def test_check_separable_refuses_batch_norm_in_train_mode_only():
    problem = oracles.problem()
    model = regjax.from_nnx(
        nnx.Sequential(nnx.BatchNorm(5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    )
    loss = partial(regjax.model_loss, model, oracles.cross_entropy)
    regjax.check_separable(loss(), model.params, *problem.batch)
    for mode in ("train", "train_per_chunk"):
        with pytest.raises(ValueError, match="must be the mean over independent examples"):
            regjax.check_separable(loss(mode=mode), model.params, *problem.batch)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_the_tolerance_of_check_separable_is_relative_to_the_loss(scale):
    def almost(params, inputs):
        # Off by a few 1e-5 of a loss of 6, times the scale.
        return mean(params, inputs) + 1e-5 * scale * inputs.size

    regjax.check_separable(almost, jnp.float32(2 * scale), INPUTS)
    with pytest.raises(ValueError, match="mean over independent"):
        regjax.check_separable(almost, jnp.float32(2 * scale), INPUTS, tol=5e-7)
    with pytest.raises(ValueError, match="`tol` must be non-negative, got -1"):
        regjax.check_separable(mean, jnp.float32(2), INPUTS, tol=-1)


def test_check_separable_names_what_it_cannot_judge():
    with pytest.raises(ValueError, match="at least two examples to be split, got 1"):
        regjax.check_separable(mean, jnp.float32(1), jnp.ones(1))
    with pytest.raises(ValueError, match="`loss_fn` must be finite on the batch, got nan"):
        regjax.check_separable(mean, jnp.float32(1), jnp.array([1.0, jnp.nan, 1.0]))
    with pytest.raises(ValueError, match=r"the mean loss, got shape \(3,\): take its mean"):
        regjax.check_separable(lambda params, inputs: inputs, jnp.float32(1), jnp.ones(3))


def test_check_separable_passes_over_the_rounding_of_a_loss_of_zero():
    """The loss of an exact fit is the square of rounding, different on each part."""

    def fit(params, errors, rounding):
        return jnp.mean((params * errors) ** 2) + rounding * (len(errors) % 3)

    errors = 1e-9 * jnp.asarray([1.0, 0, 0, 0, 0, 0, 0])
    regjax.check_separable(partial(fit, rounding=1e-18), jnp.float32(1), errors)
    with pytest.raises(ValueError, match="mean over independent"):
        regjax.check_separable(partial(fit, rounding=1e-2), jnp.float32(1), errors)
