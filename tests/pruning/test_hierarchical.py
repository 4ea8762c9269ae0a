"""Plans: the cheapest directions first, never below the rank, never above the budget."""

import jax.numpy as jnp
import numpy as np
import pytest

from regjax import pruning


def result(values, num_examples=50, **changes):
    """Of a group with these singular values in random directions."""
    random = np.random.default_rng(len(values))
    left = np.linalg.qr(random.normal(size=(num_examples, len(values))))[0]
    right = np.linalg.qr(random.normal(size=(len(values), len(values))))[0]
    matrix = jnp.asarray(left * np.asarray(values) @ right, jnp.float32)
    return pruning.gradient_redundancy(matrix)._replace(**changes)


# Thresholds at 0.01 of the largest: ranks 2, 1 and 3.
RESULTS = {
    "a": result([10.0, 5.0, 0.05, 0.01]),
    "b": result([10.0, 0.08, 0.04, 0.02]),
    "c": result([10.0, 9.0, 8.0]),
}


def test_plan_by_hand():
    assert [int(found.rank) for found in RESULTS.values()] == [2, 1, 3]
    equal = dict.fromkeys(RESULTS, 1.0)
    # Squares in order: a 0.01, b 0.02, b 0.04, a 0.05, b 0.08.
    plans = [pruning.hierarchical_plan(RESULTS, equal, budget=budget) for budget in range(7)]
    assert [tuple(plan.values()) for plan in plans] == [
        (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 2, 0), (2, 3, 0), (2, 3, 0),
    ]  # fmt: skip
    # Error per cost: at 100 a unit those of b come first.
    plan = pruning.hierarchical_plan(RESULTS, {"a": 1.0, "b": 100.0, "c": 1.0}, budget=200)
    assert plan == {"a": 0, "b": 2, "c": 0}
    # The second b does not fit, both a do.
    plan = pruning.hierarchical_plan(RESULTS, {"a": 1.0, "b": 100.0, "c": 1.0}, budget=199)
    assert plan == {"a": 2, "b": 1, "c": 0}


def test_plans_keep_the_rank_and_the_budget():
    random = np.random.default_rng(3)
    for _ in range(30):
        results = {
            name: result(np.sort(10 ** random.uniform(-4, 1, size=size))[::-1])
            for name, size in (("a", 5), ("b", 8), ("c", 2))
        }
        costs = dict(zip(results, random.uniform(1, 5, size=3), strict=True))
        budget = float(random.uniform(0, 30))
        plan = pruning.hierarchical_plan(results, costs, budget=budget)
        assert sum(costs[name] * number for name, number in plan.items()) <= budget
        for name, number in plan.items():
            assert 0 <= number <= int(results[name].num_units) - int(results[name].rank)


def test_results_that_say_nothing_are_left_alone():
    few = result([10.0, 0.01], has_enough_examples=jnp.bool_(False))
    vanishing = pruning.gradient_redundancy(jnp.zeros((9, 3)))
    plan = pruning.hierarchical_plan({"a": few, "b": vanishing}, {"a": 1.0, "b": 1.0}, budget=100)
    assert plan == {"a": 0, "b": 0}


def test_planned_units_are_those_with_the_lowest_scores():
    scores = {"a": jnp.asarray([3.0, 1.0, 2.0]), "b": jnp.asarray([0.1, 0.2])}
    masks = pruning.mask_planned({"a": 2, "b": 0}, scores, pruning.full_masks(scores))
    np.testing.assert_array_equal(masks["a"], [True, False, False])
    np.testing.assert_array_equal(masks["b"], [True, True])


def test_error_texts():
    costs = dict.fromkeys(RESULTS, 1.0)
    with pytest.raises(ValueError, match=r"`costs` must have the groups of `results`.*got \['a'\]"):
        pruning.hierarchical_plan(RESULTS, {"a": 1.0}, budget=3)
    with pytest.raises(ValueError, match=r"`costs\['b'\]` must be positive, got 0"):
        pruning.hierarchical_plan(RESULTS, {**costs, "b": 0}, budget=3)
    with pytest.raises(ValueError, match="`budget` must be non-negative, got -1"):
        pruning.hierarchical_plan(RESULTS, costs, budget=-1)
    scores = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match="`scores` must have the groups of `plan`"):
        pruning.mask_planned({"b": 1}, scores, pruning.full_masks(scores))
    with pytest.raises(ValueError, match="`num_to_remove` must be at most 2"):
        pruning.mask_planned({"a": 3}, scores, pruning.full_masks(scores))
