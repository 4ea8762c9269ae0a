"""Lines and planes against the loss itself; directions against the norms of the filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import diagnostics, models
from tests import oracles

POSITIONS = np.float32([-1, -0.5, 0, 0.25])


@pytest.mark.parametrize("per_filter", [True, False])
def test_directions_have_the_norms_of_the_filters(per_filter):
    params = {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), "bias": jnp.ones(4)},
        "dense": jnp.ones((5, 3)),
        "scale": jnp.ones(()),
    }
    draw = lambda seed: diagnostics.filter_normalized_direction(
        params, key=jax.random.key(seed), per_filter=per_filter
    )
    direction, other = draw(0), draw(1)
    axes = (0, 1, 2) if per_filter else None
    norm = lambda tree: np.sqrt(np.sum(np.square(tree["conv"]["kernel"]), axis=axes))
    np.testing.assert_allclose(norm(direction), norm(params), rtol=1e-6)
    assert not np.allclose(direction["conv"]["kernel"], other["conv"]["kernel"])
    # No two leaves share a draw either.
    assert not np.allclose(direction["dense"].ravel()[:4], direction["conv"]["kernel"].ravel()[:4])
    np.testing.assert_array_equal(direction["conv"]["bias"], 0)
    assert float(direction["scale"]) == 0


def test_a_filter_of_zeros_stays_and_types_are_kept():
    params = {"w": jnp.zeros((4, 2), jnp.bfloat16)}
    direction = diagnostics.filter_normalized_direction(params, key=jax.random.key(0))
    assert direction["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(direction["w"]), 0)


@pytest.mark.parametrize("chunk_size", [None, 9])
def test_surface_and_lines_are_the_loss_at_their_points(chunk_size):
    problem = oracles.problem()
    draw = lambda seed: diagnostics.filter_normalized_direction(
        problem.params, key=jax.random.key(seed)
    )
    first, second = draw(0), draw(1)
    surface = diagnostics.loss_surface(
        oracles.loss_fn, problem.params, first, second, *problem.batch,
        positions=POSITIONS, chunk_size=chunk_size,
    )  # fmt: skip
    at = lambda a, b: oracles.loss_fn(
        jax.tree.map(lambda w, d, e: w + a * d + b * e, problem.params, first, second),
        *problem.batch,
    )
    expected = [[at(a, b) for b in POSITIONS] for a in POSITIONS]
    np.testing.assert_allclose(surface, expected, rtol=2e-6)
    # Its middle row is the line along the second direction.
    end = jax.tree.map(jnp.add, problem.params, second)
    line = diagnostics.interpolate(
        oracles.loss_fn, problem.params, end, *problem.batch,
        positions=POSITIONS, chunk_size=chunk_size,
    )  # fmt: skip
    np.testing.assert_allclose(line, surface[2], rtol=2e-6)


@pytest.mark.usefixtures("default_promotion")
def test_convolutions_are_driven_by_the_host_and_give_the_same_under_jit():
    x, y = jax.random.normal(jax.random.key(0), (6, 4, 4, 1)), jnp.arange(6) % 3
    model = regjax.from_nnx(models.ConvNet((4, 4, 1), 3, width=2, depth=1, rngs=nnx.Rngs(0)))
    loss = regjax.model_loss(model, oracles.cross_entropy)
    direction = diagnostics.filter_normalized_direction(model.params, key=jax.random.key(1))

    def line(params, chunk_size):
        end = jax.tree.map(jnp.add, params, direction)
        return diagnostics.interpolate(
            loss, params, end, x, y, positions=POSITIONS[:2], chunk_size=chunk_size
        )

    whole = line(model.params, None)
    np.testing.assert_allclose(jax.jit(lambda p: line(p, None))(model.params), whole, rtol=1e-5)
    np.testing.assert_allclose(line(model.params, 4), whole, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda p: line(p, 4))(model.params), whole, rtol=1e-5)


def test_bad_input():
    params, rows = {"w": jnp.ones(2)}, jnp.ones((4, 2))
    loss = lambda params, rows: jnp.mean(rows @ params["w"])
    other, wrong = {"v": jnp.ones(2)}, {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="`other_direction` must have the tree structure"):
        diagnostics.loss_surface(loss, params, params, other, rows, positions=POSITIONS)
    with pytest.raises(ValueError, match="`other_params` must have the tree structure"):
        diagnostics.interpolate(loss, params, other, rows, positions=POSITIONS)
    with pytest.raises(ValueError, match=r"`direction\['w'\]` must have shape \(2,\)"):
        diagnostics.loss_surface(loss, params, wrong, params, rows, positions=POSITIONS)
    with pytest.raises(ValueError, match="`positions` must be a vector"):
        diagnostics.interpolate(loss, params, params, rows, positions=np.ones((2, 2)))
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        diagnostics.filter_normalized_direction(params, key=0)
