"""What summing more exactly costs the Lanczos recurrence, and what it gains."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import curvature

_ACCUMULATIONS = {"float32": None, "compensated": "compensated", "float64": "float64"}
_STEPS = 40
_NUM_VALUES = 5


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {"accumulation_small_mlp": functools.partial(_trained, "small_mlp", 64)}
    return {
        "accumulation_mlp": functools.partial(_trained, "mlp", 4096),
        "accumulation_diagonal": functools.partial(_diagonal, 1_000_000),
    }


def _trained(name: str, num_examples: int) -> Case:
    """Of a trained network's Hessian; the exact answer from products in float64."""
    problem = _problems.trained(name, num_examples)
    arrays = (problem.params, problem.x, problem.y)
    operator = curvature.hessian(problem.loss_fn, *arrays)
    start = _start(operator.shape[0])
    with jax.enable_x64(True):
        wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
        exact = curvature.hessian(problem.loss_fn, *jax.tree.map(wide, arrays))
        values = _leading(curvature.lanczos(exact, _like(exact, start), _STEPS))
    sizes = {"parameters": operator.shape[0], "examples": num_examples, "steps": _STEPS}
    return _case(operator, start, values, sizes)


def _diagonal(size: int) -> Case:
    """Of a diagonal matrix whose leading eigenvectors live on ten parameters."""
    random = np.random.default_rng(0)
    entries = np.minimum(np.abs(random.standard_cauchy(size)) * 1e-3, 0.5).astype(np.float32)
    entries[:10] = np.linspace(1, 10, 10)
    operator = curvature.from_matvec(
        jax.tree_util.Partial(jnp.multiply, jnp.asarray(entries)), jnp.zeros(size)
    )
    values = np.sort(entries.astype(np.float64))[: -_NUM_VALUES - 1 : -1]
    return _case(operator, _start(size), values, {"parameters": size, "steps": _STEPS})


def _case(
    operator: curvature.Operator, start: np.ndarray, values: np.ndarray, sizes: Mapping[str, Any]
) -> Case:
    def solve(accumulation: str | None) -> curvature.LanczosResult:
        with jax.enable_x64(accumulation == "float64"):
            vector = _like(operator, start)
            return curvature.lanczos(operator, vector, _STEPS, accumulation=accumulation)

    def error(label: str, answer: curvature.LanczosResult) -> float:
        del label
        return float(np.max(np.abs(_leading(answer) - values)) / values[0])

    def facts(answers: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
        del seconds
        return {f"orthogonality, {label}": _defect(run.basis) for label, run in answers.items()}

    return Case(
        candidates={
            label: functools.partial(solve, accumulation)
            for label, accumulation in _ACCUMULATIONS.items()
        },
        error=error,
        tolerance=1e-5,
        sizes=sizes,
        facts=facts,
    )


def _start(size: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=size)


def _like(operator: curvature.Operator, flat: np.ndarray) -> Any:
    """The vector as a tree like the parameters."""
    return operator.space.unravel(jnp.asarray(flat, operator.dtype))


def _leading(run: curvature.LanczosResult) -> np.ndarray:
    """The largest Ritz values, from T in float64."""
    alphas, betas = np.asarray(run.alphas, np.float64), np.asarray(run.betas, np.float64)
    matrix = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
    return np.linalg.eigvalsh(matrix)[: -_NUM_VALUES - 1 : -1]


def _defect(basis: Any) -> float:
    """The largest inner product of two vectors, which are stacked along each leaf's first axis."""
    gram = np.zeros((_STEPS, _STEPS))
    for leaf in jax.tree.leaves(basis):
        rows = np.asarray(leaf).reshape(_STEPS, -1)
        for i in range(0, rows.shape[1], 65536):
            part = rows[:, i : i + 65536].astype(np.float64)
            gram = gram + part @ part.T
    return float(np.max(np.abs(gram - np.diag(np.diag(gram)))))
