"""How far two kernels, or a kernel and what is to be learned, point in the same direction."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _numerics, _tree
from regjax._arguments import checked
from regjax.curvature._precision import precisely


@checked
def kernel_alignment(
    matrix: jax.Array, other_matrix: jax.Array, *, centered: bool = False
) -> jax.Array:
    """Computes the cosine of two kernels as vectors.

        <K, L> / (|K|_F |L|_F)

    Example:
      >>> identity, first = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 0.0]])
      >>> print(f"{curvature.kernel_alignment(identity, first):.3f}")  # 1 / sqrt(2)
      0.707

    Args:
      matrix: K, (N, N) or (N, C, N, C), as from `neural_tangent_kernel`.
      other_matrix: L, of the same shape.
      centered: whether both are centred first, H K H with H = I - 1/N: the kernels of the features
        less their mean over the examples. In statistics the result is called CKA.

    Returns:
      (), between 0 and 1 for positive semi-definite kernels; 0 if one of them is zero, NaN if one
      is not finite.

    Raises:
      ValueError: shapes differ, or are none of the two.
      TypeError: one is not real floating point.

    References:
      C. Cortes, M. Mohri, A. Rostamizadeh (2012), Algorithms for learning kernels based on centered
      alignment, arXiv:1203.0550.
    """
    one = _kernel("matrix", matrix)
    other = _kernel("other_matrix", other_matrix)
    if one.shape != other.shape:
        raise ValueError(
            f"`other_matrix` must have the shape of `matrix`, {one.shape}, got {other.shape}."
        )
    return _cosine(one, other, centered)


@functools.partial(jax.jit, static_argnums=2)
@precisely
def _cosine(one: jax.Array, other: jax.Array, centered: bool) -> jax.Array:
    if centered:
        one, other = _centered(one), _centered(other)
    return _numerics.cosine(one, other)


@checked
def target_alignment(matrix: jax.Array, targets: ArrayLike, *, centered: bool = False) -> jax.Array:
    """Computes how much of a kernel lies along the targets.

        y' K y / (|K|_F |y|^2)

    Of several targets, columns y_c, it is the cosine of K and the sum of y_c y_c'.

    Example:
      >>> kernel, targets = jnp.array([[1.0, -1.0], [-1.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> print(f"{curvature.target_alignment(kernel, targets):.3f}")  # K is y y'
      1.000

    Args:
      matrix: K, (N, N), or (N, C, N, C) for which y is all of the N C targets.
      targets: y, (N,), or (N, C) real numbers, such as one-hot classes.
      centered: whether the kernel is centred over the examples, and the targets less their mean.

    Returns:
      (), at most 1; 0 if one of them is zero, NaN if one is not finite.

    Raises:
      ValueError: the shapes do not go together.
      TypeError: one is not real floating point.

    References:
      N. Cristianini, J. Shawe-Taylor, A. Elisseeff, J. Kandola (2001), On kernel-target alignment.
    """
    kernel = _kernel("matrix", matrix)
    target = _real("targets", targets)
    wanted = (kernel.shape[:2],) if kernel.ndim == 4 else ((len(kernel),),)
    is_several = kernel.ndim == 2 and target.ndim == 2 and len(target) == len(kernel)
    if target.shape not in wanted and not is_several:
        raise ValueError(
            f"`targets` must have shape {wanted[0]} beside a kernel of shape {kernel.shape}, got "
            f"{target.shape}."
        )
    return _along(kernel, target, centered)


@functools.partial(jax.jit, static_argnums=2)
@precisely
def _along(kernel: jax.Array, target: jax.Array, centered: bool) -> jax.Array:
    if centered:
        kernel, target = _centered(kernel), target - jnp.mean(target, 0, keepdims=True)
    dtype = jnp.promote_types(kernel.dtype, target.dtype)
    kernel, target = (array.astype(dtype) for array in (kernel, target))
    flat = kernel.reshape(target.size, target.size) if kernel.ndim == 4 else kernel
    columns = target.reshape(len(flat), -1)
    # Near one, so that no product of them under- or overflows.
    flat, columns = _numerics.unit(flat), _numerics.unit(columns)
    energy = jnp.sum(columns * (flat @ columns))
    return _numerics.divide(energy, jnp.linalg.norm(columns.T @ columns))


def _kernel(name: str, array: jax.Array) -> jax.Array:
    matrix = _real(name, array)
    half = matrix.shape[: matrix.ndim // 2]
    if matrix.ndim not in (2, 4) or half != matrix.shape[matrix.ndim // 2 :]:
        raise ValueError(f"`{name}` must have shape (N, N) or (N, C, N, C), got {matrix.shape}.")
    return matrix


def _real(name: str, array: ArrayLike) -> jax.Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be real floating point, got {array.dtype}.")
    return _tree.wide(array)


def _centered(matrix: jax.Array) -> jax.Array:
    for axis in (0, matrix.ndim // 2):
        matrix = matrix - jnp.mean(matrix, axis, keepdims=True)
    return matrix
