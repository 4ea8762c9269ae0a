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
      cosines: (m, m), of each pair; 0 where one of the two is dropped, on the diagonal as well, and
        NaN where one is not finite.
      effective_number: (), int32, neurons whose directions stand for all that are not dropped; -1
        if a weight is NaN or infinite.
      effective_ratio: (), it over m, the dropped ones counted; NaN likewise.
      norms: (m,), of the neurons' vectors.
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
    """Counts the directions of a layer's neurons, each one its incoming weights and bias.

    Two neurons are parallel if the cosine of their vectors is above `threshold`; opposite ones are
    not. The effective number is that of neurons whose neighbourhoods cover all others. The least
    such number is hard to find in general: ours is greedy in the order of decreasing norm (a neuron
    that no earlier one covers stands for itself and all parallel to it), so that it is a bound from
    above, and the same for every order of the neurons.

    Example:
      >>> kernel = jnp.array([[1.0, 2.0, 0.0], [0.0, 0.1, 1.0]])  # two of three are parallel
      >>> result = diagnostics.condensation(kernel)
      >>> print(result.effective_number, f"{result.effective_ratio:.2f}")
      2 0.67

    Args:
      kernel: (inputs, m) of a dense layer, or a convolution's; or as `layout` says. Its outputs are
        the neurons, m of them.
      bias: (m,), or None.
      threshold: of the cosine, between -1 and 1.
      min_norm: neurons of at most this norm are dropped: they need no direction. With 0 those that
        are zero. May be traced.
      layout: which axes of the kernel are inputs and which the neurons; None: these are last. Of
        stacked layers each one is a kernel of its own: `jax.vmap` this function over them.

    Returns:
      A `CondensationResult`.

    Raises:
      ValueError: the shapes do not fit, `threshold` is not between -1 and 1, or `min_norm` is
        negative.

    References:
      Z. Zhang, Z.-Q. Xu (2024), Implicit regularization of dropout, arXiv:2207.05952: the
      cosine of 0.95 and the effective ratio. The greedy cover is ours, and that its directions are
      those of neurons; so is `min_norm`.
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
