"""Whether two runs are of the same problem: what they are known by, and one product."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _archive, _files, _numerics
from regjax._digest import digest
from regjax._space import Space
from regjax.curvature._engine._solver import Solver

# The same product on another machine, in another order of summation or in chunks of another size
# differs by some rounding; more than this share, and it is another matrix.
_ROUNDING = 1000
_LARGEST_SHARE = 0.05


class OtherProblem(_files.CheckpointError):
    """A checkpoint of another problem."""


def facts(solver: Solver[Any, Any]) -> dict[str, Any]:
    """What decides the answer: arguments as they are, programs and arrays by their digests.

    A source is read once for it. The size of a chunk is not among them: after running out of
    memory one lowers it and goes on.
    """
    found: dict[str, Any] = {
        "solver": solver.name,
        "number of parameters": solver.operator.size,
        "dtype": str(solver.operator.dtype),
    }
    found |= _where(solver.operator.space)
    for name, value in solver.arguments.items():
        found[name] = _told(value)
    return found | {name: _told(value) for name, value in solver.operator.facts().items()}


def _where(space: Space) -> dict[str, Any]:
    """Where the vectors lie, as JSON gives it back."""
    if space.mesh is None:
        return {"mesh": {}, "shardings of the parameters": [], "places of the process": []}
    owners = [device.process_index for device in space.mesh.devices.flat]
    ours = [place for place, owner in enumerate(owners) if owner == jax.process_index()]
    return {
        "mesh": dict(space.mesh.shape),
        "shardings of the parameters": [str(spec) for spec in space.specs],
        "places of the process": ours,
    }


def _told(value: Any) -> Any:
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else digest(value)


def first_product(space: Space, vectors: jax.Array, images: jax.Array) -> list[float]:
    """Two numbers of a product: its components along the (first) vector and outside of it."""
    if vectors.ndim == 2:
        vectors, images = vectors[0], images[0]
    return np.asarray(_components(space, vectors, images), np.float64).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _components(space: Space, vector: jax.Array, image: jax.Array) -> jax.Array:
    unit = _numerics.divide(vector, space.norm(vector))
    along = space.inner(unit, image)
    return _numerics.divide(
        jnp.stack([along, space.norm(image - along * unit)]), space.norm(vector)
    )


def check_facts(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises OtherProblem naming the first difference."""
    for name, value in wanted.items():
        if found.get(name) != value:
            # What the loss or the model computes, beside the arrays that it reads.
            why = ": another loss or model, or another version of JAX" if "program" in name else ""
            raise OtherProblem(
                f"`checkpoint` must be of the same problem: `{name}` must be {value!r}, got "
                f"{_archive.shown(repr(found.get(name)))} in {path}{why}."
            )


def check_product(path: Path, found: list[float], wanted: list[float], space: Space) -> None:
    """Raises OtherProblem if the first product's numbers differ by more than rounding."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in space.dtypes)
    allowed = min(_ROUNDING * eps, _LARGEST_SHARE) * math.hypot(*wanted)
    if not np.allclose(found, wanted, rtol=0, atol=allowed, equal_nan=True):
        raise OtherProblem(
            "`checkpoint` must be of the same problem: the first product must have the components "
            f"{wanted} along its direction and outside of it, got {found} in {path}: another loss "
            "or model."
        )
