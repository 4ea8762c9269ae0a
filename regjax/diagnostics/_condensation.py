"""Condensation: how few directions the neurons of a layer point in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _layouts, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._axes import Layout
from regjax._printing import legible


@legible
class CondensationResult(NamedTuple):
    """The directions of a layer's m neurons.

    Attributes:
      cosines: (m, m), cosine of each pair; 0 if one of the two is dropped, also on the diagonal,
        and NaN if one is not finite.
      effective_number: (), int32, number of directions that stand for all neurons that are not
        dropped; -1 if a weight is NaN or infinite.
      effective_ratio: (), `effective_number` over m, dropped neurons included; NaN if a weight is
        NaN or infinite.
      norms: (m,), norms of the neurons' vectors.
    """

    cosines: jax.Array
    effective_number: jax.Array
    effective_ratio: jax.Array
    norms: jax.Array


@checked
def condensation(
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    threshold: float = 0.95,
    min_norm: ArrayLike = 0.0,
    layout: Layout | None = None,
) -> CondensationResult:
    """Counts the directions in which the neurons of a layer point.

    A network condenses if many neurons of a layer have nearly parallel weights. The vector of a
    neuron is that of its incoming weights and its bias. Two neurons are parallel if the cosine of
    their vectors is above `threshold`; opposite neurons are not. `effective_number` is the number
    of neurons that are needed so that each neuron is parallel to one of them. They are chosen in
    the order of decreasing norm: a neuron that is parallel to no earlier choice is chosen. The
    number is therefore an upper bound of the least possible one, and it does not depend on the
    order of the neurons.

    Example:
      >>> kernel = jnp.array([[1.0, 2.0, 0.0], [0.0, 0.1, 1.0]])  # two of three are parallel
      >>> result = diagnostics.condensation(kernel)
      >>> print(result.effective_number, f"{result.effective_ratio:.2f}")
      2 0.67

    Args:
      kernel: (inputs, m) of a dense layer, that of a convolution, or as `layout` says. Its m
        outputs are the neurons.
      bias: (m,), or None.
      threshold: cosine above which two neurons are parallel, between -1 and 1.
      min_norm: neurons of at most this norm are dropped, because they need no direction. 0 drops
        neurons of zeros. May be traced.
      layout: which axes of the kernel are inputs and which are neurons; None: neurons are last. If
        layers are stacked, `jax.vmap` this function over them.

    Returns:
      A `CondensationResult`.

    Raises:
      ValueError: the shapes do not fit, `threshold` is not between -1 and 1, or `min_norm` is
        negative.

    References:
      Z. Zhang, Z.-Q. Xu (2024), Implicit regularization of dropout, arXiv:2207.05952: the
      cosine of 0.95 and the effective ratio. The choice in order of the norm and `min_norm` are
      ours.
    """
    kernel = _checks.floating_array("kernel", kernel)
    axes = _layouts.of_array("kernel", layout, kernel)
    if not axes.is_kernel or 0 in jnp.shape(kernel):
        raise ValueError(f"`kernel` must have shape (..., m), got {jnp.shape(kernel)}.")
    (matrix,) = axes.single("kernel").matrices(kernel)
    width = matrix.shape[1]
    if bias is not None and jnp.shape(_checks.floating_array("bias", bias)) != (width,):
        raise ValueError(f"`bias` must have shape ({width},), got {jnp.shape(bias)}.")
    _checks.between("threshold", threshold, -1, 1)
    _checks.non_negative("min_norm", min_norm, finite=True)
    vectors = _tree.wide(matrix)
    if bias is not None:
        vectors = jnp.concatenate([vectors, _tree.wide(bias).astype(vectors.dtype)[None]])
    # Each neuron by a power of two of its own, so that no square under- or overflows.
    powers = _numerics.power_of_two(jnp.max(jnp.abs(vectors), 0, initial=0))
    vectors = vectors * jnp.where(powers > 0, powers, 1)[None]
    lengths = jnp.sqrt(jnp.sum(vectors**2, 0))
    norms = lengths / jnp.where(powers > 0, powers, 1)
    kept = ~(norms <= min_norm)  # what is NaN is not dropped
    units = _numerics.divide(vectors, lengths[None], where=kept[None])
    cosines = jnp.matmul(units.T, units, precision="highest")
    is_known = jnp.all(jnp.isfinite(norms))
    number = jnp.where(is_known, _greedy_cover(cosines > threshold, norms, kept), -1)
    ratio = jnp.where(is_known, number.astype(norms.dtype) / width, jnp.nan)
    return CondensationResult(cosines, number, ratio, norms)


def _greedy_cover(parallel: jax.Array, norms: jax.Array, kept: jax.Array) -> jax.Array:
    order = jnp.argsort(-norms)
    start = (~kept, jnp.int32(0))
    return _loops.scan(_visit, start, len(norms), operands=(order, parallel))[1]


def _visit(
    operands: tuple[jax.Array, jax.Array], carry: tuple[jax.Array, jax.Array], i: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (order, parallel), (covered, number) = operands, carry
    neuron = order[i]
    stands = ~covered[neuron]
    return covered | (stands & parallel[neuron]), number + stands.astype(jnp.int32)
