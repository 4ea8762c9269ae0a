"""The preconditioner of an adaptive optimiser, read from its state."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regjax import _checks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Params, Tree
from regjax._nnx import plain
from regjax._printing import legible
from regjax.diagnostics._optimizers import Hyperparams, Root, numbers_of, optimizer_of

# What makes other steps of them, as all do that `optax.contrib` keeps a state for.
_OTHERS = ("EmaState", "LookaheadState", "AddNoiseState", "FactoredState")
# What has no numbers of its own.
_STATELESS = ("EmptyState", "MaskedState")
_CONTRIB = "optax.contrib"
# A second moment is at the floor where its root is below so many epsilons.
_FLOOR = 10


@legible
class PreconditionerResult(NamedTuple):
    """The diagonal preconditioner P of an optimiser, as its last update had it.

    Attributes:
      inverse_root: tree like the parameters, in float32 at least: P^(-1/2), and zero where the
        optimiser has no second moments. The preconditioned matrix is
        `hessian.scaled(inverse_root)`.
      at_floor: tree of bools: whether the root of the second moment is below 10 epsilon, so that
        epsilon matters.
      covers_all: (), bool: the optimiser has second moments of all leaves. Other leaves count as
        frozen.
    """

    inverse_root: Params
    at_floor: Params
    covers_all: jax.Array


@checked
def preconditioner(
    optimizer_state: Tree,
    params: Params,
    *,
    optimizer: str,
    hyperparams: Hyperparams | None = None,
) -> PreconditionerResult:
    """Finds the preconditioner P of an adaptive optimiser in its state.

    The update of such an optimiser is minus the learning rate times P^(-1) g, for the gradient g or
    a mean of gradients. For Adam after t updates, with second moments v,

        P = (1 - b1^t) (sqrt(v / (1 - b2^t) + eps_root) + eps)

    where the first factor corrects the mean of gradients. Other optimisers have epsilon where optax
    has it.

    The state may be part of `chain`, `masked`, `partition`, `inject_hyperparams`, `MultiSteps` or
    `apply_if_finite`, and that of `nnx.Optimizer` (its `opt_state`). You must say which optimiser
    it is, because Adam, RAdam, Yogi and Adamax have the same state, and with which numbers it was
    made, unless `inject_hyperparams` keeps them. Among these a wrong name gives a wrong result.
    Further transformations in the optimiser's own chain, such as LAMB's trust ratio, are refused.

    Example:
      >>> tx, params = optax.adam(0.1), jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jnp.array([1.0, 2.0]), tx.init(params), params)
      >>> result = diagnostics.preconditioner(state, params, optimizer="adam")
      >>> print(1.0 / result.inverse_root**2)  # (1 - 0.9) |g|, after one update
      [0.1 0.2]

    Args:
      optimizer_state: state of optax, after an update.
      params: tree of parameters that the optimiser moves.
      optimizer: name of its function in optax, such as "adam": one with second moments of those
        that `stability_threshold` lists.
      hyperparams: the numbers that it was made with, by optax's names. Missing ones are read from
        the state or have optax's defaults.

    Returns:
      A `PreconditionerResult`. Second moments from mini-batches contain the noise of the gradient,
      and are larger than those of the gradient on all examples.

    Raises:
      ValueError: the optimiser is not known or has no second moments; the state has seen no update,
        or holds no second moments, several for a leaf, or those of other parameters; or a number is
        out of its range.
      TypeError: `hyperparams` is not a mapping of numbers.

    References:
      J. Cohen et al. (2022), arXiv:2207.14484, on preconditioned sharpness. P follows from optax's
      update rules.
    """
    known = optimizer_of(optimizer)
    root = known.root
    if root is None:
        raise ValueError(f"`optimizer` must have second moments, got {optimizer!r}.")
    leaves, treedef = jax.tree.flatten(params)
    optimizer_state, params = plain(optimizer_state), plain(params)
    check_chain(optimizer_state, optimizer, hyperparams)
    roots: list[Root | None] = [None] * len(leaves)
    for state, found in _states(optimizer_state, known.states, {}, optimizer):
        numbers = numbers_of(optimizer, found, hyperparams)
        _check_count(state)
        for i, moments in enumerate(_moments(state, params)):
            if moments is None:
                continue
            if roots[i] is not None:
                path, _ = jax.tree_util.tree_leaves_with_path(params)[i]
                raise ValueError(
                    "`optimizer_state` must hold one second moment for each leaf, got two for "
                    f"`params{jax.tree_util.keystr(path)}`."
                )
            roots[i] = root(state, moments, numbers)
    if not any(roots):
        names = [known.__name__ for known in _types(optimizer_state)]
        raise ValueError(
            f"`optimizer_state` must hold second moments of {optimizer} "
            f"({' or '.join(known.states)}), got "
            f"{', '.join(names) or type(optimizer_state).__name__}."
        )
    inverse_roots = [_inverse_root(leaf, root) for leaf, root in zip(leaves, roots, strict=True)]
    floors = [
        jnp.zeros(jnp.shape(leaf), bool) if root is None else root.deviation < _FLOOR * root.floor
        for leaf, root in zip(leaves, roots, strict=True)
    ]
    return PreconditionerResult(
        jax.tree.unflatten(treedef, inverse_roots),
        jax.tree.unflatten(treedef, floors),
        jnp.bool_(all(root is not None for root in roots)),
    )


def _inverse_root(leaf: jax.Array, root: Root | None) -> jax.Array:
    if root is None:
        return jnp.zeros(jnp.shape(leaf), _tree.wide_dtype(leaf))
    return _numerics.divide(1, jnp.sqrt(root.divisor), otherwise=jnp.inf)


def check_chain(optimizer_state: Tree, optimizer: str, hyperparams: Hyperparams | None) -> None:
    """Checks that the state is that of the optimiser, as far as its types tell.

    Raises:
      ValueError: something in it makes other steps, or has a momentum that is not told.
    """
    optimizer_state = plain(optimizer_state)
    types, own = _types(optimizer_state), optimizer_of(optimizer).states
    names = [known.__name__ for known in types]
    for known, name in zip(types, names, strict=True):
        scales = name.startswith("ScaleBy") and name not in (*own, "ScaleByScheduleState")
        if own and not set(own) & set(names):
            continue  # which is what is missing
        if scales or name in _OTHERS or known.__module__.startswith(_CONTRIB):
            raise ValueError(
                f"`optimizer_state` must be that of {optimizer}, whose threshold is known, got "
                f"{name} in it."
            )
    most = _num_behind(optimizer)
    if own and (count := _most_behind(optimizer_state, own)) > most:
        raise ValueError(
            f"`optimizer_state` must be that of {optimizer} alone, got {count} transformations "
            f"behind its second moments, where {optimizer} has {most}: a trust ratio, as in lamb, "
            "weight decay or clipping makes other steps."
        )
    numbers = numbers_of(optimizer, stated_numbers(optimizer_state, optimizer), hyperparams)
    is_told, is_there = numbers.get("momentum") is not None, "TraceState" in names
    if is_there and not is_told:
        raise ValueError(
            f"`optimizer_state` must have no momentum unless `hyperparams` of {optimizer} say "
            "so, got TraceState in it."
        )
    if is_told and not is_there:
        raise ValueError(
            f"`optimizer_state` must have the momentum {numbers['momentum']}, got no TraceState "
            "in it."
        )


def stated_numbers(optimizer_state: Tree, optimizer: str) -> Hyperparams:
    """The numbers that `inject_hyperparams` keeps for the optimiser, those of its first state."""
    optimizer_state = plain(optimizer_state)
    names = optimizer_of(optimizer).states
    holders = (
        _states(optimizer_state, names, {}, optimizer) if names else _injected(optimizer_state)
    )
    return next((found for _, found in holders), {})


def _states(
    tree: Tree, names: tuple[str, ...], found: Hyperparams, optimizer: str
) -> Iterator[tuple[Any, Hyperparams]]:
    """Each state of a type of these names, with what the `inject_hyperparams` around it keep."""
    nodes = jax.tree.leaves(
        tree, is_leaf=lambda node: type(node).__name__ in names or _is_injected(node)
    )
    for node in nodes:
        if type(node).__name__ in names:
            yield node, found
        elif _is_injected(node):
            yield from _states(node.inner_state, names, {**found, **node.hyperparams}, optimizer)


def _injected(tree: Tree) -> Iterator[tuple[Any, Hyperparams]]:
    for node in jax.tree.leaves(tree, is_leaf=_is_injected):
        if _is_injected(node):
            yield node, node.hyperparams


def _is_injected(node: object) -> bool:
    return isinstance(getattr(node, "hyperparams", None), Mapping) and hasattr(node, "inner_state")


def _check_count(state: Any) -> None:
    count = _checks.host_value(state.count) if "count" in state._fields else None
    if count is not None and count < 1:
        raise ValueError(
            f"`optimizer_state` must have seen an update, got {count}: the second moments are zero."
        )


def _moments(state: Any, params: Params) -> list[Mapping[str, jax.Array] | None]:
    """For each leaf of the parameters its moments by their name in the state; None: left out."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    columns = {}
    for name in ("mu", "nu", "nu_max", "sum_of_squares"):
        tree = getattr(state, name, None)
        if tree is not None:
            columns[name] = _checks.prefix_leaves(
                "optimizer_state", tree, params, is_leaf=is_masked
            )
    rows: list[Mapping[str, jax.Array] | None] = []
    for path_and_leaf, *entries in zip(
        jax.tree_util.tree_leaves_with_path(params), *columns.values(), strict=True
    ):
        path, leaf = path_and_leaf
        if any(map(is_masked, entries)):
            rows.append(None)
            continue
        for entry in entries:
            if jnp.shape(entry) != jnp.shape(leaf):
                raise ValueError(
                    f"`optimizer_state` must be of `params{jax.tree_util.keystr(path)}` of shape "
                    f"{jnp.shape(leaf)}, got second moments of shape {jnp.shape(entry)}."
                )
        rows.append(dict(zip(columns, map(_tree.wide, entries), strict=True)))
    return rows


@functools.cache
def _num_behind(optimizer: str) -> int:
    """How many transformations that keep no numbers optax puts behind the second moments."""
    state = getattr(optax, optimizer)(1.0).init(np.zeros((), np.float32))
    return _most_behind(state, optimizer_of(optimizer).states)


def _most_behind(tree: Tree, names: tuple[str, ...]) -> int:
    """How many follow a state of these names in its own chain: they have no types to tell them."""
    counts = [0]
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        own = [type(node).__name__ for node in tree]
        first = next((i for i, name in enumerate(own) if name in names), None)
        if first is not None:
            counts.append(sum(name in _STATELESS for name in own[first:]))
    parts = [part for part in _below(tree) if not jax.tree_util.all_leaves([part])]
    return max(counts + [_most_behind(part, names) for part in parts])


def _types(tree: Tree) -> list[type]:
    """The types of the states within, from the outside inwards."""
    types: list[type] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop(0)
        if hasattr(node, "_fields") and type(node) not in types:
            types.append(type(node))
        waiting.extend(part for part in _below(node) if not jax.tree_util.all_leaves([part]))
    return types


def _below(node: Tree) -> list[Tree]:
    """The nodes directly below."""
    return jax.tree.leaves(node, is_leaf=lambda part: part is not node)
