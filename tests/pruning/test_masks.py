"""Masks: exact counts, ties, floors, and errors; and what schedules ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import pruning
from tests.pruning.gated import flat

SCORES = {"a": jnp.asarray([0.5, 0.1, 0.3]), "b": jnp.asarray([[0.2, 0.9], [0.05, 0.4]])}
FULL = pruning.full_masks(SCORES)


def removed(masks):
    return np.flatnonzero(~flat(masks)).tolist()


def by_definition(scores, masks, count, min_units):
    """One at a time: the lowest that its leaf can spare, the first of those that tie."""
    left = [np.array(leaf).ravel() for leaf in jax.tree.leaves(masks)]
    values = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(scores)]
    for _ in range(count):
        offers = [
            (value, number, i)
            for number, (leaf, kept) in enumerate(zip(values, left, strict=True))
            for i, value in enumerate(leaf)
            if kept[i] and kept.sum() > min_units
        ]
        _, number, i = min(offers)
        left[number][i] = False
    return np.concatenate(left)


@pytest.mark.parametrize("transform", [jax.jit, lambda f, **_: f])
def test_the_lowest_of_all_leaves_go(transform):
    remove = transform(pruning.mask_lowest, static_argnames=("num_to_remove", "min_units"))
    assert removed(remove(SCORES, FULL, num_to_remove=0)) == []
    masks = remove(SCORES, FULL, num_to_remove=3)
    assert removed(masks) == [1, 3, 5]  # 0.1, 0.2, 0.05
    assert masks["b"].shape == (2, 2)
    assert masks["b"].dtype == bool
    # What is gone does not count again.
    assert removed(remove(SCORES, masks, num_to_remove=1)) == [1, 2, 3, 5]
    # The highest of each leaf stay.
    assert removed(remove(SCORES, FULL, num_to_remove=5)) == [1, 2, 3, 5, 6]
    assert removed(remove(SCORES, FULL, num_to_remove=3, min_units=2)) == [1, 3, 5]
    assert removed(remove(SCORES, FULL, num_to_remove=7, min_units=0)) == list(range(7))


def test_ties_remove_exactly_so_many():
    dead = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    assert removed(pruning.mask_lowest(dead, pruning.full_masks(dead), 2)) == [0, 1]
    equal = {"a": jnp.ones(3), "b": jnp.ones(3)}
    for count in range(5):
        masks = pruning.mask_lowest(equal, pruning.full_masks(equal), count)
        assert len(removed(masks)) == count


def test_against_one_at_a_time():
    random = np.random.default_rng(0)
    remove = jax.jit(pruning.mask_lowest, static_argnames="min_units")
    shapes = {"a": (4,), "b": (2, 3), "c": (5,)}
    for trial in range(40):
        # Few values, so that many tie.
        scores = {
            k: jnp.asarray(random.integers(4, size=s), jnp.float32) for k, s in shapes.items()
        }
        masks = {k: jnp.asarray(random.random(s) < 0.8) for k, s in shapes.items()}
        floor = trial % 3
        most = sum(max(int(leaf.sum()) - floor, 0) for leaf in masks.values())
        count = int(random.integers(most + 1))
        found = remove(scores, masks, jnp.int32(count), min_units=floor)
        np.testing.assert_array_equal(flat(found), by_definition(scores, masks, count, floor))


def test_a_count_at_run_time_removes_what_it_can():
    remove = jax.jit(lambda *arguments: pruning.mask_lowest(*arguments))
    assert len(removed(remove(SCORES, FULL, jnp.int32(2)))) == 2
    assert len(removed(remove(SCORES, FULL, jnp.int32(99)))) == 5
    assert remove._cache_size() == 1


def test_infinite_scores_are_scores():
    scores = {"a": jnp.asarray([jnp.inf, 2.0, 1.0, -jnp.inf])}
    full = pruning.full_masks(scores)
    orders = [removed(pruning.mask_lowest(scores, full, count)) for count in (1, 2, 3)]
    assert orders == [[3], [2, 3], [1, 2, 3]]


def test_nan_is_no_score():
    """Refused where that is known, else nothing goes; what is gone already may have any score."""
    scores = {"a": jnp.asarray([3.0, jnp.nan, 1.0]), "b": jnp.ones(2)}
    full = pruning.full_masks(scores)
    with pytest.raises(ValueError, match=r"`scores\['a'\]` must be numbers where `masks` are True"):
        pruning.mask_lowest(scores, full, 1)
    remove = jax.jit(functools.partial(pruning.mask_lowest, num_to_remove=1))
    assert removed(remove(scores, full)) == []
    without = {**full, "a": jnp.asarray([True, False, True])}
    for form in (remove, functools.partial(pruning.mask_lowest, num_to_remove=1)):
        np.testing.assert_array_equal(form(scores, without)["a"], [True, False, False])
        np.testing.assert_array_equal(form(scores, without)["b"], [True, True])


def test_negative_counts():
    for count in (-1, jnp.int32(-1)):
        with pytest.raises(ValueError, match=r"`num_to_remove` must be .*-1"):
            pruning.mask_lowest(SCORES, FULL, count)
    remove = jax.jit(lambda count: pruning.mask_lowest(SCORES, FULL, count))
    assert removed(remove(jnp.int32(-1))) == []


def test_gates_of_masks():
    gates = pruning.gates_from_masks({"a": jnp.asarray([True, False])})
    assert gates["a"].dtype == jnp.float32
    np.testing.assert_array_equal(gates["a"], [1, 0])
    with pytest.raises(TypeError, match=r"`masks\['a'\]` must be boolean, .* got float32"):
        pruning.gates_from_masks(gates)


def test_error_texts():
    with pytest.raises(ValueError, match=r"`num_to_remove` must be at most 5.*in each leaf, got 6"):
        pruning.mask_lowest(SCORES, FULL, 6)
    gone = pruning.mask_lowest(SCORES, FULL, 5)
    with pytest.raises(ValueError, match="`num_to_remove` must be at most 0"):
        pruning.mask_lowest(SCORES, gone, 1)
    with pytest.raises(ValueError, match="`num_to_remove` must be at most 5"):
        jax.jit(lambda masks: pruning.mask_lowest(SCORES, masks, 6))(FULL)
    with pytest.raises(TypeError, match="`num_to_remove` must be one integer, got float32"):
        pruning.mask_lowest(SCORES, FULL, jnp.float32(2))
    with pytest.raises(ValueError, match="`masks` must have the tree structure"):
        pruning.mask_lowest(SCORES, {"a": FULL["a"]}, 1)
    with pytest.raises(ValueError, match=r"`masks\['b'\]` must have shape \(2, 2\), got \(4,\)"):
        pruning.mask_lowest(SCORES, {**FULL, "b": jnp.ones(4, bool)}, 1)
    with pytest.raises(TypeError, match=r"`masks\['b'\]` must be boolean, .* got float32"):
        pruning.mask_lowest(SCORES, {**FULL, "b": jnp.ones((2, 2))}, 1)
