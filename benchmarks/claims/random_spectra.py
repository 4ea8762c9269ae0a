"""Our own promise of `top_eigenpairs`: what is complete is right, on random spectra with copies."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures
from regjax import curvature

KINDS = (
    "identity", "zero", "signs", "rank one", "two values", "one multiple", "zero block", "clusters",
    "many multiples", "outliers above a bulk",
)  # fmt: skip
ENDS = ("LA", "SA", "LM", "BE")
# (order, number of pairs): a few, as many as fit into the default basis of 48, and more.
_SIZES = ((20, 4), (48, 7), (120, 5))
_TOL = 1e-3


def eigenvalues(kind: str, size: int, copies: int, random: np.random.Generator) -> np.ndarray:
    """A spectrum of a kind, with an eigenvalue that comes `copies` times where the kind has one."""
    rest = random.normal(size=size - copies)
    if kind == "identity":
        return np.ones(size)
    if kind == "zero":
        return np.zeros(size)
    if kind == "signs":
        return random.permutation(np.r_[np.ones(copies), -np.ones(size - copies)])
    if kind == "rank one":
        return np.r_[random.choice([-3.0, 3.0]), np.zeros(size - 1)]
    if kind == "two values":
        return np.r_[np.full(copies, random.normal()), np.full(size - copies, random.normal())]
    if kind == "one multiple":
        return np.r_[np.full(copies, random.normal()), rest]
    if kind == "zero block":
        return np.r_[np.zeros(copies), rest]
    if kind == "clusters":
        centres = random.normal(size=max(1, size // copies))
        return random.choice(centres, size) * (1 + 1e-7 * random.normal(size=size))
    if kind == "many multiples":
        return np.repeat(1 / np.arange(1, size + 1), copies)[:size]
    return np.r_[100.0, 50.0, 20.0, 1e-2 * random.normal(size=size - 3)]


def matrix_of(values: np.ndarray, random: np.random.Generator, *, blocks: bool = False) -> Any:
    """A symmetric matrix with these eigenvalues, in random directions, all or each half of them."""
    size = len(values)
    vectors = np.zeros((size, size))
    cuts = (0, size // 2, size) if blocks else (0, size)
    for start, stop in itertools.pairwise(cuts):
        part = random.normal(size=(stop - start, stop - start))
        vectors[start:stop, start:stop] = np.linalg.qr(part)[0]
    matrix = (vectors * random.permutation(values)) @ vectors.T
    return (matrix + matrix.T) / 2


def solver_of(size: int, k: int, which: str) -> Any:
    """One compiled program for all matrices of an order: (matrix, key) -> `EigenResult`."""

    def solve(matrix: jax.Array, key: jax.Array) -> curvature.EigenResult:
        operator = curvature.from_matvec(Partial(jnp.matmul, matrix), jnp.zeros(size, matrix.dtype))
        return curvature.top_eigenpairs(operator, k, key=key, which=which, tol=_TOL)

    return jax.jit(solve)


def look(solve: Any, matrix: np.ndarray, dtype: Any, k: int, which: str, seed: int) -> Record:
    """What a run says of a matrix, and what is true of it."""
    given = jnp.asarray(matrix, dtype)
    result = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), solve(given, jax.random.key(seed))
    )
    matrix = np.asarray(given, np.float64)
    exact = np.linalg.eigvalsh(matrix)
    size = np.abs(exact).max()
    error = np.abs(ranked(result.values, which) - ranked(wanted(exact, k, which), which)).max()
    residuals = result.vectors @ matrix - result.values[:, None] * result.vectors
    lengths = np.linalg.norm(residuals, axis=1) / np.linalg.norm(result.vectors, axis=1)
    return {
        "complete": float(result.complete),
        "converged": float(result.converged.all()),
        # Two lists within the tolerance of the same one may be twice as far apart.
        "wrong": float(error > 2 * _TOL * size),
        "promised": float(result.miss_probability),
        "bound": float(np.max(lengths / np.maximum(result.residual_norms, 1e-300))),
        "products": float(result.num_matvecs),
    }


def ranked(values: np.ndarray, which: str) -> np.ndarray:
    """The values in an order in which lists of one end can be compared."""
    return np.sort(np.abs(values) if which == "LM" else values)


def wanted(exact: np.ndarray, k: int, which: str) -> np.ndarray:
    """The wanted ones of all eigenvalues."""
    ascending = np.sort(exact)
    if which == "LM":
        return ascending[np.argsort(-np.abs(ascending))[:k]]
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return np.r_[ascending[:low], ascending[len(exact) - (k - low) :]]


def _settings(preset: str) -> Sequence[Settings]:
    matrices = 1 if preset == "smoke" else 5
    sizes = _SIZES[:1] if preset == "smoke" else _SIZES
    dtypes = ("float32",) if preset == "smoke" else ("float32", "float64")
    return [
        {"size": size, "k": k, "which": which, "dtype": dtype, "matrices": matrices}
        for size, k in sizes
        for which in ENDS
        for dtype in dtypes
    ]


def _run(settings: Settings) -> dict[str, float]:
    size, k, which = settings["size"], settings["k"], settings["which"]
    random = np.random.default_rng([size, ENDS.index(which), settings["dtype"] == "float64"])
    with jax.enable_x64(settings["dtype"] == "float64"):
        solve = solver_of(size, k, which)
        found = []
        for seed in range(settings["matrices"]):
            for kind in KINDS:
                # Below, at and above a multiplicity.
                copies = int(random.choice([k - 1, k, k + 1, random.integers(1, size)]))
                values = eigenvalues(kind, size, copies, random)
                matrix = matrix_of(values, random, blocks=bool(seed % 2))
                found.append(look(solve, matrix, settings["dtype"], k, which, seed))
    numbers = functools.partial(_claims.numbers, found)
    is_complete = numbers("complete") == 1
    return {
        "runs": len(found),
        "complete": float(is_complete.sum()),
        "converged": float(numbers("converged").sum()),
        "wrong": float(numbers("wrong")[is_complete].sum()),
        "promised": float(numbers("promised")[is_complete].sum()),
        "bound": float(numbers("bound").max()),
        "products": float(numbers("products").mean()),
    }


def _judge(records: Sequence[Record]) -> list[Verdict]:
    runs, complete, wrong, promised = (
        _claims.numbers(records, name).sum() for name in ("runs", "complete", "wrong", "promised")
    )
    small = [record for record in records if record["size"] <= 48]
    left = (_claims.numbers(small, "runs") - _claims.numbers(small, "complete")).sum()
    bound = _claims.numbers(records, "bound").max()
    return [
        Verdict(
            f"{_claims.word(wrong <= promised + 2 * np.sqrt(promised))}: what is complete is right",
            f"{wrong:g} wrong lists among {complete:g} complete ones of {runs:g} matrices; "
            f"{promised:.2f} is the sum of their miss probabilities",
        ),
        Verdict(
            f"{_claims.word(left == 0)}: all is found where the order fits into the basis",
            f"{left:g} of {_claims.numbers(small, 'runs').sum():g} are not complete; "
            f"{runs - complete:g} of all",
        ),
        Verdict(
            f"{_claims.word(bound <= 1)}: residual norms are bounds",
            f"the true residual is at most {bound:.4f} of what is claimed",
        ),
    ]


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(2.3)
    words = {"LA": "largest", "SA": "smallest", "LM": "largest\nmagnitude", "BE": "both\nends"}
    panels = figure.subplots(1, 2)
    shown = {"products": "matrix products (mean)", "bound": "largest residual / its bound"}
    lines = list(dict.fromkeys((r["size"], r["dtype"]) for r in records))
    ends = [end for end in ENDS if _claims.select(records, which=end)]
    for axes, (name, text) in zip(panels, shown.items(), strict=True):
        for i, (size, dtype) in enumerate(lines):
            own = _claims.select(records, size=size, dtype=dtype)
            style = {**_figures.look(i), "linestyle": ""}
            places = [ends.index(r["which"]) + _figures.side(i, len(lines)) for r in own]
            axes.plot(
                places,
                _claims.numbers(own, name),
                **style,
                label=f"matrices of order {size}, {dtype}",
            )
        axes.set_xticks(range(len(ends)), [words[end] for end in ends])
        _figures.label(axes, x="wanted eigenvalues", y=text)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    _figures.level(panels[1], 1, "promised: not above")
    wrong, complete = (int(_claims.numbers(records, name).sum()) for name in ("wrong", "complete"))
    return (
        f"{wrong} of {complete} lists that are called complete are wrong. Each point sums up the "
        "random matrices of one order and precision."
    )


CLAIM = _claims.Claim(
    name="random_spectra",
    paper="ours (`top_eigenpairs`)",
    statement="a list of eigenvalues that is called complete is right on random spectra with "
    "multiplicities of all kinds",
    printed="nothing: it is our own promise",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
