"""Sizes and wide sums of trees, groups of weights: what `optax.tree` lacks."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def size(tree: Any) -> int:
    """Number of scalars in `tree`."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def vector_dtype(tree: Any) -> jnp.dtype:
    """Type of the flat vector of `tree`: the widest of its leaves, float32 at least."""
    return widest(jnp.result_type(leaf) for leaf in jax.tree.leaves(tree))


def widest(dtypes: Iterable[Any]) -> jnp.dtype:
    """The widest of some floating-point dtypes, float32 at least."""
    return max([jnp.dtype(jnp.float32), *dtypes], key=lambda dtype: jnp.finfo(dtype).bits)


def wide(array: ArrayLike) -> jax.Array:
    """`array` in float32 at least, for sums, norms and perturbations."""
    array = jnp.asarray(array)
    return array.astype(wide_dtype(array))


def wide_dtype(array: ArrayLike) -> jnp.dtype:
    """The dtype of `array`, float32 at least."""
    dtype = jnp.result_type(array)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def inner(one: Any, other: Any) -> jax.Array:
    """The inner product of two trees of the same structure, in float32 at least."""
    dtype = vector_dtype(one)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    products = [jnp.sum(wide(a) * wide(b)).astype(dtype) for a, b in pairs]
    return functools.reduce(jnp.add, products, jnp.zeros((), dtype))


def mean_rows(rows: jax.Array) -> jax.Array:
    """The mean over the leading axis, as a product: XLA on CPU takes 30 times as long for a sum."""
    weights = jnp.full(len(rows), 1 / len(rows), rows.dtype)
    return jnp.tensordot(weights, rows, 1, precision="highest")


def partition(tree: Any, inside: Iterable[bool]) -> tuple[Any, Any]:
    """The leaves that are inside and the others, each with None in the place of the rest."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(leaves, inside, strict=True))
    ours = jax.tree.unflatten(treedef, [leaf if here else None for leaf, here in pairs])
    return ours, jax.tree.unflatten(treedef, [None if here else leaf for leaf, here in pairs])


def merge(one: Any, other: Any) -> Any:
    """`one` with the leaves of `other` where it has None."""
    return jax.tree.map(
        lambda ours, theirs: theirs if ours is None else ours,
        one,
        other,
        is_leaf=lambda node: node is None,
    )
