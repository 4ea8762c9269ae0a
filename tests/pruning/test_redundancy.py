"""Ranks of per-example gradients: the toys whose redundancy is known, and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import pruning
from tests.pruning import gated


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def toy(change=lambda params: params):
    """12 hidden units on 200 examples, after a change of their parameters."""
    loss, gates, batch = gated.problem(num_units=12, num_examples=200, dtype=np.float64, seed=5)
    return Partial(gated.gate_loss, change(loss.args[0])), gates, batch


def duplicate_incoming(params):
    return {
        **params,
        "in": params["in"].at[:, 7].set(params["in"][:, 3]),
        "bias": params["bias"].at[7].set(params["bias"][3]),
    }


def duplicate(params):
    outgoing = params["out"].at[7].set(-0.5 * params["out"][3])
    return {**duplicate_incoming(params), "out": outgoing}


def dead_unit(params):
    return {**params, "in": params["in"].at[:, 7].set(0), "bias": params["bias"].at[7].set(0)}


def zero_outgoing(params):
    return {**params, "out": params["out"].at[7].set(0)}


@pytest.mark.parametrize(
    ("change", "rank"),
    [
        (lambda params: params, 12),
        (duplicate_incoming, 12),
        (duplicate, 11),
        (dead_unit, 11),
        (zero_outgoing, 11),
    ],
)
@pytest.mark.optimized
def test_a_deficit_needs_redundancy_of_the_whole_unit(change, rank, double):
    loss, gates, batch = toy(change)
    matrix = pruning.gradient_matrix(loss, gates, *batch)["hidden"]
    report = pruning.gradient_redundancy(matrix, tol=1e-3)
    assert int(report.rank) == rank
    assert int(report.num_units) == 12
    assert float(report.rate) == pytest.approx(1 - rank / 12)
    assert bool(report.has_enough_examples)
    assert not bool(report.is_vanishing)
    # The smallest eigenvalue of the Fisher matrix of the gates.
    fisher = np.asarray(matrix).T @ np.asarray(matrix) / 200
    smallest = float(report.smallest_null_energy)
    assert smallest == pytest.approx(np.linalg.eigvalsh(fisher)[0], abs=1e-12)
    assert (smallest < 1e-20) == (rank == 11)


@pytest.mark.optimized
def test_a_null_direction_changes_no_example_and_the_twin_takes_over(double):
    loss, gates, batch = toy(duplicate)
    matrix = pruning.gradient_matrix(loss, gates, *batch)["hidden"]
    report = pruning.gradient_redundancy(matrix)
    null = report.directions[:, -1]
    np.testing.assert_allclose(matrix @ null, 0, atol=1e-10)
    # Unit 7 hands on -1/2 of what unit 3 does.
    expected = np.zeros(12)
    expected[[3, 7]] = np.array([1, 2]) / np.sqrt(5)
    np.testing.assert_allclose(np.abs(null), expected, atol=1e-8)
    assert float(null[3] * null[7]) > 0
    params = loss.args[0]
    taken_over = {**params, "out": params["out"].at[3].add(params["out"][7]).at[7].set(0)}
    np.testing.assert_allclose(
        gated.outputs(taken_over, gates, batch[0]), gated.outputs(params, gates, batch[0]),
        atol=1e-12,
    )  # fmt: skip


def test_the_matrix_holds_the_gradient_of_each_example():
    loss, gates, batch = gated.problem(num_examples=11)
    expected = [jax.grad(loss)(gates, *(leaf[i : i + 1] for leaf in batch)) for i in range(11)]
    expected = np.stack([example["hidden"] for example in expected])
    for chunk_size in (None, 4):
        matrix = pruning.gradient_matrix(loss, gates, *batch, chunk_size=chunk_size)
        np.testing.assert_allclose(matrix["hidden"], expected, rtol=1e-4, atol=1e-5)
    under_jit = jax.jit(functools.partial(pruning.gradient_matrix, chunk_size=4))
    np.testing.assert_allclose(
        under_jit(loss, gates, *batch)["hidden"], expected, rtol=1e-4, atol=1e-5
    )
    mean = jax.grad(loss)(gates, *batch)["hidden"]
    np.testing.assert_allclose(matrix["hidden"].mean(0), mean, rtol=1e-4, atol=1e-5)


def test_ranks_of_known_singular_values():
    values = jnp.asarray([10.0, 5.0, 1.0, 0.05, 0.0])
    assert int(pruning.numerical_rank(values)) == 3
    assert int(pruning.numerical_rank(values, tol=1e-3)) == 4
    # Shares of the sum of squares: 100, 125 and 126 of 126.0025.
    shares = {0.5: 1, 0.793: 1, 0.794: 2, 0.992: 2, 0.993: 3}
    assert {s: int(pruning.energy_rank(values, share=s)) for s in shares} == shares
    assert float(pruning.stable_rank(values)) == pytest.approx(1.260025)
    flat = jnp.full(4, 3.0)
    assert float(pruning.stable_rank(flat)) == pytest.approx(4)
    assert float(pruning.effective_rank(flat)) == pytest.approx(4, rel=1e-5)
    two = pruning.effective_rank(jnp.asarray([3.0, 1.0, 0.0]))
    assert float(two) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)), rel=1e-5)
    zeros = jnp.zeros(3)
    ranks = pruning.numerical_rank, pruning.energy_rank, pruning.stable_rank, pruning.effective_rank
    assert [float(rank(zeros)) for rank in ranks] == [0, 0, 0, 0]


def test_report_of_a_known_matrix_in_numpy():
    random = np.random.default_rng(8)
    matrix = random.normal(size=(30, 3)) @ random.normal(size=(3, 5))
    report = jax.jit(pruning.gradient_redundancy)(jnp.asarray(matrix, jnp.float32))
    assert int(report.rank) == 3
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(report.singular_values, values, rtol=1e-4, atol=1e-4)
    # All of the energy is in the three directions, so that the saliency is that of the columns.
    saliency = pruning.redundancy_saliency(report)
    np.testing.assert_allclose(saliency, (matrix**2).sum(0), rtol=1e-4)
    one = pruning.redundancy_saliency(report._replace(rank=jnp.int32(1)))
    rows = np.linalg.svd(matrix)[2]
    np.testing.assert_allclose(one, values[0] ** 2 * rows[0] ** 2, rtol=1e-3, atol=1e-4)


def test_removed_units_do_not_count():
    random = np.random.default_rng(9)
    matrix = jnp.asarray(random.normal(size=(30, 5)), jnp.float32)
    mask = jnp.asarray([True, False, True, True, False])
    report = pruning.gradient_redundancy(matrix, mask=mask)
    alone = pruning.gradient_redundancy(matrix[:, np.flatnonzero(mask)])
    assert (int(report.rank), int(report.num_units), float(report.rate)) == (3, 3, 0)
    np.testing.assert_allclose(report.smallest_null_energy, alone.smallest_null_energy, rtol=1e-4)
    saliency = np.asarray(pruning.redundancy_saliency(report))
    np.testing.assert_allclose(
        saliency[np.flatnonzero(mask)], pruning.redundancy_saliency(alone), rtol=1e-3
    )
    np.testing.assert_allclose(saliency[np.flatnonzero(~mask)], 0, atol=1e-9)


def test_what_makes_a_rank_meaningless_is_flagged():
    random = np.random.default_rng(10)
    few = pruning.gradient_redundancy(jnp.asarray(random.normal(size=(4, 6)), jnp.float32))
    assert not bool(few.has_enough_examples)
    assert int(few.rank) == 4
    assert few.singular_values.shape == (6,)
    assert few.directions.shape == (6, 6)
    small = pruning.gradient_redundancy(jnp.asarray(1e-8 * random.normal(size=(9, 3)), jnp.float32))
    assert bool(small.is_vanishing)
    nothing = pruning.gradient_redundancy(jnp.zeros((9, 3)))
    assert bool(nothing.is_vanishing)
    assert int(nothing.rank) == 0


class Coupled:
    couples_examples = True

    def __call__(self, gates, x):
        return jnp.mean(gates["a"]) * jnp.std(x)


SPECTRA = [pruning.numerical_rank, pruning.energy_rank, pruning.stable_rank, pruning.effective_rank]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_rank(bad):
    """Refused where it is known; else NaN, and -1 for what is an integer. No infinite loop."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    broken = matrix.at[2, 1].set(bad)
    with pytest.raises(ValueError, match="`matrix` must be finite, got"):
        pruning.gradient_redundancy(broken)
    result = jax.jit(pruning.gradient_redundancy)(broken)
    assert int(result.rank) == -1
    for number in (result.rate, result.smallest_null_energy, result.singular_values):
        assert np.isnan(number).all()
    assert np.isnan(jax.jit(pruning.redundancy_saliency)(result)).all()
    with pytest.raises(ValueError, match=r"`results\['a'\]\..* must be finite, got NaN"):
        pruning.hierarchical_plan({"a": result}, {"a": 1.0}, budget=9.0)
    # A unit that is removed has no gradient that counts.
    mask = jnp.asarray([True, False, True, True])
    assert int(pruning.gradient_redundancy(broken, mask=mask).rank) == 3
    for rank in SPECTRA:
        values = jnp.asarray([3.0, abs(bad), 1.0])
        with pytest.raises(ValueError, match="`singular_values` must be finite"):
            rank(values)
        found = jax.jit(rank)(values)
        assert int(found) == -1 if found.dtype == jnp.int32 else np.isnan(found)


def test_ranks_have_no_unit():
    """They are those of the shares of the largest value, in any order and of any size."""
    values = jnp.asarray([1.0, 4.0, 0.5, 2.0])
    for rank in SPECTRA:
        expected = rank(jnp.sort(values, descending=True))
        for size in (1.0, 1e-30, 1e30):
            np.testing.assert_allclose(rank(values * size), expected, rtol=1e-6)
        assert float(rank(jnp.zeros(3))) == 0
        with pytest.raises(ValueError, match="`singular_values` must be non-negative"):
            rank(-values)
    np.testing.assert_allclose(pruning.stable_rank(values), 21.25 / 16, rtol=1e-6)


def test_error_texts():
    with pytest.raises(ValueError, match="`gate_loss` must not couple the examples"):
        pruning.gradient_matrix(Coupled(), {"a": jnp.ones(2)}, jnp.ones(5))
    with pytest.raises(ValueError, match=r"`matrix` must have shape \(N, C\), neither.*got \(3,\)"):
        pruning.gradient_redundancy(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2,\), got \(3,\)"):
        pruning.gradient_redundancy(jnp.ones((3, 2)), mask=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="`mask` must be bool, got float32"):
        pruning.gradient_redundancy(jnp.ones((3, 2)), mask=jnp.ones(2))
    with pytest.raises(ValueError, match="`share` must be between 0 and 1, got 2"):
        pruning.energy_rank(jnp.ones(2), share=2)
    with pytest.raises(ValueError, match="`tol` must be non-negative"):
        pruning.numerical_rank(jnp.ones(2), tol=-1)
