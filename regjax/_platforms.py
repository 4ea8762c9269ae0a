"""Where arrays lie, and what is done there: known from them, or when a program is lowered.

The default backend says neither: on a machine with a GPU arrays may lie on the CPU, and
`jax.export` lowers a program for machines that are not here.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from regjax._base import Tree

_Result = TypeVar("_Result")

CPU = "cpu"


def platform_of(*trees: Tree) -> str | None:
    """Finds the platform that computes with these arrays, such as "cpu" or "gpu".

    Args:
      *trees: of arrays, or of shapes that say where their arrays would lie.

    Returns:
      Its name; None inside of `jax.jit`, where only the lowering knows it.
    """
    found = [_known(leaf) for leaf in jax.tree.leaves(trees)]
    if is_in_program() or any(isinstance(leaf, jax.core.Tracer) for leaf in found):
        return None
    placed = [leaf for leaf in found if getattr(leaf, "sharding", None) is not None]
    # Those that somebody has put somewhere decide for the others.
    committed = [leaf for leaf in placed if getattr(leaf, "committed", True)]
    for leaf in (*committed, *placed):
        platform: str = next(iter(leaf.sharding.device_set)).platform
        return platform
    return default_platform()


def is_on_cpu(*trees: Tree) -> bool:
    """Tells whether the CPU computes with these arrays; of traced ones, whether by default.

    For what must be known when a program is traced, such as how many vectors a state has.
    """
    platform = platform_of(*trees)
    return (default_platform() if platform is None else platform) == CPU


def default_platform() -> str:
    """Finds the platform of arrays that nobody has put anywhere."""
    device = getattr(jax.config, "jax_default_device")  # noqa: B009
    if isinstance(device, str):
        return device
    return jax.devices()[0].platform if device is None else device.platform


def is_in_program() -> bool:
    """Tells whether what is computed now becomes a part of a program: inside of `jax.jit`."""
    return isinstance(_here.bind(), jax.core.Tracer)


def depending(
    cpu: Callable[..., _Result], elsewhere: Callable[..., _Result], *operands: Tree
) -> _Result:
    """Computes `cpu(*operands)` on the CPU and `elsewhere(*operands)` on any other platform.

    Inside of `jax.jit` both are traced, and one of them is lowered. Outputs are of the same types.
    """
    platform = platform_of(operands)
    if platform is None:
        return lax.platform_dependent(*operands, cpu=cpu, default=elsewhere)
    return (cpu if platform == CPU else elsewhere)(*operands)


def warned(message: str) -> jax.Array:
    """Makes a true value, of which a program lowered for the CPU warns, once for each message."""
    return _warned.bind(message=message)


_told: set[str] = set()


def _warn(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=3)


def _lowered_on_cpu(context: Any, *, message: str) -> Any:
    _warn(message)
    return _lowered(context, message=message)


def _lowered(context: Any, *, message: str) -> Any:
    return [mlir.ir_constant(np.asarray(True))]


_warned = Primitive("warned")
_warned.def_impl(lambda *, message: jnp.bool_(True))
_warned.def_abstract_eval(lambda *, message: jax.core.ShapedArray((), jnp.bool_))
mlir.register_lowering(_warned, _lowered)
mlir.register_lowering(_warned, _lowered_on_cpu, platform=CPU)


# An operation of nothing: where JAX traces, its result is a tracer. (`jnp.zeros(())` tells the same
# in twenty times the time.)
_here = Primitive("here")
_here.def_impl(lambda: None)
_here.def_abstract_eval(lambda: jax.core.ShapedArray((), jnp.bool_))
mlir.register_lowering(_here, lambda context: _lowered(context, message=""))


def _known(leaf: Any) -> Any:
    """The array under what `jax.grad` and `jax.vmap` make of it outside of `jax.jit`."""
    while isinstance(leaf, jax.core.Tracer):
        inner = getattr(leaf, "primal", getattr(leaf, "val", None))
        if not isinstance(inner, jax.Array):  # one of a program
            return leaf
        leaf = inner
    return leaf
