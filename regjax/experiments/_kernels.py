"""Which parameters of a network are kernels, and which of these a normalization follows."""

import jax
from jax.tree_util import KeyPath

from regjax._base import Mask, Params


def kernels(params: Params) -> Mask:
    """Returns the mask of the kernels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)


def normalized_kernels(params: Params) -> Mask:
    """Returns the mask of the kernels with a normalization behind their layer."""

    def is_normalized(path: KeyPath, _: jax.Array) -> bool:
        module = params
        for entry in path[:-2]:
            module = module[entry.key]
        return _is_kernel(path) and "norm" in module

    return jax.tree_util.tree_map_with_path(is_normalized, params)


def _is_kernel(path: KeyPath) -> bool:
    return bool(path[-1].key == "kernel")
