"""The algebra of symmetric matrices: sums, multiples, D A D, principal submatrices.

Each stands for its product and nothing else, so that what is made of streams reads its data, and
what lies on a mesh stays there.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from regjax import _checks, _selection, _tree
from regjax._base import Mask, Params, Tree
from regjax._space import Space
from regjax.curvature._operators._products import Products


class Operator(Products):
    """A symmetric matrix over the n parameters, known by its products with vectors.

    `A @ v` and `A.matvec(v)` are the product with a tree like the parameters, `A.matmat(vectors)`
    those with several, `A.dense()` the matrix of a small one. Operators of one space have an
    algebra: `A + B`, `A - B`, `c * A`, `A + damping * identity(A.space)`, `A.scaled(diagonal)`,
    `A.restricted(mask)`. An operator is a pytree, so that it passes through `jax.jit` as an
    argument: its leaves are parameters, data and what products share, its functions are static.

    Example:
      >>> A = curvature.from_matvec(lambda v: jnp.array([3.0, 1.0]) * v, jnp.zeros(2))
      >>> print((2 * A + A) @ jnp.ones(2))
      [9. 3.]
    """

    # NumPy's scalars are not to take a product with an operator for one of arrays.
    __array_ufunc__ = None

    @abc.abstractmethod
    def submatrix(self, inside: tuple[bool, ...]) -> "Operator":
        """The principal submatrix of some leaves of the tree, True for those that stay."""

    def restricted(self, mask: Mask) -> "Operator":
        """Makes the principal submatrix of some parameters.

        Args:
          mask: the leaves that stay.

        Returns:
          An `Operator` whose vectors are trees of the same structure with None elsewhere.

        Raises:
          ValueError: the mask has another structure, or nothing stays.
          TypeError: the mask holds anything but Python bools.
        """
        inside = tuple(_selection.mask_leaves(mask, self.space.like()))
        if not any(inside):
            raise ValueError("`mask` must keep at least one leaf, got none.")
        return self.submatrix(inside)

    def scaled(self, diagonal: Params) -> "Operator":
        """Makes D A D, D the diagonal matrix of `diagonal`, a tree like the parameters.

        With the inverse square roots of a positive diagonal it is a preconditioned matrix: its
        eigenvalues are those of A with respect to the metric.

        Raises:
          ValueError: `diagonal` has another structure or other shapes than the parameters.
          TypeError: it is complex.
        """
        _checks.same_tree("diagonal", diagonal, self.space.like())
        _checks.real_tree("diagonal", diagonal)
        return Congruent(self.space.ravel(diagonal), self)

    def __add__(self, other: "Operator") -> "Operator":
        if isinstance(other, (int, float, jax.Array)):
            raise TypeError(
                "`other` must be an operator, got a number; c times the identity is "
                "`c * curvature.identity(operator.space)`."
            )
        if not isinstance(other, Operator):
            return NotImplemented
        if self.space != other.space:
            raise ValueError(
                "`other` must be an operator of the same space, got shapes "
                f"{other.space.like()} on {other.space.mesh} instead of {self.space.like()} on "
                f"{self.space.mesh}."
            )
        return Sum(self, other)

    def __sub__(self, other: "Operator") -> "Operator":
        return self + (-1) * other if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> "Operator":
        return (-1) * self

    def __mul__(self, factor: ArrayLike) -> "Operator":
        if isinstance(factor, Operator):
            return NotImplemented
        return Multiple(_factor(factor, self.dtype), self)

    __rmul__ = __mul__


def _factor(factor: ArrayLike, dtype: Any) -> jax.Array:
    kind = jnp.result_type(factor)
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(f"`factor` must be a real number, got {kind}.")
    if jnp.ndim(factor):
        raise ValueError(f"`factor` must be one number, got shape {jnp.shape(factor)}.")
    return jnp.asarray(factor, dtype)


Multiply = Callable[[Operator, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, repr=False)
class Composed(Operator):
    """Made of other operators of one space, the first of which stands for it."""

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Operator, ...]:
        """What it is made of."""

    @abc.abstractmethod
    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        """The product with a vector or with rows, by `multiply(part, vectors)` of its parts."""

    @property
    def space(self) -> Space:
        return self.parts[0].space

    @property
    def home(self) -> Mesh | None:
        return self.parts[0].home

    @property
    def takes_blocks(self) -> bool:
        return any(part.takes_blocks for part in self.parts)

    @property
    def eps(self) -> float:
        return max(part.eps for part in self.parts)

    def product(self, vector: jax.Array) -> jax.Array:
        return self.compose(lambda part, vector: part.product(vector), vector)

    def block_product(self, rows: jax.Array) -> jax.Array:
        return self.compose(lambda part, rows: part.block_product(rows), rows)

    @property
    def coarser(self) -> Products | None:
        fields = [field.name for field in dataclasses.fields(self)]
        parts = {name: getattr(self, name) for name in fields}
        parts = {name: part for name, part in parts.items() if isinstance(part, Operator)}
        coarser = {name: part.coarser for name, part in parts.items()}
        changed = {name: part for name, part in coarser.items() if part is not None}
        return dataclasses.replace(self, **changed) if changed else None

    def facts(self) -> dict[str, Tree]:
        parts = enumerate(part.facts() for part in self.parts)
        return {f"{i}.{name}": tree for i, part in parts for name, tree in part.items()}

    def product_bytes(self, count: int) -> int:
        # One part after the other, with what goes in and what comes out.
        vector = self.space.num_bytes(jax.eval_shape(lambda: self.space.zeros(count)))
        return max(part.product_bytes(count) for part in self.parts) + 2 * vector


@functools.partial(jax.tree_util.register_dataclass, data_fields=["one", "other"], meta_fields=[])
@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Composed):
    """A + B."""

    one: Operator
    other: Operator

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.one, self.other)

    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        return multiply(self.one, vectors) + multiply(self.other, vectors)

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Sum(self.one.submatrix(inside), self.other.submatrix(inside))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["factor", "operator"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Multiple(Composed):
    """c A."""

    factor: jax.Array
    operator: Operator

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)

    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        return self.factor * multiply(self.operator, vectors)

    def facts(self) -> dict[str, Tree]:
        return super().facts() | {"factor": self.factor}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Multiple(self.factor, self.operator.submatrix(inside))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["diagonal", "operator"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Congruent(Composed):
    """D A D, D diagonal; `diagonal` is a vector of the space."""

    diagonal: jax.Array
    operator: Operator

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)

    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        diagonal = self.diagonal.reshape(*[1] * (vectors.ndim - 1), -1)
        return diagonal * multiply(self.operator, diagonal * vectors)

    def facts(self) -> dict[str, Tree]:
        return super().facts() | {"diagonal": self.diagonal}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        part = subtree(self.space.unravel(self.diagonal), inside)
        return self.operator.submatrix(inside).scaled(part)


@dataclasses.dataclass(frozen=True, repr=False)
class Projected(Composed):
    """P A P': what is looked up in the trees of an operator A, with a whole product of it."""

    operator: Operator

    @abc.abstractmethod
    def taken(self, tree: Params, *, leading: int = 0) -> Params:
        """P of a tree whose leaves have so many axes in front."""

    @abc.abstractmethod
    def taken_specs(self, specs: tuple[PartitionSpec, ...]) -> tuple[PartitionSpec, ...]:
        """How the leaves of P of a tree are divided, from how those of the tree are."""

    @abc.abstractmethod
    def placed(self, tree: Params, zeros: Params) -> Params:
        """P' of a tree with one axis in front: put among zeros."""

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)

    @property
    def space(self) -> Space:
        whole = self.operator.space
        specs = self.taken_specs(whole.specs)
        return Space.of(jax.eval_shape(self.taken, whole.like()), whole.mesh, specs)

    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        if vectors.ndim == 1:
            one = lambda part, rows: multiply(part, rows[0])[None]
            return self.compose(one, vectors[None])[0]
        ours, whole = self.space, self.operator.space
        zero = lambda leaf: jnp.zeros((len(vectors), *leaf.shape), leaf.dtype)
        zeros = jax.tree.map(zero, whole.like())
        trees = self.placed(ours.unravel_rows(vectors), zeros)
        images = whole.unravel_rows(multiply(self.operator, whole.ravel_rows(trees)))
        return ours.ravel_rows(self.taken(images, leading=1))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operator"], meta_fields=["inside"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Submatrix(Projected):
    """The same for some leaves of an operator that cannot do with less than a whole product."""

    operator: Operator
    inside: tuple[bool, ...]

    def taken(self, tree: Params, *, leading: int = 0) -> Params:
        return subtree(tree, self.inside)

    def taken_specs(self, specs: tuple[PartitionSpec, ...]) -> tuple[PartitionSpec, ...]:
        return tuple(itertools.compress(specs, self.inside))  # on one device there are none

    def placed(self, tree: Params, zeros: Params) -> Params:
        return _tree.merge(tree, subtree(zeros, [not here for here in self.inside]))

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        ours = iter(inside)
        return Submatrix(self.operator, tuple(here and next(ours) for here in self.inside))


def subtree(tree: Params, inside: Sequence[bool]) -> Params:
    """`tree` with None for the leaves that are not inside."""
    return _tree.partition(tree, inside)[0]
