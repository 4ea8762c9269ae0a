"""How many are removed when, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import pruning


def test_linear_removal_by_hand():
    count = functools.partial(pruning.linear_removal, every=10, num_each=4, total=10)
    assert [int(count(step)) for step in (0, 9, 10, 19, 20, 30, 10**9)] == [0, 0, 4, 4, 8, 10, 10]
    late = functools.partial(count, begin=5)
    assert [int(late(step)) for step in (0, 14, 15)] == [0, 0, 4]
    # Rounds times units beyond int32.
    large = pruning.linear_removal(2_000_000_000, every=1, num_each=1000, total=3000)
    assert int(large) == 3000


def test_cubic_removal_is_the_papers_formula():
    settings = {"num_units": 10_000, "final": 0.8, "initial": 0.1, "every": 5, "num_rounds": 4}
    count = functools.partial(pruning.cubic_removal, **settings, begin=10)
    for i in range(5):
        share = 0.8 + (0.1 - 0.8) * (1 - 5 * i / (4 * 5)) ** 3
        for step in (10 + 5 * i, 14 + 5 * i):
            assert int(count(step)) == round(10_000 * share)
    assert int(count(9)) == 0
    assert int(count(10**6)) == 8000


def test_schedules_follow_a_traced_step():
    linear = jax.jit(functools.partial(pruning.linear_removal, every=2, num_each=3, total=8))
    steps = jnp.arange(8, dtype=jnp.int32)
    found = jax.vmap(linear)(steps)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [0, 0, 3, 3, 6, 6, 8, 8])
    cubic = functools.partial(pruning.cubic_removal, num_units=10, final=0.5, every=2, num_rounds=2)
    np.testing.assert_array_equal(jax.vmap(cubic)(steps), [int(cubic(int(step))) for step in steps])


def test_a_schedule_and_masks_in_one_program():
    scores = {"a": jnp.arange(6.0), "b": jnp.arange(6.0) + 0.5}

    @jax.jit
    def step(masks, i):
        target = pruning.linear_removal(i, every=1, num_each=2, total=7)
        return pruning.mask_lowest(scores, masks, pruning.num_missing(masks, target))

    masks, counts = pruning.full_masks(scores), []
    for i in range(6):
        masks = step(masks, jnp.int32(i))
        counts.append(int(sum(jnp.sum(~mask) for mask in masks.values())))
    assert counts == [0, 2, 4, 6, 7, 7]
    assert step._cache_size() == 1
    assert int(pruning.num_missing(masks, 3)) == 0


def test_average_over_rounds():
    rounds = [{"a": jnp.asarray([value])} for value in (1.0, 2.0, 4.0)]
    average = None
    for scores in rounds:
        average = pruning.average_scores(average, scores, decay=0.75)
    np.testing.assert_allclose(average["a"], 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)


def test_error_texts():
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        pruning.linear_removal(3, every=0, num_each=1, total=1)
    with pytest.raises(TypeError, match="`step` must be one integer, got float32"):
        pruning.linear_removal(jnp.float32(3), every=1, num_each=1, total=1)
    with pytest.raises(ValueError, match="`final` must be between 0 and 1, got 50"):
        pruning.cubic_removal(0, num_units=5, final=50, every=1, num_rounds=1)
    with pytest.raises(ValueError, match="`decay` must be below 1, got 1"):
        pruning.average_scores(None, {"a": jnp.ones(2)}, decay=1.0)
    with pytest.raises(ValueError, match=r"`previous\['a'\]` must have shape \(2,\)"):
        pruning.average_scores({"a": jnp.ones(3)}, {"a": jnp.ones(2)})
