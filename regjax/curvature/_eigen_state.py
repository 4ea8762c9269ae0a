"""The state of `top_eigenpairs` between two products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax._on_host import on_host
from regjax.curvature import _search
from regjax.curvature._krylov import Krylov


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "krylov", "search", "tol", "num_matvecs", "num_restarts",
        "weights", "values", "bounds", "largest", "threshold", "small", "mass",
        "wants_restart", "wants_search", "done", "num_assessed", "next_assessment",
    ],
    meta_fields=["k", "which", "num_rows", "certificate"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class EigenState:
    """The solver between two products.

    Attributes:
      krylov: the basis with Q A Q'.
      search: the search for missed eigenvalues.
      tol: (), relative tolerance.
      num_matvecs: (), int32, products so far.
      num_restarts: (), int32, how often the basis was compressed.
      weights: (rows, rows), columns: the small eigenvectors, wanted ones first.
      values: (rows,), Ritz values in the same order.
      bounds: (rows,), their residual norms.
      largest: (), the largest magnitude of a Ritz value so far. A restart may drop the pair.
      threshold: (), the residual norm that is small enough.
      small: (rows,), bool, which of them meet it.
      mass: (rows,), how much of each lies in the search's own directions, between 0 and 1.
      wants_restart: (), bool, whether the basis must be compressed first.
      wants_search: (), bool, whether it is time for a (further) search.
      done: (), bool, whether nothing more is to be gained.
      num_assessed: (), int32, products at the last assessment: all numbers from `weights` on are of
        that time. next_assessment: (), int32, products at the next one, if nothing happens before.
      k: number of wanted pairs. which: end of the spectrum. num_rows: rows in use at most.
      certificate: what tells that nothing was missed: a "search" for copies, or the random "start"
        itself; None: nothing does.
    """

    krylov: Krylov
    search: _search.Search
    tol: jax.Array
    num_matvecs: jax.Array
    num_restarts: jax.Array
    weights: jax.Array
    values: jax.Array
    bounds: jax.Array
    largest: jax.Array
    threshold: jax.Array
    small: jax.Array
    mass: jax.Array
    wants_restart: jax.Array
    wants_search: jax.Array
    done: jax.Array
    num_assessed: jax.Array
    next_assessment: jax.Array
    k: int
    which: str
    num_rows: int
    certificate: str | None


def unbounded(dtype: jnp.dtype) -> float:
    """The bound of what is no pair: a number, for infinity may be what a user looks for."""
    return float(jnp.finfo(dtype).max)


@on_host(static=(2, 3, 4, 5))
def without_pairs(
    krylov: Krylov, tol: ArrayLike, k: int, which: str, num_rows: int, certificate: str | None
) -> EigenState:
    """The state before the first product."""
    rows, dtype = krylov.basis.num_rows, krylov.projected.dtype
    return EigenState(
        krylov=krylov,
        search=_search.begin(
            jnp.zeros(k, dtype), jnp.zeros(2, dtype), num_rows=rows, num_searches=0
        ),
        tol=jnp.asarray(tol, dtype),
        num_matvecs=jnp.int32(0),
        num_restarts=jnp.int32(0),
        weights=jnp.zeros((rows, rows), dtype),
        values=jnp.zeros(rows, dtype),
        bounds=jnp.full(rows, unbounded(dtype), dtype),
        largest=jnp.zeros((), dtype),
        threshold=jnp.zeros((), dtype),
        small=jnp.zeros(rows, bool),
        mass=jnp.zeros(rows, dtype),
        wants_restart=jnp.bool_(False),
        wants_search=jnp.bool_(False),
        done=jnp.bool_(False),
        num_assessed=jnp.int32(0),
        next_assessment=jnp.int32(k),
        k=k,
        which=which,
        num_rows=num_rows,
        certificate=certificate,
    )
