"""Traces and diagonals at equal products: errors of this library's estimators and of other tools'.

Matrices of the four kinds of spectra with which XTrace was introduced, of known trace. Every
candidate makes the same number of products from as many keys; errors are root mean squares over
them. Runs that a tool ends with NaN are counted and left out, which is a present to it.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks._timing import Case
from regjax import curvature

_SPECTRA: Mapping[str, Callable[[int], np.ndarray]] = {
    "flat": lambda size: 3 - 2 * np.arange(size) / (size - 1),
    "polynomial": lambda size: np.arange(1, size + 1) ** -2.0,
    "exponential": lambda size: 0.7 ** np.arange(size),
    "step": lambda size: np.where(np.arange(size) < size // 20, 1.0, 1e-3),
}
_OURS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
# The same estimator elsewhere -> ours.
_SAME = {
    "matfree xtrace": "xtrace",
    "matfree xnystrace": "xnystrace",
    "traceax xtrace": "xtrace",
    "traceax xnystrace": "xnystrace",
    "curvlinops xtrace": "xtrace",
}
_SAME_DIAGONAL = {
    "matfree xdiag": "xdiag",
    "matfree xnysdiag": "xnysdiag",
    "curvlinops xdiag": "xdiag",
}

Solve = Callable[[Any, Any], Any]
"""(matrix, key) -> (estimate, its standard error)."""


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    size, products, seeds = (40, 12, 20) if preset == "smoke" else (200, 40, 300)
    names = ("step",) if preset == "smoke" else tuple(_SPECTRA)
    trace = {
        f"trace_{name}": functools.partial(_trace, name, size, products, seeds) for name in names
    }
    diagonal = {
        f"diagonal_{name}": functools.partial(_diagonal, name, size, products, seeds)
        for name in names
    }
    return {**trace, **diagonal}


def _trace(name: str, size: int, products: int, seeds: int) -> Case:
    values = _SPECTRA[name](size)
    solves = {method: _ours(curvature.trace, method, products) for method in _OURS}
    solves |= _peers_of_trace(size, products)
    return _case(values, solves, np.sum(values), _SAME, products, seeds)


def _diagonal(name: str, size: int, products: int, seeds: int) -> Case:
    values = _SPECTRA[name](size)
    methods = ("hutchinson", "hutch++", "xdiag", "xnysdiag")
    solves = {method: _ours(curvature.diagonal, method, products) for method in methods}
    solves |= _peers_of_diagonal(size, products)
    exact = np.diag(_matrix(values))
    return _case(values, solves, exact, _SAME_DIAGONAL, products, seeds)


def _case(
    values: np.ndarray, solves: Mapping[str, Solve], exact: Any, same: Mapping[str, str],
    products: int, seeds: int,
) -> Case:  # fmt: skip
    matrix = jnp.asarray(_matrix(values), jnp.float32)
    keys = jax.random.split(jax.random.key(0), seeds)

    def together(solve: Solve) -> Callable[[], Any]:
        if getattr(solve, "is_torch", False):
            return lambda: solve(matrix, seeds)
        # One after the other: XLA on CPU does not return from some peers' batched solves.
        mapped = jax.jit(lambda matrix, keys: jax.lax.map(lambda key: solve(matrix, key), keys))
        return lambda: mapped(matrix, keys)

    def off(answer: Any) -> np.ndarray:
        return np.asarray(answer[0], np.float64) - exact

    def error(label: str, answer: Any) -> float:
        del label
        return float(np.nanmedian(np.abs(off(answer))) / np.linalg.norm(exact))

    def facts(answers: Any, seconds: Any) -> dict[str, float]:
        del seconds
        size = np.linalg.norm(exact) / np.sqrt(np.size(exact))
        rms = {label: np.sqrt(np.nanmean(off(a) ** 2)) for label, a in answers.items()}
        found = {f"{label} error": value / size for label, value in rms.items()}
        for label, answer in answers.items():
            stated = np.asarray(answer[1], np.float64)
            if np.isfinite(stated).any():  # not every tool gives errors
                ratio = np.sqrt(np.nanmean(stated**2)) / rms[label]
                found[f"{label} estimated / true error"] = ratio
            lost = 1 - np.mean(np.isfinite(off(answer)))
            if lost:
                found[f"{label} share of NaN"] = lost
        peers = {label: ours for label, ours in same.items() if label in rms}
        return found | {
            f"{ours} / {label}": rms[ours] / rms[label] for label, ours in peers.items()
        }

    return Case(
        candidates={label: together(solve) for label, solve in solves.items()},
        error=error,
        tolerance=0.5,
        sizes={"size": len(values), "products": products, "seeds": seeds, "dtype": "float32"},
        facts=facts,
        # Of as many seeds a ratio of two equal errors is known to about 5 %.
        bars={f"{ours} / {label}": 1.05 for label, ours in same.items() if label in solves},
    )


def _matrix(values: np.ndarray) -> np.ndarray:
    """A random symmetric matrix with these eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(values.size, values.size)))[0]
    return (basis * values) @ basis.T


def _ours(function: Callable[..., Any], method: str, products: int) -> Solve:
    def solve(matrix: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        operator = curvature.from_matvec(Partial(jnp.matmul, matrix), matrix[0])
        found = function(operator, key=key, num_matvecs=products, method=method)
        return found.value, found.standard_error

    return solve


def _is_there(*modules: str) -> bool:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{modules[0]}: skipped, {' and '.join(missing)} not installed")
    return not missing


def _peers_of_trace(size: int, products: int) -> dict[str, Solve]:
    solves: dict[str, Solve] = {}
    if _is_there("matfree"):
        from matfree import stochtrace

        like, half = jnp.zeros(size), products // 2
        solves["matfree xtrace"] = _matfree(
            stochtrace.leave_one_out_xtrace(), stochtrace.sampler_normal(like, num=half)
        )
        solves["matfree xnystrace"] = _matfree(
            stochtrace.leave_one_out_xnystrace(), stochtrace.sampler_normal(like, num=products)
        )
    if _is_there("traceax", "lineax"):
        import traceax

        solves["traceax xtrace"] = _traceax(traceax.XTraceEstimator(), products)
        solves["traceax xnystrace"] = _traceax(traceax.XNysTraceEstimator(), products)
    if _is_there("curvlinops", "torch"):
        import curvlinops

        solves["curvlinops xtrace"] = _curvlinops(curvlinops.xtrace, products)
    return solves


def _peers_of_diagonal(size: int, products: int) -> dict[str, Solve]:
    solves: dict[str, Solve] = {}
    if _is_there("matfree"):
        from matfree import stochtrace

        like, half = jnp.zeros(size), products // 2
        solves["matfree xdiag"] = _matfree(
            stochtrace.leave_one_out_xdiag(), stochtrace.sampler_signs(like, num=half)
        )
        solves["matfree xnysdiag"] = _matfree(
            stochtrace.leave_one_out_xnysdiag(), stochtrace.sampler_signs(like, num=products)
        )
    if _is_there("curvlinops", "torch"):
        import curvlinops

        solves["curvlinops xdiag"] = _curvlinops(curvlinops.xdiag, products)
    return solves


def _matfree(integrand: Any, sampler: Any) -> Solve:
    from matfree import stochtrace

    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(integrand, sampler)
    return lambda matrix, key: estimate(lambda v: matrix @ v, key)


def _traceax(estimator: Any, products: int) -> Solve:
    import lineax

    def solve(matrix: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        operator = lineax.MatrixLinearOperator(matrix, lineax.positive_semidefinite_tag)
        value, more = estimator.estimate(key, operator, products)
        return value, more["std.err"]

    return solve


def _curvlinops(estimate: Callable[..., Any], products: int) -> Solve:
    """An estimator of a tensor, with signs as by default, without errors. (matrix, seeds)."""
    import torch

    def solve(matrix: jax.Array, seeds: Any) -> tuple[np.ndarray, np.ndarray]:
        tensor = torch.tensor(np.asarray(matrix))
        values = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            values.append(estimate(tensor, products).numpy())
        return np.asarray(values), np.full(seeds, np.nan)

    solve.is_torch = True  # type: ignore[attr-defined]
    return solve
