"""Mixings: the matrices that they apply, read off from the identity, and what they refuse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import transforms
from regjax.transforms import _mixing

KEY = jax.random.key(3)
MIXINGS = {
    "ring": transforms.ring_mixing(),
    "pairs": transforms.random_pair_mixing(key=KEY),
    "exponential": transforms.exponential_mixing(),
    "full": transforms.full_mixing(),
    "dense": transforms.dense_mixing([[0.5, 0.25, 0.25, 0], [0.5, 0.5, 0, 0],
                                      [0, 0, 0.75, 0.25], [0, 0.25, 0, 0.75]]),
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def mixed(mixing, params, count=0):
    """The mixed params of all learners, from stacked ones."""
    return jax.vmap(lambda own: mixing(own, count, "learner"), axis_name="learner")(params)


def matrix_of(mixing, num, count=0):
    """W: learner k starts from the k-th unit vector."""
    return np.asarray(mixed(mixing, jnp.eye(num), count))


@pytest.mark.parametrize(("num", "second"), [(4, 0.33333), (8, 0.80474), (16, 0.94925),
                                             (32, 0.98719)])  # fmt: skip
def test_the_ring_has_its_spectrum(num, second):
    matrix = matrix_of(MIXINGS["ring"], num)
    expected = np.zeros((num, num))
    for j in range(num):
        expected[j, [j, (j - 1) % num, (j + 1) % num]] = 1 / 3
    np.testing.assert_allclose(matrix, expected, atol=1e-7)
    values = np.sort(np.linalg.eigvalsh(matrix))
    cosines = (1 + 2 * np.cos(2 * np.pi * np.arange(num) / num)) / 3
    np.testing.assert_allclose(values, np.sort(cosines), atol=1e-5)
    assert np.sort(np.abs(values))[-2] == pytest.approx(second, abs=1e-5)
    assert values[0] == pytest.approx(-1 / 3, abs=1e-5)


def test_small_rings_count_nobody_twice():
    np.testing.assert_array_equal(matrix_of(MIXINGS["ring"], 2), np.full((2, 2), 0.5))
    np.testing.assert_allclose(matrix_of(MIXINGS["ring"], 3), np.full((3, 3), 1 / 3), atol=1e-7)


@pytest.mark.parametrize("name", ["ring", "pairs", "exponential", "full"])
def test_a_single_learner_keeps_its_weights(name):
    np.testing.assert_array_equal(matrix_of(MIXINGS[name], 1), 1)


@pytest.mark.parametrize("num", [4, 5])
def test_every_matrix_is_doubly_stochastic(num):
    for name, mixing in MIXINGS.items():
        if (name == "pairs" and num % 2) or (name == "dense" and num != 4):
            continue
        for count in range(4):
            matrix = matrix_of(mixing, num, count)
            assert np.all(matrix >= 0), name
            for axis in (0, 1):
                np.testing.assert_allclose(matrix.sum(axis), 1, atol=1e-6, err_msg=name)
            # Learners who agree stay as they are.
            same = jnp.full((num, 3), 0.1)
            np.testing.assert_allclose(mixed(mixing, same, count), same, rtol=1e-6)


@pytest.mark.parametrize("num", [2, 4, 8, 10])
def test_each_pair_meets_once(num):
    rounds = np.asarray(_mixing.matchings(num))
    assert rounds.shape == (num - 1, num)
    for partners in rounds:
        np.testing.assert_array_equal(partners[partners], np.arange(num))
        assert np.all(partners != np.arange(num))
    met = {frozenset(pair) for partners in rounds for pair in enumerate(partners.tolist())}
    assert met == set(map(frozenset, itertools.combinations(range(num), 2)))  # n = 8: 28 pairs


def test_pairs_are_matchings_that_contract_as_they_should():
    num = 8
    rounds = [(np.eye(num) + np.eye(num)[p]) / 2 for p in _mixing.matchings(num)]
    x = np.random.default_rng(0).normal(size=(num, 5))
    away = lambda x: np.sum((x - x.mean(0)) ** 2)
    ratio = np.mean([away(matrix @ x) for matrix in rounds]) / away(x)
    assert ratio == pytest.approx(3 / 7, abs=1e-6)
    steps = [matrix_of(MIXINGS["pairs"], num, count) for count in range(700)]
    drawn = np.asarray([[np.array_equal(step, matrix) for matrix in rounds] for step in steps])
    np.testing.assert_array_equal(drawn.sum(1), 1)
    # Each round 100 times of 700, within 5 standard errors of a binomial count.
    assert np.all(np.abs(drawn.sum(0) - 100) < 5 * np.sqrt(700 * (1 / 7) * (6 / 7)))


def test_the_key_decides_the_pairs():
    other = transforms.random_pair_mixing(key=jax.random.key(4))
    steps = lambda mixing: [matrix_of(mixing, 8, count) for count in range(5)]
    np.testing.assert_array_equal(
        steps(MIXINGS["pairs"]), steps(transforms.random_pair_mixing(key=KEY))
    )
    assert np.any(np.not_equal(steps(MIXINGS["pairs"]), steps(other)))


@pytest.mark.parametrize("num", [2, 4, 6, 8, 16])
def test_exponential_steps_reach_the_mean_for_powers_of_two(num):
    num_shifts = (num - 1).bit_length()
    matrices = [matrix_of(MIXINGS["exponential"], num, count) for count in range(num_shifts + 1)]
    for shift, matrix in enumerate(matrices[:num_shifts]):
        expected = (np.eye(num) + np.roll(np.eye(num), 2**shift, axis=0)) / 2
        np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(matrices[num_shifts], matrices[0])
    product = np.linalg.multi_dot(matrices) if num > 2 else matrices[0]
    is_mean = np.allclose(product, 1 / num, atol=1e-7)
    assert is_mean == (num & (num - 1) == 0)


def test_dense_mixing_is_the_product_with_the_matrix():
    random = np.random.default_rng(1)
    tree = {"a": random.normal(size=(4, 3, 2)), "b": random.normal(size=4)}
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    matrix = matrix_of(MIXINGS["dense"], 4)
    assert matrix[0, 3] == 0
    assert matrix[3, 1] == 0.25  # rows are the receivers
    found = mixed(MIXINGS["dense"], tree)
    for name, leaf in tree.items():
        np.testing.assert_allclose(found[name], np.tensordot(matrix, leaf, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(MIXINGS))
def test_dtypes_stay_and_sums_are_wide(name):
    values = np.asarray([1.0, 1 + 2**-7, 1 + 2**-6, 1 + 3 * 2**-7])
    for dtype in (jnp.bfloat16, jnp.float32):
        params = {"w": jnp.asarray(values, dtype)}
        found = mixed(MIXINGS[name], params)["w"]
        assert found.dtype == dtype
        exact = matrix_of(MIXINGS[name], 4) @ values
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact, atol=2**-8 if dtype == jnp.bfloat16 else 1e-6
        )
    with jax.enable_x64(True):
        found = mixed(MIXINGS[name], jnp.asarray([1.0, 2.0, 4.0, 7.0], jnp.float64))
        assert found.dtype == jnp.float64
        assert float(found.mean()) == pytest.approx(3.5, abs=1e-14)


def test_errors():
    with pytest.raises(ValueError, match=r"`matrix` must have shape \(n, n\), got \(2, 3\)"):
        transforms.dense_mixing(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`matrix` must be non-negative, got an entry -0\.5"):
        transforms.dense_mixing([[1.5, -0.5], [-0.5, 1.5]])
    with pytest.raises(ValueError, match="must be non-negative, got an entry nan"):
        transforms.dense_mixing([[np.nan, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"doubly stochastic.*got row sums from 0\.5 to 1\.5"):
        transforms.dense_mixing([[0.5, 0], [0.5, 1.0]])
    with pytest.raises(ValueError, match=r"doubly stochastic.*got column sums from 0\.5 to 1\.5"):
        transforms.dense_mixing([[0.5, 0.5], [0, 1.0]])
    with pytest.raises(ValueError, match="a row for each of the 8 learners, got 4"):
        matrix_of(MIXINGS["dense"], 8)
    with pytest.raises(TypeError, match="`matrix` must be known when the program is built"):
        jax.jit(transforms.dense_mixing)(jnp.eye(2))
    with pytest.raises(ValueError, match=r"`random_pair_mixing` must have an even number.*got 5"):
        matrix_of(MIXINGS["pairs"], 5)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        transforms.random_pair_mixing(key=0)
    nested = lambda own: MIXINGS["pairs"](own, jnp.int32(0), ("device", "block"))
    blocks = jax.vmap(jax.vmap(nested, axis_name="block"), axis_name="device")
    with pytest.raises(ValueError, match="`axis_name` must be a single axis for `random_pair"):
        blocks(jnp.ones((2, 2)))
    for mixing in MIXINGS.values():
        with pytest.raises(
            ValueError, match=r"`axis_name` must be bound.*got 'learner'.*jax\.vmap"
        ):
            mixing(jnp.ones(2), jnp.int32(0), "learner")
