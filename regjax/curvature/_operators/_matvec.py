"""A matrix of which the product is given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from regjax import _checks, _jaxprs, _loops, _numerics, _programs
from regjax._arguments import checked
from regjax._base import MatVec, Params, Tree
from regjax._programs import Program
from regjax._sharding import Placement, find
from regjax._space import Space
from regjax.curvature._operators._operator import Operator, Submatrix
from regjax.curvature._operators._traced import TracedOperator
from regjax.curvature._precision import precision

# Relative difference of A(u + v) from A u + A v, and of u' A v from v' A u, beyond which a product
# is refused, and units of its rounding that come to it.
_DIFFERENCE, _UNITS = 3e-3, 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["linear_map", "example"],
    meta_fields=["placement", "is_positive"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class MatvecOperator(TracedOperator):
    """A matrix of which the product is given.

    Attributes:
      linear_map: v -> A v on trees.
      example: a tree like a vector, of which only structure, shapes and dtypes count.
      placement: where its arrays lie if they are on several devices; else None.
      is_positive: whether it is positive semi-definite by construction.
    """

    linear_map: Program
    example: Params
    placement: Placement | None
    is_positive: bool = False

    @property
    def home(self) -> Mesh | None:
        return None if self.placement is None else self.placement.home

    @property
    def space(self) -> Space:
        return Space.at(self.example, self.placement)

    def apply(self, tree: Params) -> Params:
        return self.linear_map(tree)

    def facts(self) -> dict[str, Tree]:
        traced = jax.make_jaxpr(MatvecOperator.apply)(*_programs.structs((self, self.space.like())))
        text = _jaxprs.describe(traced, lasting=True).text[:16]
        return {"linear_map": self.linear_map, "program": text}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Submatrix(self, inside)


@checked
def from_matvec(matvec: MatVec, like: Params) -> Operator:
    """Makes an operator from any symmetric product.

    Whether the product is linear and symmetric is tried once on two random vectors, at the cost of
    three products. It is not tried inside of `jax.jit`, where no numbers can be read, nor if `like`
    has shapes alone.

    Example:
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> operator = curvature.from_matvec(lambda v: matrix @ v, jnp.zeros(2))
      >>> print(curvature.exact_spectrum(operator))
      [1. 3.]

    Args:
      matvec: v -> A v on trees (or arrays) like `like`; traceable by JAX. It is traced now: later
        changes of what it closes over do not count.
      like: an example of a vector: a tree or an array of real floating point.

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      TypeError: a leaf of `like` is not real floating point, or the product is complex.
      ValueError: the product has another structure or other shapes than `like`, or it is not
        linear, or not symmetric, by more than 0.3 % and 16 units of rounding of its narrowest type.
    """
    return matvec_operator(matvec, like)


def matvec_operator(matvec: MatVec, like: Params, *, is_positive: bool = False) -> MatvecOperator:
    """As `from_matvec`; `is_positive` says that the matrix is positive semi-definite."""
    _checks.floating_tree("like", like)
    with precision():
        linear_map = _programs.share(_programs.trace(matvec, (like,)))
    image = linear_map.outputs(like)
    _checks.same_tree("matvec(vector)", image, like)
    _checks.real_tree("matvec(vector)", image)
    placement = find((), like, linear_map)
    if placement is not None:
        linear_map, like = placement.replicate((linear_map, like))
    operator = MatvecOperator(linear_map, like, placement, is_positive)
    _check_symmetric(operator)
    return operator


def _check_symmetric(operator: MatvecOperator) -> None:
    """Raises if the product is seen not to be a symmetric matrix's; NaN shows nothing."""
    # Where shapes stand for a vector nothing is to be computed: of an estimate of memory, say.
    is_shape = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(operator))
    if is_shape or not _loops.is_concrete(operator):
        return
    space = operator.space
    one, other = (space.normal(key) for key in jax.random.split(jax.random.key(0)))
    try:
        images = [operator.product(vector) for vector in (one, other, one + other)]
    except jax.errors.JaxRuntimeError:
        return  # out of memory perhaps: whoever makes products has the words for it
    numbers = _compared(space, one, other, images)
    if not _loops.is_concrete(numbers):
        return  # called while a function is traced that it does not depend on
    not_linear, not_symmetric = map(float, numbers)
    limit = _DIFFERENCE + _UNITS * operator.eps
    if not_linear > limit:
        raise ValueError(
            "`matvec` must be linear, got A(u + v) that differs from A u + A v by "
            f"{not_linear:.2g} of their norms for random u and v."
        )
    if not_symmetric > limit:
        raise ValueError(
            "`matvec` must be symmetric, got u'A v that differs from v'A u by "
            f"{not_symmetric:.2g} of the norms of A u and A v for random u and v."
        )


@functools.partial(jax.jit, static_argnums=0)
def _compared(
    space: Space, one: jax.Array, other: jax.Array, images: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """How far from linear and from symmetric, relative to the images; both ()."""
    of_one, of_other, of_sum = images
    # Of images of any size no square under- or overflows.
    power = _numerics.power_of_two(jnp.max(jnp.abs(of_one)) + jnp.max(jnp.abs(of_other)))
    of_one, of_other, of_sum = (image * power for image in (of_one, of_other, of_sum))
    norms = space.norm(of_one) + space.norm(of_other)
    gap = space.norm(of_sum - of_one - of_other)
    skew = jnp.abs(space.inner(one, of_other) - space.inner(other, of_one))
    return _numerics.divide(gap, norms), _numerics.divide(skew, norms)
