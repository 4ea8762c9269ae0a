"""Our own promise of `top_eigenpairs`: how often a copy is missed, and how often that may be."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy import stats

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures
from regjax import curvature
from regjax.curvature import _search

ACCEPTED = (0.01, 0.1, 0.5)
# (order, number of pairs): for one pair the random start itself is the certificate.
SIZES = ((60, 1), (120, 4), (200, 8))
_TOL = 1e-3


def spectrum(size: int, k: int, random: np.random.Generator) -> np.ndarray:
    """Eigenvalues whose k-th one is a copy that is missed easily, in descending order.

    The one before it is the same, or the same again (for k = 1 it is alone). What a list has in its
    place if it is missed lies a little further below than the tolerance, or up to thirty times
    that; then comes the rest, which starts just as closely.
    """
    copies = min(k, int(random.integers(2, 4)))
    gaps = _TOL * 1.1 * 30 ** random.random(2)
    above = np.sort(1 + random.random(k - copies))[::-1]
    largest = above[0] if above.size else 1.0
    after = 1 - gaps[0] * largest
    below = np.sort((after - gaps[1]) * random.random(size - k - 1))[::-1]
    return np.r_[above, np.ones(copies), after, below]


@contextlib.contextmanager
def accepting(probability: float) -> Iterator[None]:
    """Searches traced inside end when a copy is missed with such a probability, not 0.01."""
    # What was traced before has the old one, and is kept.
    jax.clear_caches()
    with mock.patch.object(_search, "_MISS", probability):
        yield
    jax.clear_caches()


def missed(size: int, k: int, accepted: float, seeds: Sequence[int]) -> list[Record]:
    """For each seed whether a list was complete, whether it was wrong, and what was promised."""

    def solve(values: jax.Array, key: jax.Array) -> curvature.EigenResult:
        operator = curvature.from_matvec(Partial(jnp.multiply, values), values)
        return curvature.top_eigenpairs(operator, k, key=key, tol=_TOL)

    found = []
    with contextlib.nullcontext() if accepted == _search._MISS else accepting(accepted):
        compiled = jax.jit(solve)
        for seed in seeds:
            # The starts have no direction of their own: a diagonal matrix stands for all.
            exact = spectrum(size, k, np.random.default_rng([size, seed])).astype(np.float32)
            result = jax.device_get(compiled(exact, jax.random.key(seed)))
            off = np.abs(np.asarray(result.values) - exact[:k]).max()
            found.append({
                "complete": float(result.complete),
                "wrong": float(off > _TOL * exact[0]),
                "promised": float(result.miss_probability),
                "products": float(result.num_matvecs),
            })  # fmt: skip
    return found


def interval(count: float, of: float) -> tuple[float, float]:
    """The 95 % interval of Clopper and Pearson for a probability, from so many cases."""
    low = stats.beta.ppf(0.025, count, of - count + 1) if count else 0.0
    high = stats.beta.ppf(0.975, count + 1, of - count) if count < of else 1.0
    return float(low), float(high)


def _settings(preset: str) -> Sequence[Settings]:
    matrices = (4, 4, 4) if preset == "smoke" else (666, 667, 667)
    return [
        {"size": size, "k": k, "accepted": accepted, "matrices": count}
        for accepted in (ACCEPTED[:1] if preset == "smoke" else ACCEPTED)
        for (size, k), count in zip(SIZES, matrices, strict=True)
    ]


def _run(settings: Settings) -> dict[str, float]:
    runs = range(settings["matrices"])
    found = missed(settings["size"], settings["k"], settings["accepted"], runs)
    numbers = functools.partial(_claims.numbers, found)
    is_complete = numbers("complete") == 1
    return {
        "complete": float(is_complete.sum()),
        "wrong": float(numbers("wrong")[is_complete].sum()),
        "promised": float(numbers("promised")[is_complete].sum()),
        "products": float(numbers("products").mean()),
    }


def _sums(records: Sequence[Record]) -> tuple[float, float, float, float]:
    """Matrices, complete lists, wrong ones among them, and how many wrong ones were promised."""
    names = ("matrices", "complete", "wrong", "promised")
    matrices, complete, wrong, promised = (_claims.numbers(records, name).sum() for name in names)
    return matrices, complete, wrong, promised


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for accepted, own in _claims.groups(records, "accepted").items():
        matrices, complete, wrong, promised = _sums(own)
        low, high = interval(wrong, complete)
        verdicts.append(
            Verdict(
                f"{_claims.word(low <= accepted)}: a copy is missed with a probability of at most "
                f"{accepted:g} where that is accepted",
                f"{wrong:g} wrong lists among {complete:g} complete ones of {matrices:g} matrices: "
                f"{wrong / complete:.4f}, with 95 % between {low:.4f} and {high:.4f}; "
                f"{promised:.1f} is the sum of their miss probabilities",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(2.3)
    axes = figure.subplots(1, 1)
    sizes = list(dict.fromkeys((r["size"], r["k"]) for r in records))
    accepted = list(_claims.groups(records, "accepted"))
    for i, (size, k) in enumerate(sizes):
        own = _claims.select(records, size=size, k=k)
        shares = _claims.numbers(own, "wrong") / _claims.numbers(own, "complete")
        ends = np.transpose([interval(r["wrong"], r["complete"]) for r in own])
        places = [accepted.index(r["accepted"]) + _figures.side(i, len(sizes)) for r in own]
        style = {**_figures.look(i), "linestyle": "", "capsize": 2}
        bars = np.abs(ends - shares)
        axes.errorbar(places, shares, yerr=bars, label=f"order {size}, k = {k}", **style)
    for place, value in enumerate(accepted):
        axes.plot([place - 0.35, place + 0.35], [value] * 2, color="black", linewidth=1)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(accepted)), [f"{value:g}" for value in accepted])
    _figures.label(axes, x="accepted probability (black lines)", y="share of wrong lists")
    return (
        "Share of the lists called complete from which a copy is missing; bars: 95 % intervals. "
        "The library accepts 0.01; larger values show how close the bound is."
    )


CLAIM = _claims.Claim(
    name="missed_copies",
    paper="ours (`top_eigenpairs`)",
    statement="a copy of a multiple eigenvalue at the end of the list is missed as rarely as is "
    "promised",
    printed="nothing: it is our own promise",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
