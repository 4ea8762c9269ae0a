"""Population statistics of a model: the mean over batches of what batch norm saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from regjax import models, normalization

pytestmark = pytest.mark.usefixtures("default_promotion")
RANDOM = np.random.default_rng(0)
BATCHES = [jnp.asarray(RANDOM.normal(300, 2, size=(12, 5)), jnp.float32) for _ in range(4)]


class Linen(linen.Module):
    norm: type
    momentum: float = 0.99

    @linen.compact
    def __call__(self, x, train: bool):
        norm = self.norm(use_running_average=not train, momentum=self.momentum)
        return linen.Dense(2)(norm(x))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("norm", [linen.BatchNorm, normalization.linen.BatchNorm])
def test_mean_over_the_batches_whatever_the_momentum(norm, momentum):
    module = Linen(norm, momentum)
    model = regjax.from_linen(module, module.init(jax.random.key(0), BATCHES[0], train=False))
    state = regjax.population_statistics(model, model.params, iter(BATCHES))
    found = next(iter(state["batch_stats"].values()))
    x = np.asarray(BATCHES, np.float64)
    np.testing.assert_allclose(found["mean"], x.mean((0, 1)), rtol=1e-5)
    is_flax = norm is linen.BatchNorm
    variances = x.var(1, ddof=0 if is_flax else 1)
    # flax's E[x^2] - E[x]^2 cancels at a mean of 300.
    np.testing.assert_allclose(found["var"], variances.mean(0), rtol=2e-2 if is_flax else 1e-4)
    if not is_flax:
        exact = normalization.exact_population_statistics(x.mean(1), x.var(1), num_values=12)[1]
        np.testing.assert_allclose(found["var"], exact, rtol=1e-4)


def test_evaluation_then_is_the_population_layer_and_other_state_stays():
    model = regjax.from_nnx(
        models.MLP((1, 1, 5), 3, width=8, normalization="noisy", rngs=nnx.Rngs(0))
    )
    inputs = [x.reshape(-1, 1, 1, 5) for x in BATCHES]
    state = regjax.population_statistics(model, model.params, inputs)
    first = np.concatenate(BATCHES) @ np.asarray(model.params["layer_0"]["layer"]["kernel"])
    norm = state["layer_0"]["norm"]
    np.testing.assert_allclose(norm["mean"], first.mean(0), rtol=1e-4, atol=1e-3)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(jax.random.key_data, norm["rngs"]["key"]),
        jax.tree.map(jax.random.key_data, model.state["layer_0"]["norm"]["rngs"]["key"]),
    )
    assert norm["rngs"]["count"] == model.state["layer_0"]["norm"]["rngs"]["count"]


class Masked(linen.Module):
    @linen.compact
    def __call__(self, batch, train: bool):
        norm = normalization.linen.BatchNorm(
            use_running_average=not train, unbiased_running_variance=False
        )
        return norm(batch["x"], mask=batch["mask"])


def test_masked_batches_count_by_what_is_in_them():
    shares = [1.0, 0.3, 0.0, 0.6]
    batches = [
        {"x": x, "mask": jnp.asarray(RANDOM.random((12, 1)) < share)}
        for x, share in zip(BATCHES, shares, strict=True)
    ]
    module = Masked()
    model = regjax.from_linen(module, module.init(jax.random.key(0), batches[0], train=False))
    state = regjax.population_statistics(
        model, model.params, batches, weight_fn=lambda batch: jnp.sum(batch["mask"])
    )
    (found,) = state["batch_stats"].values()
    values = np.concatenate([b["x"][np.asarray(b["mask"])[:, 0]] for b in batches])
    # Of spread 2: without the weights the means are off by 0.1.
    np.testing.assert_allclose(found["mean"], values.astype(np.float64).mean(0), atol=5e-3)
    nothing = [batches[2]]
    with pytest.raises(ValueError, match="`weight_fn` must be positive for one of the batches"):
        regjax.population_statistics(
            model, model.params, nothing, weight_fn=lambda batch: jnp.sum(batch["mask"])
        )
    with pytest.raises(ValueError, match=r"`weight_fn\(inputs\)` must be non-negative, got -1"):
        regjax.population_statistics(model, model.params, batches, weight_fn=lambda _: -1)


def test_a_model_without_statistics_keeps_its_state():
    model = regjax.from_callable(lambda p, x: x @ p, jnp.ones((5, 2)), {"table": jnp.ones(3)})
    state = regjax.population_statistics(model, model.params, BATCHES)
    np.testing.assert_array_equal(state["table"], 1)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        regjax.population_statistics(model, model.params, [])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_batches_count_by_their_sizes(kind):
    """The mean over the batches without weights is another one."""
    data = RANDOM.normal(0, 1, size=(27, 5)).astype(np.float32)
    data[24:] += 5
    batches = [data[:12], data[12:24], data[24:]]
    if kind == "linen":
        module = Linen(linen.BatchNorm, 0.9)
        model = regjax.from_linen(module, module.init(jax.random.key(0), batches[0], train=False))
        found = regjax.population_statistics(model, model.params, batches)["batch_stats"]
        found = found["BatchNorm_0"]
    else:
        module = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
        model = regjax.from_nnx(module)
        found = regjax.population_statistics(model, model.params, batches)
    np.testing.assert_allclose(found["mean"], data.mean(0), rtol=1e-4)
    variance = np.average([b.var(0) for b in batches], axis=0, weights=[12, 12, 3])
    np.testing.assert_allclose(found["var"], variance, rtol=1e-4)
    wrong = np.mean([b.mean(0) for b in batches], axis=0)
    assert np.abs(np.asarray(found["mean"]) - wrong).min() > 0.1


def test_ghosts_of_a_smaller_batch_have_a_momentum_of_their_own():
    data = [RANDOM.normal(1, 2, size=(n, 5)).astype(np.float32) for n in (12, 12, 4)]
    module = normalization.nnx.GhostBatchNorm(5, ghost_size=4, momentum=0.5)
    model = regjax.from_nnx(module)
    found = regjax.population_statistics(model, model.params, data)
    # Later ghosts of a batch weigh more, 1 : 2 : 4.
    means = [np.average(x.reshape(-1, 4, 5).mean(1), axis=0, weights=[1, 2, 4]) for x in data[:2]]
    expected = np.average([*means, data[2].mean(0)], axis=0, weights=[12, 12, 4])
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, normalization.nnx.BatchNorm])
def test_nan_has_no_statistics(norm):
    model = regjax.from_nnx(norm(5, rngs=nnx.Rngs(0)))
    batches = [BATCHES[0], BATCHES[1].at[0, 2].set(jnp.nan)]
    with pytest.raises(ValueError, match="`batches` must give outputs without NaN"):
        regjax.population_statistics(model, model.params, batches)
    compiled = jax.jit(lambda b: regjax.population_statistics(model, model.params, b))(batches)
    assert jnp.all(jnp.isnan(compiled["mean"]))
