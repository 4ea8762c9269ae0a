"""A training loop with a monitor over the same loop without."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import curvature, diagnostics

_BATCH, _EVERY, _RATE = 128, 50, 0.01


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {"sharpness_small_mlp": functools.partial(_sharpness, "small_mlp", 50, False)}
    return {
        f"sharpness_{name}": functools.partial(_sharpness, name, num_steps, True)
        for name, num_steps in (("small_mlp", 1000), ("mlp", 200))
    }


def _sharpness(name: str, num_steps: int, has_bars: bool) -> Case:
    """The largest eigenvalue of as many examples as a batch has, at every fiftieth step."""
    problem = _problems.trained(name, 512 if name == "mlp" else 1437)
    loss_fn, params = problem.loss_fn, problem.params
    x, y = problem.x[:_BATCH], problem.y[:_BATCH]
    tx = optax.sgd(_RATE, momentum=0.9)

    @jax.jit
    def step(loss_fn: Any, params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    options: dict[str, dict[str, Any]] = {
        "a tenth of the time": {},
        "a tenth, no search": {"search": False},
        "no limit": {"share": None},
        "no limit, no search": {"share": None, "search": False},
    }
    monitors = {
        label: diagnostics.Monitor(loss_fn, (x, y), every=_EVERY, key=jax.random.key(0), **own)
        for label, own in options.items()
    }
    counts = dict.fromkeys(monitors, 0)

    def train(label: str | None) -> Any:
        now, state = params, tx.init(params)
        for _ in range(num_steps):
            if label is not None:
                monitors[label](counts[label], now, state)
                counts[label] += 1
            now, state = step(loss_fn, now, state)
        return jax.block_until_ready(now)

    expected = ravel_pytree(train(None))[0]
    top = curvature.top_eigenpairs(
        curvature.hessian(loss_fn, params, x, y), 1, key=jax.random.key(1), tol=1e-4
    )

    def error(label: str, answer: Any) -> float:
        """Of the weights, which nobody may change, and of the first eigenvalue."""
        found = ravel_pytree(answer)[0]
        wrong = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
        if label not in monitors:
            return wrong
        seen = monitors[label].rows[0]["sharpness"]
        return max(wrong, abs(seen / float(top.values[0]) - 1))

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers, seconds
        found = {}
        for label, monitor in monitors.items():
            seen = [row for row in monitor.rows if not row["skipped"]]
            found[f"measured of the rows, {label}"] = round(len(seen) / len(monitor.rows), 3)
            products = sum(row["sharpness_num_matvecs"] for row in seen) / len(seen)
            found[f"products a row, {label}"] = round(products, 2)
        return found

    return Case(
        candidates={"training": functools.partial(train, None)}
        | {label: functools.partial(train, label) for label in monitors},
        error=error,
        tolerance=0.02,
        sizes={"parameters": expected.size, "batch": _BATCH, "steps": num_steps, "every": _EVERY},
        facts=facts,
        bars={"a tenth of the time": 1.10, "a tenth, no search": 1.10} if has_bars else {},
    )
