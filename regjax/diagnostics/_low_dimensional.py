"""Data on a low-dimensional subspace: what a network does across it, where nothing was learnt."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _jacobian, _layouts, _numerics, _tree
from regjax._arguments import checked
from regjax._axes import Layout
from regjax._base import ModelFn, Params, PRNGKey
from regjax._printing import legible

# Of B'B - I: far above the float32 rounding of an SVD, far below a column that has no unit norm.
_ORTHONORMAL = 1e-4


@legible
class SubspaceResult(NamedTuple):
    """A subspace that holds the data.

    Attributes:
      basis: (d, k), orthonormal columns, the direction of the largest singular value first.
      singular_values: (min(N, d),), all singular values of the data (N, d), descending. The gap
        after the k-th shows how well k is determined.
    """

    basis: jax.Array
    singular_values: jax.Array


@legible
class TransversalVariationResult(NamedTuple):
    """How much the outputs change across the subspace of the data.

    Attributes:
      value: (), in units of the outputs.
      standard_error: (), over the draw of the steps at these inputs; NaN with a single step.
    """

    value: jax.Array
    standard_error: jax.Array


@legible
class FrozenResult(NamedTuple):
    """The change of a first kernel across the subspace of the data, where P is the projection.

    Attributes:
      change: (), the largest magnitude of an entry of P (kernel - initial kernel), in units of the
        parameters.
      norm_ratio: (), ||P kernel||_F / ||P initial kernel||_F; NaN where the latter is zero.
    """

    change: jax.Array
    norm_ratio: jax.Array


@checked
def subspace_from_data(
    inputs: jax.Array, *, tol: ArrayLike = 1e-6, num_directions: int | None = None
) -> SubspaceResult:
    """Finds an orthonormal basis of the linear subspace that the data span.

    It comes from the singular value decomposition of the data as they are. Adding a constant to all
    data may add a direction, and subtracting their mean may remove one.

    Example:
      >>> result = diagnostics.subspace_from_data(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
      >>> print(abs(result.basis.ravel()), result.singular_values)
      [1. 0.] [5. 0.]

    Args:
      inputs: (N, ...), real floating point, of size d each.
      tol: k is the number of singular values above `tol` times the largest one. The default is for
        float32, in which data in a rotated subspace leave it by about 1e-7; in bfloat16 it is 1e-2.
      num_directions: k, whatever the singular values; needed inside `jax.jit`. Directions beyond
        the rank of the data are arbitrary.

    Returns:
      A `SubspaceResult`, in float32 at least; with `num_directions` NaN if an input is NaN or
      infinite.

    Raises:
      ValueError: without `num_directions`, `inputs` are traced, not finite, or all zero; or an
        argument is out of its range.
      TypeError: `inputs` is not real floating point.
    """
    _checks.non_negative("tol", tol, finite=True)
    inputs = _checks.floating_array("inputs", inputs)
    num_examples = _checks.num_examples(inputs)
    if num_directions is not None:
        most = min(num_examples, inputs[0].size)
        limit = most, "the number of examples, or the size of one if that is less"
        _checks.integer("num_directions", num_directions, maximum=limit)
        values, directions = _decomposition(inputs)
        return SubspaceResult(directions[:num_directions].T, values)
    if _checks.host_value(inputs) is None:
        raise ValueError(
            "`inputs` must be concrete, as the rank depends on their values; under jit give "
            "`num_directions`."
        )
    with jax.ensure_compile_time_eval():
        values, directions = _decomposition(inputs)
        if not jnp.all(jnp.isfinite(values)):
            raise ValueError("`inputs` must be finite, got NaN or infinity.")
        if not values[0] > 0:
            raise ValueError("`inputs` must span a subspace, got zeros only.")
        rank = int(jnp.sum(values > tol * values[0]))
        return SubspaceResult(directions[:rank].T, values)


@checked
def transversal_complexity(
    model_fn: ModelFn,
    params: Params,
    inputs: jax.Array,
    basis: jax.Array,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """Computes the mean squared Frobenius norm of the Jacobian across the subspace of the data.

        (1 / N) sum_x ||J(x) P||_F^2,   J = d f(x) / d x,   P = I - basis basis'

    It is the part of `regularizers.geometric_complexity` in directions in which the data do not
    vary.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> w, inputs = jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 0.0], [2.0, 0.0]])
      >>> basis = diagnostics.subspace_from_data(inputs).basis  # the first axis
      >>> print(diagnostics.transversal_complexity(model_fn, w, inputs, basis))
      16.0

    Args:
      model_fn: (params, inputs) -> outputs (N, ...), each a function of its own example alone,
        such as `regjax.model_function(model)`.
      params: parameters of the model; differentiable.
      inputs: (N, ...), real floating point, of size d each.
      basis: (d, k), orthonormal, of the subspace; from `subspace_from_data`.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      The complexity (), in float32 at least, in squared units of the outputs over the inputs.

    Raises:
      ValueError: the columns of `basis` do not fit the inputs or are not orthonormal (checked
        outside `jit` only), or the model couples the examples.
      TypeError: `inputs` is not one array of real floating point.

    References:
      J. He, R. Tsai, R. Ward (2022), arXiv:2203.00614, on functions away from the data. This number
      is ours.
    """
    _jacobian.check_model("model_fn", model_fn, inputs)
    basis = _checked_basis(basis, inputs[0].size)
    function = Partial(_squared_norms, _chunks.fixed(model_fn, params, inputs, chunk_size))
    return jnp.mean(_chunks.each(function, (params, basis), (inputs,), chunk_size))


@checked
def transversal_variation(
    model_fn: ModelFn,
    params: Params,
    inputs: jax.Array,
    basis: jax.Array,
    *,
    key: PRNGKey,
    radius: ArrayLike,
    num_samples: int,
    chunk_size: int | None = None,
) -> TransversalVariationResult:
    """Estimates the mean change of the outputs over steps of a given length across the subspace.

        mean over x and y of ||f(x + y) - f(x)||

    The steps y are uniform on the sphere of `radius` in the complement of the data's subspace.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> w, inputs = jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 0.0], [2.0, 0.0]])
      >>> basis = diagnostics.subspace_from_data(inputs).basis  # the first axis
      >>> result = diagnostics.transversal_variation(
      ...     model_fn, w, inputs, basis, key=jax.random.key(0), radius=0.5, num_samples=10
      ... )
      >>> print(f"{result.value:.3f}")  # 4 * 0.5
      2.000

    Args:
      model_fn: (params, inputs) -> outputs (N, ...), each a function of its own example alone.
      params: parameters of the model.
      inputs: (N, ...), real floating point, of size d each.
      basis: (d, k) with k < d, orthonormal, of the subspace.
      key: typed key of the steps, which do not depend on `chunk_size`.
      radius: length of the steps, in units of the inputs.
      num_samples: number of steps per input, with one forward pass each.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      A `TransversalVariationResult`.

    Raises:
      ValueError: `basis` does not fit the inputs or is not orthonormal, or spans the whole space;
        the model couples the examples; `radius` is negative, or `num_samples` is below 1.
      TypeError: `inputs` is not one array of real floating point, or `key` is not a typed key.

    References:
      J. He, R. Tsai, R. Ward (2022), arXiv:2203.00614. The average over a sphere is ours.
    """
    _jacobian.check_model("model_fn", model_fn, inputs)
    basis = _with_complement(_checked_basis(basis, inputs[0].size))
    _checks.non_negative("radius", radius, finite=True)
    rest = params, basis, jnp.asarray(radius, basis.dtype)
    value, error = _chunks.sampled(
        Partial(_changes, _chunks.fixed(model_fn, params, inputs, chunk_size)), rest, inputs,
        key=key, num_samples=num_samples, chunk_size=chunk_size,
    )  # fmt: skip
    return TransversalVariationResult(value, error)


@checked
def frozen_component(
    kernel: jax.Array,
    initial_kernel: jax.Array,
    basis: jax.Array,
    *,
    layout: Layout | None = None,
) -> FrozenResult:
    """Measures what training did to the part of a first kernel that the data do not reach.

    If the data lie in a subspace and the kernel acts on them directly, its gradient lies in the
    subspace too. So gradient descent, with or without momentum, does not change the kernel's part
    across the subspace. Weight decay lambda at the rate eta, without momentum, multiplies the norm
    of this part by (1 - eta lambda)^t in t steps. Adam changes it, unless coordinate axes span the
    subspace.

    Example:
      >>> initial_kernel, kernel = jnp.array([[2.0], [1.0]]), jnp.array([[5.0], [0.5]])
      >>> basis = jnp.array([[1.0], [0.0]])
      >>> print(diagnostics.frozen_component(kernel, initial_kernel, basis))
      FrozenResult(change=0.5, norm_ratio=0.5)

    Args:
      kernel: (d, m) after training; or (height, width, c, m) of a convolution, with a basis of the
        space of patches (height, width, c).
      initial_kernel: the same kernel before training.
      basis: (d, k) with k < d, orthonormal, of the subspace.
      layout: which axes of the kernel are inputs and which outputs; None: these are last.

    Returns:
      A `FrozenResult`, in float32 at least.

    Raises:
      ValueError: a shape does not fit, the columns of `basis` are not orthonormal (checked outside
        `jit` only), or the subspace is the whole space.
      TypeError: an argument is not real floating point.

    References:
      J. He, R. Tsai, R. Ward (2022), arXiv:2203.00614. The statements above are our derivation.
    """
    kernels = [
        _tree.wide(_checks.floating_array(name, given))
        for name, given in (("kernel", kernel), ("initial_kernel", initial_kernel))
    ]
    _checks.same_tree("kernel", *kernels)
    axes = _layouts.of_array("kernel", layout, kernels[0]).single("kernel")
    if not axes.is_kernel:
        raise ValueError(f"`kernel` must have shape (d, m), got {kernels[0].shape}.")
    after, before = (axes.matrices(kernel)[0] for kernel in kernels)
    basis = _with_complement(_checked_basis(basis, before.shape[0]))
    moved, *parts = (_off(basis, matrix.T) for matrix in (after - before, after, before))
    norms = [_numerics.scaled_norm(part) for part in parts]
    return FrozenResult(
        jnp.max(jnp.abs(moved)), _numerics.divide(*norms, where=norms[1] > 0, otherwise=jnp.nan)
    )


def _decomposition(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes singular values (r,), descending, and right singular vectors (r, d) of the data."""
    return _numerics.finite_svd(_tree.wide(inputs).reshape(inputs.shape[0], -1))


def _squared_norms(
    model_fn: Partial, rest: tuple[Params, jax.Array], inputs: jax.Array
) -> jax.Array:
    params, basis = rest
    return _jacobian.squared_norms(lambda x: model_fn(params, x), inputs, without=basis)


def _changes(
    model_fn: Partial,
    rest: tuple[Params, jax.Array, jax.Array],
    inputs: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """Computes ||f(x + y) - f(x)|| of each example (N,), with one y each."""
    params, basis, radius = rest
    num_examples = inputs.shape[0]
    normal = lambda key: jax.random.normal(key, basis.shape[:1], basis.dtype)
    steps = _off(basis, jax.vmap(normal)(keys))
    steps *= radius / jnp.sqrt(jnp.sum(steps**2, 1, keepdims=True))
    moved = _tree.wide(inputs) + steps.astype(_tree.wide_dtype(inputs)).reshape(inputs.shape)
    here, there = (
        _tree.wide(_jacobian.flat(model_fn(params, x), num_examples))
        for x in (inputs, moved.astype(inputs.dtype))
    )
    return _numerics.norms_along(there - here, (1,))[:, 0]


def _off(basis: jax.Array, vectors: jax.Array) -> jax.Array:
    """Subtracts from `vectors` (n, d) their parts in the subspace."""
    dtype = jnp.promote_types(basis.dtype, vectors.dtype)
    return _numerics.part_outside(vectors.astype(dtype), basis.T)


def _checked_basis(basis: ArrayLike, size: int) -> jax.Array:
    """Returns `basis` in float32 at least, if it has shape (size, k) and orthonormal columns."""
    basis = _checks.floating_array("basis", basis)
    shape = jnp.shape(basis)
    if len(shape) != 2 or shape[0] != size or shape[1] > size:
        raise ValueError(
            f"`basis` must have shape ({size}, k), k at most {size}: orthonormal columns of the "
            f"size of an example, which is {size}, got {shape}."
        )
    known = _checks.host_value(_checks.finite_tree("basis", basis))
    if known is not None:
        columns = known.astype(np.float64)
        error = np.max(np.abs(columns.T @ columns - np.eye(shape[1])), initial=0)
        if not error <= _ORTHONORMAL:
            raise ValueError(
                "`basis` must have orthonormal columns, got basis' basis that differs from the "
                f"identity by {error:.2g}."
            )
    return _tree.wide(basis)


def _with_complement(basis: jax.Array) -> jax.Array:
    if basis.shape[1] == basis.shape[0]:
        raise ValueError(
            "`basis` must leave a complement, got as many directions as dimensions, "
            f"{basis.shape[0]}."
        )
    return basis
