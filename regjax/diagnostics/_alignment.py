"""Whether two matrices, or the gradient and a few eigenvectors, point the same way."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Params, PRNGKey
from regjax._finite import check_product
from regjax._printing import legible
from regjax.curvature import Operator


@legible
class AlignmentResult(NamedTuple):
    """The cosine of two symmetric matrices A and B of order n, with its standard errors.

    Attributes:
      alignment: (), tr(A B) / (|A|_F |B|_F).
      alignment_standard_error: (), over the probes; NaN with a single probe, as are those below.
      null_alignment: (), tr A tr B / (n |A|_F |B|_F), the mean for random eigenvectors.
      null_alignment_standard_error: ().
      product_trace: (), tr(A B).
      product_trace_standard_error: ().
    """

    alignment: jax.Array
    alignment_standard_error: jax.Array
    null_alignment: jax.Array
    null_alignment_standard_error: jax.Array
    product_trace: jax.Array
    product_trace_standard_error: jax.Array


@legible
class GradientShareResult(NamedTuple):
    """How much of a gradient lies in a subspace of k dimensions.

    Attributes:
      share: (), the squared norm of its part in the subspace, over its squared norm; NaN for a
        gradient of zeros.
      shares: (k,), the same along each vector; they add up to `share` if the vectors are
        orthonormal.
      null_share: (), k / n, the share of a gradient of random direction on average.
    """

    share: jax.Array
    shares: jax.Array
    null_share: jax.Array


@checked
def operator_alignment(
    operator: Operator, other_operator: Operator, *, key: PRNGKey, num_probes: int = 32
) -> AlignmentResult:
    """Estimates the cosine of two matrices, such as a Hessian and a covariance of gradients.

        alignment = tr(A B) / (|A|_F |B|_F)

    A probe z is a vector of random signs and takes one product with each matrix. The means of
    <A z, B z>, |A z|^2 and |B z|^2 are tr(A B), |A|_F^2 and |B|_F^2. The standard errors come from
    leaving one probe out at a time. Two positive matrices that have nothing in common have a
    positive alignment too, the `null_alignment`.

    Example:
      >>> like = jnp.zeros(2)
      >>> one = curvature.from_matvec(lambda v: jnp.array([1.0, 2.0]) * v, like)
      >>> other = curvature.from_matvec(lambda v: jnp.array([2.0, 1.0]) * v, like)
      >>> result = diagnostics.operator_alignment(one, other, key=jax.random.key(0))
      >>> print(f"{result.alignment:.2f} {result.null_alignment:.2f}")  # 4 / 5 and 9 / (2 * 5)
      0.80 0.90

    Args:
      operator: A.
      other_operator: B, of the same parameters.
      key: typed key of the probes.
      num_probes: number of probes.

    Returns:
      An `AlignmentResult`; NaN if a matrix is zero.

    Raises:
      ValueError: the operators have different parameters, or `num_probes` is below 1.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`.
      TypeError: an argument is not an operator, or `key` is not a typed key.
    """
    if not isinstance(other_operator, Operator):
        raise TypeError(
            f"`other_operator` must be an operator, got {type(other_operator).__name__}."
        )
    _checks.integer("num_probes", num_probes)
    space = operator.space
    if space != other_operator.space:
        raise ValueError(
            "`other_operator` must be of the parameters of `operator`, got shapes "
            f"{other_operator.space.like()} beside {space.like()}."
        )
    signs = jax.random.rademacher(key, (num_probes, space.size), space.dtype)
    probes = space.shard(signs)
    one, other = operator.block_product(probes), other_operator.block_product(probes)
    check_product(operator, one)
    check_product(other_operator, other, name="other_operator")
    inner = lambda a, b: jnp.sum(a * b, axis=1)
    numbers = [inner(one, other), inner(one, one), inner(other, other)]
    numbers += [inner(probes, one), inner(probes, other)]
    return _from_probes(jnp.stack(numbers, 1), space.size)


@checked
def gradient_share(grads: Params, vectors: Params) -> GradientShareResult:
    """Computes the share of a gradient in a subspace, such as that of leading eigenvectors.

        share = |V g|^2 / |g|^2,   the rows of V orthonormal

    Example:
      >>> grads, vectors = jnp.array([3.0, 4.0]), jnp.array([[1.0, 0.0]])
      >>> print(diagnostics.gradient_share(grads, vectors))
      GradientShareResult(share=0.36, shares=[0.36], null_share=0.5)

    Args:
      grads: the gradient g, a tree of n numbers.
      vectors: tree like `grads` with a leading axis k, such as the `vectors` of
        `curvature.top_eigenpairs`. They must be linearly independent, and are made orthonormal.

    Returns:
      A `GradientShareResult`. Check before that eigenvectors have converged: others span another
      subspace.

    Raises:
      ValueError: the trees do not fit each other.
      TypeError: a leaf is not real floating point.

    References:
      G. Gur-Ari, D. Roberts, E. Dyer (2018), arXiv:1812.04754.
    """
    _checks.floating_tree("grads", grads)
    _checks.floating_tree("vectors", vectors)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(vectors)]
    leading = shapes[0][:1]
    _checks.same_tree("vectors", vectors, grads, leading=leading)
    if not leading or not leading[0]:
        raise ValueError(f"`vectors` must have a leading axis of at least one, got {shapes[0]}.")
    unit = _numerics.unit(grads)
    rows = [jnp.reshape(_tree.wide(leaf), (leading[0], -1)) for leaf in jax.tree.leaves(vectors)]
    dtype = _tree.vector_dtype(vectors)
    basis = jnp.concatenate([row.astype(dtype) for row in rows], axis=1)
    parts = [jnp.ravel(_tree.wide(leaf)).astype(dtype) for leaf in jax.tree.leaves(unit)]
    flat = jnp.concatenate(parts)
    along = jnp.matmul(basis, flat, precision="highest")
    gram = jnp.matmul(basis, basis.T, precision="highest")
    share = jnp.dot(along, jnp.linalg.solve(gram, along), precision="highest")
    size = jnp.asarray(flat.size, dtype)
    is_zero = jnp.all(flat == 0)
    nan_if_zero = lambda value: jnp.where(is_zero, jnp.nan, value)
    shares = along**2 / jnp.diagonal(gram)
    return GradientShareResult(nan_if_zero(share), nan_if_zero(shares), leading[0] / size)


def _from_probes(numbers: jax.Array, size: int) -> AlignmentResult:
    """What follows from the means of the probes' numbers (probes, 5), with jackknife errors."""
    num_probes = len(numbers)
    mean = jnp.mean(numbers, 0)
    left_out = mean[None] + (mean[None] - numbers) / max(num_probes - 1, 1)

    def cosines(means: jax.Array) -> jax.Array:
        product, one, other, trace, other_trace = means
        norms = jnp.sqrt(one) * jnp.sqrt(other)
        return jnp.stack([product / norms, trace * other_trace / (size * norms), product])

    values, each = cosines(mean), jax.vmap(cosines)(left_out)
    # The standard error of a mean, of numbers that are (m - 1) times as close together.
    errors = (num_probes - 1) * _numerics.mean_and_error(each)[1]
    pairs = zip(values, errors, strict=True)
    return AlignmentResult(*(number for pair in pairs for number in pair))
