"""Which leaves of the parameters a transformation touches."""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax.tree_util import Partial

from regjax import _checks
from regjax._base import Mask, Params

MaskOrFunction: TypeAlias = Mask | Callable[[Params], Mask]
"""Tree of bools like the parameters or an upper part of it, a function params -> such a tree, or
None for all leaves."""


def mask_leaves(mask: MaskOrFunction, params: Params, name: str = "mask") -> list[bool]:
    """Returns one bool for each leaf of `params`."""
    return _checks.mask_leaves(mask(params) if _is_function(mask) else mask, params, name)


def floating_leaves(mask: MaskOrFunction, params: Params) -> list[bool]:
    """Does the same, and checks that the chosen leaves are real floating point."""
    chosen = mask_leaves(mask, params)
    _checks.floating_leaves("params", params, chosen)
    return chosen


def _is_function(mask: MaskOrFunction) -> bool:
    """Tells a function from a tree of bools that can be called, as a module of Equinox."""
    leaves = jax.tree.leaves(mask)
    return callable(mask) and (isinstance(mask, Partial) or all(map(callable, leaves)))
