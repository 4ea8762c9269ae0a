"""The largest singular values of the kernels, as a penalty."""

import jax
import jax.numpy as jnp

from regjax import _checks, _loops, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey


@checked
def spectral_norm_penalty(
    params: Params,
    *,
    num_iterations: int | None = None,
    key: PRNGKey | None = None,
    mask: Mask = None,
) -> jax.Array:
    """Computes half the sum over the kernels of the squared largest singular value.

        R = (1 / 2) sum_l sigma(W_l)^2 = (1 / 2) sum_l ||W_l v_l||^2

    v_l is the top right singular vector, held constant: the value is exact, and so is the gradient
    sigma u v', without a division and zero at W = 0. Of equal largest singular values one is taken,
    which gives a subgradient. First derivatives only: a Hessian lacks the turning of v_l.

    A kernel is a leaf with two or more axes, (all but the last, last) as a matrix. For convolutions
    that matrix acts on patches; the norm of the linear map of images is at most the square root of
    the number of kernel positions times its sigma. What has axes other than inputs and outputs
    (heads, stacked layers) is to be reshaped by the caller, or masked out.

    As a penalty: `loss + strength * spectral_norm_penalty(params)`.

    Args:
      params: tree of real floating-point arrays.
      num_iterations: power iterations from a random start. The value is a lower bound then, and
        its gradient that of the bound at a fixed v_l. None: the exact v_l, from the
        eigendecomposition of the smaller of W W' and W' W.
      key: typed key of the random start; read with `num_iterations` only. Each call
        starts anew: going on from the vector of the last step would need a state.
      mask: tree of Python bools like `params`, which kernels count; None: all.

    Returns:
      The penalty (), in float32 at least, in squared units of the parameters.

    Raises:
      ValueError: `num_iterations` is below 1, a kernel has an empty axis, `mask` has another
        structure, or it takes in a leaf with fewer than two axes.
      TypeError: a parameter is not real floating point, `key` is not a typed key, or `mask` holds
        other things than bools.

    References:
      Y. Yoshida, T. Miyato (2017), Spectral norm regularization, arXiv:1705.10941: (lambda / 2)
      sum sigma^2 by power iteration and the reshaping of convolutions, as commonly described; the
      paper itself was not read. The exact form is ours.
    """
    _checks.floating_tree("params", params)
    total = jnp.zeros((), _tree.vector_dtype(params))
    for i, kernel in enumerate(_kernels(params, mask)):
        if not kernel.size:
            raise ValueError(f"`params` must have no empty kernel, got shape {kernel.shape}.")
        matrix = _tree.wide(kernel).reshape(-1, kernel.shape[-1])
        # The norm of W' is that of W, and the vector is as short as it can be.
        matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        # Near one, or the squares of the product would under- or overflow.
        fixed, _ = _numerics.near_one(jax.lax.stop_gradient(matrix), (0, 1))
        if num_iterations is None:
            vector = jnp.linalg.eigh(_product(fixed.T, fixed))[1][:, -1]
        else:
            count = _checks.integer("num_iterations", num_iterations)
            start_key = jax.random.fold_in(_checks.key("key", key), i)
            start = jax.random.normal(start_key, fixed.shape[1:], fixed.dtype)
            vector = _loops.scan(_power_step, start, count, operands=fixed)
        total += (jnp.sum(_product(matrix, vector) ** 2) / 2).astype(total.dtype)
    return total


def _kernels(params: Params, mask: Mask) -> list[jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if mask is None:
        return [leaf for _, leaf in leaves if jnp.ndim(leaf) >= 2]
    kernels = []
    for (path, leaf), choose in zip(leaves, _selection.mask_leaves(mask, params), strict=True):
        if choose and jnp.ndim(leaf) < 2:
            raise ValueError(
                "`mask` must leave out leaves with fewer than two axes, got "
                f"{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}."
            )
        if choose:
            kernels.append(leaf)
    return kernels


def _power_step(matrix: jax.Array, vector: jax.Array, i: jax.Array) -> jax.Array:
    del i
    return _numerics.unit(_product(matrix.T, _product(matrix, vector)))


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision="highest")
