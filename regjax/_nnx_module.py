"""A module of flax's nnx that shows its arguments: nnx's own shows (*args, **kwargs)."""

import inspect
from typing import Any

from flax import nnx


class Module(nnx.Module):
    """A module with the signature of its `__init__`, for `help()` and editors."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)
