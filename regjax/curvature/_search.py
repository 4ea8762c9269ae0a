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

No certificate from the same products does better: for each c that the sum allows there is a matrix
that gives the same products and has such an eigenvector.

A list of one needs no second start, because copies of its only value do not change it. Only an
eigenvalue beyond it does, and the first start, if it is random, saw its eigenvector u as any other.
With Q A Q' = S diag(theta) S', residuals r_i along the direction q to come, and the part s of u in
the Ritz vectors, (lambda - theta_i) s_i = r_i <u, q>, so that

    |<u, q> / <u, first row>| = prod_i |lambda - theta_i| / prod_j beta_j,

and <u, first row>^2 (<u, q> / <u, first row>)^2 (1 + sum_i (r_i / (lambda - theta_i))^2) <= 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax.curvature._krylov import Krylov

# Accepted probability that an eigenvalue beyond the target is overlooked, by all searches of a run
# together. Each digit more costs some four products on a trained network.
_MISS = 1e-2
# The logarithm of more growth than any matrix has: an invariant space holds every eigenvector with
# any overlap at all.
_UNBOUNDED = 1e6


class Search(NamedTuple):
    """What the search knows; index 0 looks above the first target, 1 below the second.

    Attributes:
      num_searches: (), int32, how many there were, this one included; 0: none is under way. The
        first one keeps the basis as it was.
      own: (rows, rows), projector on the search's own directions, in the basis: s' own s is how
        much of a vector s of norm 1 lies in them.
      known: (k,), the wanted values when it began.
      targets: (2,), eigenvalues beyond them are searched for.
      overlaps: (2, rows), <u, q> / c for each row, u an eigenvector to the target.
      next_overlap: (2,), the same for the direction to come.
      evidence: (2,), the largest sum of squares of the overlaps so far.
      growth: (2,), log |<u, q> / <u, first row>| less the terms of the Ritz values at hand.
    """

    num_searches: jax.Array
    own: jax.Array
    known: jax.Array
    targets: jax.Array
    overlaps: jax.Array
    next_overlap: jax.Array
    evidence: jax.Array
    growth: jax.Array

    @property
    def active(self) -> jax.Array:
        """(), bool, whether a search is under way."""
        return self.num_searches > 0


def begin(known: jax.Array, targets: jax.Array, *, num_rows: int, num_searches: Any) -> Search:
    """The search before its first product; arguments as the attributes."""
    return Search(
        num_searches=jnp.asarray(num_searches, jnp.int32),
        own=jnp.zeros((num_rows, num_rows), targets.dtype),
        known=known,
        targets=targets,
        overlaps=jnp.zeros((2, num_rows), targets.dtype),
        next_overlap=jnp.ones_like(targets),
        evidence=jnp.zeros_like(targets),
        growth=jnp.zeros_like(targets),
    )


def _certain(dtype: jnp.dtype) -> float:
    """The overlap at which nothing can have been missed; its square is still a number."""
    return float(jnp.finfo(dtype).max) ** 0.45


def follow(search: Search, krylov: Krylov) -> Search:
    """The overlaps after one more product."""
    last = krylov.filled - 1
    overlaps = search.overlaps.at[:, last].set(search.next_overlap)
    beyond = search.targets * search.next_overlap - overlaps @ krylov.projected[:, last]
    most = _certain(beyond.dtype)
    ahead = jnp.where(krylov.broke_down, most, jnp.clip(beyond / krylov.beta, -most, most))
    shrunk = jnp.log(jnp.where(krylov.broke_down, 1, krylov.beta))
    return search._replace(
        own=search.own.at[last, last].set(1),
        overlaps=overlaps,
        next_overlap=ahead,
        # fmax passes over the NaN that follow from too large overlaps.
        evidence=jnp.fmax(search.evidence, jnp.sum(overlaps**2, 1) + ahead**2),
        growth=search.growth + jnp.where(krylov.broke_down, _UNBOUNDED, -shrunk),
    )


def seen_from_start(
    search: Search, targets: jax.Array, values: jax.Array, couplings: jax.Array, exists: jax.Array
) -> Search:
    """The search that the run itself is, from its random start to targets beyond all Ritz values.

    Args:
      search: as it stands.
      targets: (2,).
      values: (rows,), Ritz values.
      couplings: (rows,), the part of each residual along the direction to come.
      exists: (rows,), bool, which are pairs.
    """
    distances = _distances(targets, values, exists)
    couplings = jnp.where(exists, couplings, 0)
    grown = 2 * (search.growth + jnp.sum(jnp.log(distances), 1))
    grown += jnp.log1p(jnp.sum((couplings[None] / distances) ** 2, 1))
    most = 2 * math.log(_certain(grown.dtype))
    # Rounded up: so much counts as certain.
    evidence = jnp.where(
        grown < most, jnp.exp(jnp.minimum(grown, most)), jnp.finfo(grown.dtype).max
    )
    return search._replace(targets=targets, evidence=evidence)


def compressed(search: Search, weights: jax.Array, values: jax.Array, dropped: jax.Array) -> Search:
    """The search after the rows were combined by `weights`, with some of the Ritz values dropped.

    Targets only move outwards, and the terms of dropped values grow with them.
    """
    return search._replace(
        own=weights.T @ search.own @ weights,
        overlaps=search.overlaps @ weights,
        growth=search.growth + jnp.sum(jnp.log(_distances(search.targets, values, dropped)), 1),
    )


def _distances(targets: jax.Array, values: jax.Array, counted: jax.Array) -> jax.Array:
    """(2, rows), of each target from the values that are counted, 1 from others; never 0."""
    distances = jnp.abs(targets[:, None] - values[None])
    least = float(jnp.finfo(values.dtype).tiny)
    return jnp.where(counted[None], jnp.maximum(distances, least), 1)


def targets_of(known: jax.Array, margin: jax.Array, which: str) -> jax.Array:
    """(2,), beyond which an eigenvalue changes the list of the `known` (k,) by the margin."""
    k = known.size
    if which == "LM":
        above = jnp.min(jnp.abs(known))
        ends = above, -above
    elif which == "BE":
        num_high = (k + 1) // 2
        ranked = jnp.sort(known)
        ends = ranked[-num_high], ranked[max(k - num_high - 1, 0)]
    else:
        ends = known[k - 1], known[k - 1]
    return jnp.stack([ends[0] + margin, ends[1] - margin])


def has_found(
    search: Search, values: jax.Array, inside: jax.Array, margin: jax.Array, which: str
) -> jax.Array:
    """Whether the list is another one than when the search began.

    Within a multiple eigenvalue the small eigenvectors are any basis, and what is new may be spread
    over all of them: so the list is asked as well as the single pairs.

    Args:
      search: as it stands.
      values: (rows,), Ritz values, the wanted ones first.
      inside: (rows,), bool, which belong to the search.
      margin: of which no notice is taken.
      which: end of the spectrum.
    """
    k = search.known.size
    ranked = lambda values: jnp.sort(jnp.abs(values) if which == "LM" else values)
    has_moved = jnp.any(jnp.abs(ranked(values[:k]) - ranked(search.known)) > margin)
    return has_moved | jnp.any(_reached(search, values, inside) & _searched(k, which))


def is_over(
    search: Search, values: jax.Array, inside: jax.Array, *, which: str, size: int
) -> jax.Array:
    """Whether an eigenvalue beyond the targets would have shown itself by now.

    The chance of an oversight is shared out among the searches, 1 / (s (s + 1)) of it to the s-th,
    so that all of a run have it together: each but the last could have been the last.

    Args:
      search: as it stands.
      values: (rows,), Ritz values, the wanted ones first.
      inside: (rows,), bool, which belong to the search.
      which: end of the spectrum.
      size: order of the matrix.
    """
    count = search.num_searches.astype(values.dtype)
    # Beyond all Ritz values of the search overlaps grow with the eigenvalue; the target stands for
    # all beyond it.
    clear = ~_reached(search, values, inside)
    clear &= _miss_probabilities(search, size) <= _MISS / (count * (count + 1))
    return jnp.all(clear | ~_searched(search.known.size, which))


def miss_probability(search: Search, *, which: str, size: int) -> jax.Array:
    """(), bound on the probability that an eigenvalue beyond the targets was passed over."""
    last = _miss_probabilities(search, size)
    # The shares of those before: 1/2 + 1/6 + ... = 1 - 1/s.
    before = _MISS * (1 - 1 / jnp.maximum(search.num_searches, 1).astype(last.dtype))
    is_searched = _searched(search.known.size, which)
    return jnp.minimum(jnp.sum(jnp.where(is_searched, before + last, 0)), 1)


def start_is_enough(search: Search, *, which: str, size: int) -> jax.Array:
    """Whether the run from its random start would have shown an eigenvalue beyond the targets."""
    clear = _miss_probabilities(search, size) <= _MISS
    return jnp.all(clear | ~_searched(search.known.size, which))


def is_alone(k: int, which: str) -> bool:
    """Whether each end has one wanted value at most, whose copies would not change the list."""
    return k == 1 or (k == 2 and which == "BE")


def _reached(search: Search, values: jax.Array, inside: jax.Array) -> jax.Array:
    """(2,), bool, whether a Ritz value of the search lies beyond its targets."""
    highest = jnp.max(jnp.where(inside, values, -jnp.inf))
    lowest = jnp.min(jnp.where(inside, values, jnp.inf))
    return jnp.stack([highest > search.targets[0], lowest < search.targets[1]])


def _miss_probabilities(search: Search, size: int) -> jax.Array:
    is_certain = search.evidence >= _certain(search.evidence.dtype) ** 2
    return jnp.where(is_certain, 0, jnp.sqrt(2 * size / math.pi / search.evidence))


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
