"""Which leaves of the parameters a transformation touches."""

from collections.abc import Callable
from typing import TypeAlias

from regjax import _checks
from regjax._base import Mask, Params

MaskOrFunction: TypeAlias = Mask | Callable[[Params], Mask]
"""Tree of bools like the parameters, a function params -> such a tree, or None for all leaves."""


def mask_leaves(mask: MaskOrFunction, params: Params) -> list[bool]:
    """Returns one bool for each leaf of `params`."""
    return _checks.mask_leaves(mask(params) if callable(mask) else mask, params)
