"""Hierarchical pruning: first how many units of which layer, then which units inside of it."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np

from regjax import _checks
from regjax._arguments import checked
from regjax.pruning._gates import Units
from regjax.pruning._masks import mask_lowest
from regjax.pruning._redundancy import RedundancyResult

_Known = TypeVar("_Known")


@checked
def hierarchical_plan(
    results: Mapping[str, RedundancyResult], costs: Mapping[str, float], *, budget: float
) -> dict[str, int]:
    """Plans how many units each group should lose in a round of pruning.

    `gradient_redundancy` finds for each group the singular values sigma of its per-example
    gradients, one for each direction in the space of its gates. On N examples the loss rises by
    about

        sigma^2 / (2 N)

    if a direction is removed, which takes a unit. The plan removes one direction after the other,
    always the weakest one left of the group where this has the least predicted error per cost, as
    long as the cost fits into what is left of the budget. No group falls below its rank or below
    one unit. Groups with too few examples or with a vanishing gradient keep all units, because
    their rank says nothing.

    This is one round of several: remove the units with the lowest scores (`mask_planned`), train
    on, and measure again.

    Example:
      >>> a = jnp.diag(jnp.array([3.0, 2.0, 0.0]))  # gradients of three examples at three units
      >>> b = jnp.diag(jnp.array([3.0, 0.0, 0.0]))
      >>> results = {"a": pruning.gradient_redundancy(a), "b": pruning.gradient_redundancy(b)}
      >>> print(pruning.hierarchical_plan(results, {"a": 1.0, "b": 10.0}, budget=15.0))
      {'a': 1, 'b': 1}

    Args:
      results: {group: `RedundancyResult`} from `gradient_redundancy`, outside `jit`.
      costs: {group: cost of one of its units}, above 0, in any measure such as FLOPs or parameters.
        The costs count as constant during the round.
      budget: the most cost to save in this round, in the same measure.

    Returns:
      {group: number of units to remove}.

    Raises:
      ValueError: the groups of `costs` are others, a cost is not positive, `budget` is negative, or
        a result is not finite.
      TypeError: an argument is traced, or a result not from `gradient_redundancy`.

    References:
      Z. Zhou, L. Lian, Y. Yin, Z. Wang (2022), arXiv:2206.03596. The greedy order, the budget and
      the floor are ours.
    """
    for name, given in (("results", results), ("costs", costs)):
        _check_mapping(name, given)
    if set(costs) != set(results):
        raise ValueError(
            f"`costs` must have the groups of `results`, {sorted(results)}, got {sorted(costs)}."
        )
    for name, cost in costs.items():
        _checks.number(f"costs[{name!r}]", cost, above_zero=True)
        _concrete(f"costs[{name!r}]", cost)
    for name, result in results.items():
        _check_result(name, result)
    left = _concrete("budget", _checks.number("budget", budget))
    # A group's own directions come weakest first, as they fall; ties go in the order of `results`.
    offers = sorted(
        (error / costs[name], place, name)
        for name, result in results.items()
        for place, error in enumerate(_predicted_errors(result))
    )
    plan = dict.fromkeys(results, 0)
    for _, place, name in offers:
        # In order, or not at all: behind one that does not fit none of its group does.
        if plan[name] == place and costs[name] <= left:
            plan[name] += 1
            left -= costs[name]
    return plan


def mask_planned(plan: Mapping[str, int], scores: Units, masks: Units) -> Units:
    """Removes from each group the planned number of units with its lowest scores.

    Example:
      >>> scores = {"a": jnp.array([0.3, 0.1, 0.2]), "b": jnp.array([0.5, 0.4])}
      >>> masks = pruning.full_masks(scores)
      >>> masks = pruning.mask_planned({"a": 2, "b": 0}, scores, masks)
      >>> print(masks["a"], masks["b"])
      [ True False False] [ True  True]

    Args:
      plan: {group: number of units to remove}, from `hierarchical_plan`.
      scores: {group: (C,)}, from `redundancy_saliency` or Taylor importance.
      masks: {group: (C,)} of bool, True for units that are still there.

    Returns:
      The new masks.

    Raises:
      ValueError: the groups differ, or a group would lose all of its units.
      TypeError: an argument is not a dict, or a number is not an integer.
    """
    for name, found in (("plan", plan), ("scores", scores), ("masks", masks)):
        _check_mapping(name, found)
        if set(found) != set(plan):
            raise ValueError(
                f"`{name}` must have the groups of `plan`, {sorted(plan)}, got {sorted(found)}."
            )
    return {
        name: mask_lowest({name: scores[name]}, {name: masks[name]}, number)[name]
        for name, number in plan.items()
    }


def _check_result(name: str, result: RedundancyResult) -> None:
    if not isinstance(result, RedundancyResult):
        raise TypeError(
            f"`results[{name!r}]` must come from `gradient_redundancy`, got a "
            f"{type(result).__name__}."
        )
    _concrete(f"results[{name!r}]", result)
    for field in ("singular_values", "rate", "smallest_null_energy"):
        _checks.finite_tree(f"results[{name!r}].{field}", getattr(result, field))


def _check_mapping(name: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"`{name}` must be a dict of groups, got a {type(given).__name__}.")


def _concrete(name: str, tree: _Known) -> _Known:
    if any(_checks.host_value(leaf) is None for leaf in jax.tree.leaves(tree)):
        raise TypeError(f"`{name}` must be concrete, as the host plans, got tracers.")
    return tree


def _predicted_errors(result: RedundancyResult) -> list[float]:
    """Lists those of the directions beyond the rank, weakest first; at least one unit stays."""
    if not result.has_enough_examples or result.is_vanishing:
        return []
    num_units, floor = int(result.num_units), max(int(result.rank), 1)
    values = np.asarray(result.singular_values, np.float64)[floor:num_units][::-1]
    return list(values**2 / (2 * int(result.num_examples)))
