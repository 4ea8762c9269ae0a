"""The search for eigenvalues that a Krylov space passed over, and when it may end.

A Krylov space of one start never sees the second copy of a multiple eigenvalue. The search goes on
from a fresh random start q, orthogonal to the rows so far. How long? Let u be a unit eigenvector,
A u = lambda u, that was passed over: orthogonal to those rows. Its overlap c = <u, q> is unknown,
but its overlaps with all later rows are known multiples of it: from <u, A q> = lambda <u, q> and
A q = sum_i (Q A Q')_i q_i + beta q_next follows

    <u, q_next> = (lambda <u, q> - sum_i (Q A Q')_i <u, q_i>) / beta.

The rows are orthonormal and u has norm one, so c^2 sum_i (<u, q_i> / c)^2 <= 1: the sum, which
grows like the square of a Chebyshev polynomial, bounds c. A random start in N dimensions has an
overlap below d with probability at most d sqrt(2 N / pi); once that is negligible, there is no
such u.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax.curvature._lanczos import Krylov

# Accepted probability that an eigenvalue beyond the target is overlooked. Each digit more costs
# some four products on a trained network.
_MISS = 1e-2


class Search(NamedTuple):
    """What the search knows; index 0 looks above the first target, 1 below the second.

    Attributes:
      active: (), bool, whether a search is under way.
      is_first: (), bool, whether it is the first one, which keeps the basis as it was.
      own: (rows, rows), projector on the search's own directions, in the basis: s' own s is how
        much of a vector s of norm 1 lies in them.
      steps: (), int32, products since it began.
      targets: (2,), eigenvalues at or beyond them are searched for.
      overlaps: (2, rows), <u, q> / c for each row, u an eigenvector to the target.
      next_overlap: (2,), the same for the direction to come.
      evidence: (2,), the largest sum of squares of the overlaps so far.
    """

    active: jax.Array
    is_first: jax.Array
    own: jax.Array
    steps: jax.Array
    targets: jax.Array
    overlaps: jax.Array
    next_overlap: jax.Array
    evidence: jax.Array


def begin(targets: jax.Array, num_rows: int, active: Any, is_first: Any = False) -> Search:
    """The search before its first product."""
    return Search(
        active=jnp.asarray(active),
        is_first=jnp.asarray(is_first),
        own=jnp.zeros((num_rows, num_rows), targets.dtype),
        steps=jnp.int32(0),
        targets=targets,
        overlaps=jnp.zeros((2, num_rows), targets.dtype),
        next_overlap=jnp.ones_like(targets),
        evidence=jnp.zeros_like(targets),
    )


def follow(search: Search, krylov: Krylov) -> Search:
    """The overlaps after one more product."""
    last = krylov.filled - 1
    overlaps = search.overlaps.at[:, last].set(search.next_overlap)
    beyond = search.targets * search.next_overlap - overlaps @ krylov.projected[:, last]
    # An invariant space holds every eigenvector with any overlap at all.
    ahead = jnp.where(krylov.broke_down, jnp.inf, beyond / krylov.beta)
    return search._replace(
        own=search.own.at[last, last].set(1),
        steps=search.steps + 1,
        overlaps=overlaps,
        next_overlap=ahead,
        # fmax passes over the NaN that follow an infinity.
        evidence=jnp.fmax(search.evidence, jnp.sum(overlaps**2, 1) + ahead**2),
    )


def targets_of(values: jax.Array, k: int, which: str) -> jax.Array:
    """(2,), the ends of the k wanted values (they come first), between which nothing is wanted."""
    wanted = values[:k]
    if which == "LM":
        above = jnp.min(jnp.abs(wanted))
        return jnp.stack([above, -above])
    if which == "BE":
        num_high = (k + 1) // 2
        ranked = jnp.sort(wanted)
        return jnp.stack([ranked[-num_high], ranked[max(k - num_high - 1, 0)]])
    return jnp.stack([wanted[k - 1], wanted[k - 1]])


def is_over(
    search: Search,
    values: jax.Array,
    small: jax.Array,
    inside: jax.Array,
    *,
    k: int,
    which: str,
    size: int,
) -> jax.Array:
    """Whether an eigenvalue beyond the targets would have shown itself by now.

    Either the overlaps say so, or the outermost pair of the search has converged: then what could
    still hide is closer to it than the tolerance.

    Args:
      search: as it stands.
      values: (rows,), Ritz values, the wanted ones first.
      small: (rows,), bool, which have converged.
      inside: (rows,), bool, which belong to the search.
      k: number of wanted pairs.
      which: end of the spectrum.
      size: order of the matrix.
    """
    highest = jnp.max(jnp.where(inside, values, -jnp.inf))
    lowest = jnp.min(jnp.where(inside, values, jnp.inf))
    reached = jnp.stack([highest >= search.targets[0], lowest <= search.targets[1]])
    met = [jnp.any(small & inside & (values == end)) for end in (highest, lowest)]
    closed = jnp.stack(met) & (search.steps >= fewest_steps(size))
    clear = closed | (~reached & (_miss_probabilities(search, size) <= _MISS))
    return jnp.all(clear | ~_searched(k, which))


def miss_probability(search: Search, *, k: int, which: str, size: int) -> jax.Array:
    """(), bound on the probability that an eigenvalue beyond the targets was passed over."""
    each = jnp.where(_searched(k, which), _miss_probabilities(search, size), 0)
    return jnp.minimum(jnp.sum(each), 1)


def _miss_probabilities(search: Search, size: int) -> jax.Array:
    return jnp.sqrt(2 * size / math.pi / search.evidence)


def _searched(k: int, which: str) -> jax.Array:
    """(2,), bool, on which sides there are wanted eigenvalues."""
    above = which != "SA"
    below = which in ("SA", "LM") or (which == "BE" and k > 1)
    return jnp.asarray([above, below])


def fewest_steps(size: int) -> int:
    """Steps in which any eigenvalue far from the others shows itself.

    Kuczynski & Wozniakowski (1992): after j steps from a random start in n dimensions the largest
    Ritz value misses the largest eigenvalue by the whole spread with probability at most
    1.648 sqrt(n) exp(-(2 j - 1)).
    """
    return math.ceil((math.log(1.648 * math.sqrt(size) / _MISS) + 1) / 2)
