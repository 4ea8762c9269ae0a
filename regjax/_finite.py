"""Products that are not finite: a run that Python drives ends at the first, and says where to look.

Nothing follows from NaN but NaN, and a run of an hour is not to end in them. Inside of `jax.jit`
nobody can be told; there the results are NaN, and the flags say so.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _checks
from regjax._base import Tree

Result = TypeVar("Result")

_SOME = 3
# Facts that a user knows by these names; what the others hold was closed over.
_ARGUMENTS = ("params", "batch", "inputs", "damping", "factor", "diagonal")
_HOST_TYPES = (np.float32, np.float64)


class NotFiniteError(FloatingPointError):
    """A matrix-vector product is not finite; the message says where NaN or infinity come from.

    Only a run that Python drives raises it. Inside of `jax.jit` the results are NaN.

    Attributes:
      result: what had been computed before that product, in the form of the ordinary result; None
        where nothing is computed before all products are there.
    """

    def __init__(self, message: str, result: Tree = None):
        super().__init__(message)
        self.result = result


class _Matrix(Protocol):
    """What makes products, as `curvature.Operator` does."""

    @property
    def why_not_finite(self) -> str: ...

    def facts(self) -> Mapping[str, Tree]: ...


def check_product(
    operator: _Matrix,
    images: jax.Array,
    *,
    vectors: jax.Array | None = None,
    name: str = "operator",
    result: Callable[[], Tree] = lambda: None,
) -> None:
    """Checks that a product which is known is finite, if what was multiplied is.

    Args:
      operator: what was multiplied with.
      images: the product.
      vectors: what was multiplied; None: it is finite.
      name: of the argument that `operator` is.
      result: () -> what had been computed before.

    Raises:
      NotFiniteError: it is not.
    """
    if isinstance(images, jax.core.Tracer) or is_finite(images):
        return
    if vectors is not None and not is_finite(vectors):
        return
    found = result()
    message = f"`{name}` must give finite products, got NaN or infinity{_when(found)}."
    message = f"{message} {_places(operator.facts()) or operator.why_not_finite}"
    if found is not None:
        message += " What was computed before is in the error's `.result`."
    raise NotFiniteError(message, found)


def without_error(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, which returns what it had when a product is not finite, as inside of `jax.jit`.

    For what runs beside a training, which is not to end by it, and has flags of its own.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Result:
        try:
            return function(*arguments, **options)
        except NotFiniteError as error:
            result: Result = error.result
            return result

    return call


def is_finite(array: jax.Array) -> bool:
    """Whether no number of an array is NaN or infinite, by one pass over it."""
    is_here = array.is_fully_addressable and len(array.devices()) == 1
    if is_here and array.dtype in _HOST_TYPES and next(iter(array.devices())).platform == "cpu":
        # The host reads the array where it lies, and nothing has to be compiled.
        numbers = np.asarray(array)
        with np.errstate(invalid="ignore"):
            ends = numbers.max(initial=0), numbers.min(initial=0)
        return bool(np.isfinite(ends).all())
    return bool(_all_finite(array))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def _when(found: Tree) -> str:
    for name in ("num_matvecs", "num_steps"):
        if (count := getattr(found, name, None)) is not None and jnp.ndim(count) == 0:
            return f" in product {int(count) + 1}"
    return ""


def _places(facts: Mapping[str, Tree]) -> str:
    """Where to look among the arrays that decide the products; nothing if all are finite."""
    places = [
        f"{_place(name, path)} holds {kind}"
        for name, tree in facts.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if (kind := _kind(leaf))
    ]
    more = ", and others" if len(places) > _SOME else ""
    return f"Look at the parameters and the data: {', '.join(places[:_SOME])}{more}." * bool(places)


def _place(name: str, path: Any) -> str:
    name = name.rsplit(".", 1)[-1]  # of one part of a sum
    if name in _ARGUMENTS:
        return f"`{name}{jax.tree_util.keystr(path)}`"
    return "an array that the function closes over"


def _kind(leaf: Any) -> str:
    """What an array holds that is not finite, and where the first of it is; else nothing."""
    if not jnp.issubdtype(getattr(leaf, "dtype", jnp.int32), jnp.floating):
        return ""
    known = _checks.host_value(leaf)
    if known is None or np.isfinite(known).all():
        return ""
    first = np.argwhere(~np.isfinite(known))[0].tolist()
    kind = "NaN" if np.isnan(known[tuple(first)]) else "infinity"
    return f"{kind} at {first}" if first else kind
