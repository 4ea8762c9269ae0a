"""Whether two runs are of the same problem: what they are known by, and one product."""

import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _files, _numerics
from regjax._space import Space
from regjax.curvature._engine._solver import Solver

# The same product on another machine, in another order of summation or in chunks of another size
# differs by some rounding; more than this share, and it is another matrix.
_ROUNDING = 1000
_LARGEST_SHARE = 0.05


class OtherProblem(_files.CheckpointError):
    """A checkpoint of another problem."""


def facts(solver: Solver[Any, Any]) -> dict[str, Any]:
    """What decides the answer: arguments as they are, arrays by their digest.

    The size of a chunk is not among them: after running out of memory one lowers it and goes on.
    """
    found: dict[str, Any] = {
        "solver": solver.name,
        "number of parameters": solver.operator.size,
        "dtype": str(solver.operator.dtype),
    }
    for name, value in solver.arguments.items():
        plain = value is None or isinstance(value, bool | int | float | str)
        found[name] = value if plain else digest(value)
    return found | {name: digest(tree) for name, tree in solver.operator.facts().items()}


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
            raise OtherProblem(
                f"`checkpoint` must be of the same problem: `{name}` must be {value!r}, got "
                f"{found.get(name)!r} in {path}."
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


def digest(tree: Any) -> str:
    """Of structure, dtypes, shapes and bits, as hexadecimal digits; no safeguard against malice."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = jnp.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        total.update(np.asarray(_sums(array)).tobytes())
    return total.hexdigest()[:16]


@jax.jit
def _sums(array: jax.Array) -> jax.Array:
    """(2,), uint32: two sums over all bits, on the device; each depends on every bit's place."""
    words = _words(array).ravel()
    place = jax.lax.iota(np.uint32, words.size)
    once = _mixed(words ^ (place * np.uint32(0x9E3779B9)))
    return jnp.stack([jnp.sum(once), jnp.sum(_mixed(once + place))])


def _words(array: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag])
    if array.dtype == jnp.bool_:
        array = array.astype(np.uint8)
    width = min(array.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(array, f"uint{8 * width}").astype(np.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """The last step of MurmurHash3 (A. Appleby): every bit of a word changes half of the others."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
