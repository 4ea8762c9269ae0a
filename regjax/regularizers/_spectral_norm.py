"""The largest singular values of the kernels, as a penalty."""

import jax
import jax.numpy as jnp

from regjax import _checks, _layouts, _loops, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Mask, Params, PRNGKey


@checked
def spectral_norm_penalty(
    params: Params,
    *,
    num_iterations: int | None = None,
    key: PRNGKey | None = None,
    mask: Mask = None,
    layout: Layouts = None,
) -> jax.Array:
    """Computes half the sum over the kernels of the squared largest singular value.

        R = (1 / 2) sum_l sigma(W_l)^2 = (1 / 2) sum_l ||W_l v_l||^2

    v_l is the right singular vector of the largest singular value, and is held constant. The value
    is exact, and so is the gradient sigma u v', which is zero at W = 0. If several singular values
    are the largest, one is taken, which gives a subgradient. Only first derivatives are right,
    because a Hessian would need the rotation of v_l. As a penalty:

        loss + strength * spectral_norm_penalty(params)

    A kernel is a leaf with axes of inputs and outputs, as a matrix (inputs, outputs). Each of
    several stacked layers is a matrix of its own. The matrix of a convolution acts on patches. The
    norm of the linear map of images is at most the square root of the number of kernel positions
    times this sigma.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "bias": jnp.ones(2)}
      >>> print(regularizers.spectral_norm_penalty(params))  # 3^2 / 2
      4.5

    Args:
      params: tree of real floating-point arrays.
      num_iterations: number of power iterations from a random start. The value is then a lower
        bound, and the gradient that of the bound at a fixed v_l. None: the exact v_l, from the
        eigendecomposition of the smaller of W W' and W' W.
      key: typed key of the random start, used with `num_iterations` only. Each call starts anew.
      mask: which kernels count; None: all.
      layout: which axes of the leaves are inputs, outputs and layers (`regjax.Layout`); None: a
        guess, which for plain kernels is that the outputs are last.

    Returns:
      The penalty (), in float32 at least, in squared units of the parameters.

    Raises:
      ValueError: `num_iterations` is below 1, a kernel has an empty axis, `mask` has another
        structure or contains a leaf without inputs, or `layout` must tell the axes of a leaf.
      TypeError: a parameter is not real floating point, `key` is not a typed key, or `mask` holds
        other things than bools.

    References:
      Y. Yoshida, T. Miyato (2017), Spectral norm regularization, arXiv:1705.10941: (lambda / 2)
      sum sigma^2 by power iteration, and the reshaping of convolutions. The exact form is ours.
    """
    if mask is None:
        _checks.floating_tree("params", params)
    kernels = _kernels(params, mask, layout)
    total = jnp.zeros((), _tree.vector_dtype(params if mask is None else kernels))
    for i, layers in enumerate(kernels):
        # The norm of W' is that of W, and the vector is as short as it can be.
        is_wide = layers.shape[1] < layers.shape[2]
        matrices = jnp.swapaxes(layers, 1, 2) if is_wide else layers
        # Near one, or the squares of the product would under- or overflow.
        fixed, _ = _numerics.near_one(jax.lax.stop_gradient(matrices), (1, 2))
        if num_iterations is None:
            vectors = jnp.linalg.eigh(_product(jnp.swapaxes(fixed, 1, 2), fixed))[1][..., -1]
        else:
            count = _checks.integer("num_iterations", num_iterations)
            start_key = jax.random.fold_in(_checks.key("key", key), i)
            start = jax.random.normal(start_key, (len(fixed), fixed.shape[2]), fixed.dtype)
            vectors = _loops.scan(_power_step, start, count, operands=fixed)
        images = _product(matrices, vectors[..., None])
        total += (jnp.sum(images**2) / 2).astype(total.dtype)
    return total


def _kernels(params: Params, mask: Mask, layout: Layouts) -> list[jax.Array]:
    """Lists the kernels, (layers, inputs, outputs) each."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    chosen = _selection.mask_leaves(mask, params)
    kernels = []
    rows = zip(leaves, chosen, _layouts.of_leaves(layout, params, chosen), strict=True)
    for (path, leaf), choose, axes in rows:
        if mask is not None and choose and not axes.is_kernel:
            raise ValueError(
                "`mask` must leave out leaves without axes of inputs, got "
                f"{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}."
            )
        if choose and axes.is_kernel:
            if not leaf.size:
                raise ValueError(f"`params` must have no empty kernel, got shape {leaf.shape}.")
            kernels.append(axes.matrices(_tree.wide(leaf)))
    return kernels


def _power_step(matrices: jax.Array, vectors: jax.Array, i: jax.Array) -> jax.Array:
    del i
    images = _product(jnp.swapaxes(matrices, 1, 2), _product(matrices, vectors[..., None]))
    return _numerics.units_along(images[..., 0], (1,))


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision="highest")
