"""Which leaves of the parameters a transformation touches."""

from typing import TypeAlias

from regjax import _checks, _selection
from regjax._base import Mask, Params

MaskOrFunction: TypeAlias = Mask
"""A mask, which may be a function params -> mask."""


def mask_leaves(mask: MaskOrFunction, params: Params, name: str = "mask") -> list[bool]:
    """Returns one bool for each leaf of `params`."""
    return _selection.mask_leaves(mask, params, name)


def floating_leaves(mask: MaskOrFunction, params: Params) -> list[bool]:
    """Does the same, and checks that the chosen leaves are real floating point."""
    chosen = mask_leaves(mask, params)
    _checks.floating_leaves("params", params, chosen)
    return chosen
