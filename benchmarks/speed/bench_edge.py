"""Curvature while it trains: warm starts over cold ones, critical sharpness over forward passes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import curvature, diagnostics

_CRITICAL, _WARM = 1.1, 0.5
_PASSES = 10
_BATCH, _RATE = 64, 0.01


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {
            "critical_small_mlp_64": functools.partial(_critical, "small_mlp", 64, False),
            "warm_small_mlp_1": functools.partial(_warm, "small_mlp", 256, 1, 10, False),
        }
    found: dict[str, Callable[[], Case]] = {}
    for name, examples in (("mlp", 128), ("mlp", 512), ("resnet", 32)):
        found[f"critical_{name}_{examples}"] = functools.partial(_critical, name, examples, True)
    for name, examples in (("mlp", 1024), ("resnet", 128)):
        for k in (1, 5, 10):
            for gap in (1, 10):
                found[f"warm_{name}_{k}_{gap}"] = functools.partial(
                    _warm, name, examples, k, gap, True
                )
    return found


def _critical(name: str, examples: int, has_bars: bool) -> Case:
    """Along the negative gradient, over as many forward passes as are allowed at most."""
    problem = _problems.trained(name, max(examples, 512) if name != "small_mlp" else 1437)
    loss_fn, params, batch = problem.loss_fn, problem.params, (problem.x, problem.y)
    x, y = (array[:examples] for array in batch)
    grads = jax.jit(jax.grad(loss_fn))(params, x, y)
    updates = jax.tree.map(lambda g: -_RATE * g, grads)
    forward = jax.jit(loss_fn)
    measure = functools.partial(diagnostics.critical_sharpness, learning_rate=_RATE)
    # As in a training step; with convolutions, which are slow in loops, the host drives.
    compiled = measure if name == "resnet" else jax.jit(measure)
    start = float(forward(params, x, y))

    def along(rate: float) -> float:
        return float(forward(jax.tree.map(lambda w, g: w - rate * g, params, grads), x, y))

    def error(label: str, answer: Any) -> float:
        if label == "forward passes":
            return abs(float(answer) - start)
        # The loss is lower at one end of the bracket and higher at the other.
        below, above = along(2 / float(answer.upper_bound)), along(2 / float(answer.lower_bound))
        is_right = bool(answer.resolved) and below < start < above
        return 0.0 if is_right and int(answer.num_evaluations) <= _PASSES else 1.0

    return Case(
        candidates={
            "forward passes": lambda: [forward(params, x, y) for _ in range(_PASSES)][-1],
            "critical_sharpness": lambda: compiled(loss_fn, params, updates, x, y),
            "called from Python": lambda: measure(loss_fn, params, updates, x, y),
        },
        error=error,
        tolerance=1e-4,
        sizes={"network": name, "examples": examples, "passes": _PASSES},
        facts=lambda answers, seconds: {
            "passes made": float(answers["critical_sharpness"].num_evaluations)
        },
        bars={"critical_sharpness": _CRITICAL} if has_bars else {},
    )


def _warm(name: str, num_examples: int, k: int, gap: int, has_bars: bool) -> Case:
    """Products from the eigenvectors so many steps of SGD before, over those from random starts."""
    problem = _problems.trained(name, 4096 if name != "small_mlp" else 1437)
    batch = problem.x[:num_examples], problem.y[:num_examples]
    tx = optax.sgd(_RATE, 0.9)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(problem.loss_fn)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    # Momentum has set in when the first checkpoint is taken.
    params, state, operators = problem.params, tx.init(problem.params), []
    for i in range(20 + 3 * gap + 1):
        if i >= 20 and (i - 20) % gap == 0:
            operators.append(curvature.hessian(problem.loss_fn, params, *batch))
        start = i * _BATCH % (len(problem.y) - _BATCH)
        chosen = slice(start, start + _BATCH)
        params, state = step(params, state, problem.x[chosen], problem.y[chosen])

    def follow(warm: bool, search: bool = True) -> list[curvature.EigenResult]:
        found = [curvature.top_eigenpairs(operators[0], k, key=jax.random.key(0))]
        for i, operator in enumerate(operators[1:]):
            start = found[-1] if warm else None
            key = jax.random.key(1 + i)
            found.append(curvature.top_eigenpairs(operator, k, key=key, search=search, start=start))
        return found[1:]

    reference = [
        np.asarray(curvature.top_eigenpairs(o, k, key=jax.random.key(9), tol=1e-5).values)
        for o in operators[1:]
    ]

    def error(label: str, answer: Any) -> float:
        del label
        off = [np.abs(r.values - v).max() / v[0] for r, v in zip(answer, reference, strict=True)]
        return float(max(off))

    def products(answer: Any) -> float:
        return float(np.mean([int(r.num_matvecs) for r in answer]))

    def facts(answers: Mapping[str, Any], seconds: Any) -> dict[str, float]:
        del seconds
        counts = {label: products(answer) for label, answer in answers.items()}
        exact = curvature.top_eigenpairs(
            operators[-1], k, key=jax.random.key(8), start=answers["warm"][-1]
        )
        return {
            **{f"products, {label}": count for label, count in counts.items()},
            "products of warm / cold": counts["warm"] / counts["cold"],
            "without search": counts["warm, no search"] / counts["cold, no search"],
            "the same matrix again / cold": int(exact.num_matvecs) / counts["cold"],
        }

    return Case(
        candidates={
            "cold": lambda: follow(False),
            "warm": lambda: follow(True),
            "cold, no search": lambda: follow(False, search=False),
            "warm, no search": lambda: follow(True, search=False),
        },
        error=error,
        tolerance=1e-3,
        sizes={
            "network": name, "examples": num_examples, "eigenvalues": k, "steps between": gap
        },
        facts=facts,
        bars={"products of warm / cold": _WARM} if has_bars else {},
    )  # fmt: skip
