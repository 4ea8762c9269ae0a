"""Descent on diagonal linear networks, looked at in each step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._claims import Settings
from regjax import diagnostics, models


def arrays(values: np.ndarray) -> jax.Array:
    """In the type of all runs."""
    return jnp.asarray(values, jnp.float32)


def distance(weights: jax.Array, x: jax.Array, y: jax.Array) -> float:
    """To the solution of least norm, relative to its norm."""
    least = jnp.linalg.lstsq(x, y)[0]
    return float(jnp.linalg.norm(weights - least) / jnp.linalg.norm(least))


def descend(
    settings: Settings, signed: bool, x: Any, y: Any, true: Any, held: Any = None
) -> dict[str, Any]:
    """The errors of each step, and the weights at the end; depths start at equal alpha^N."""
    depth, num_steps = settings["depth"], settings["steps"]
    alpha = settings["scale"] ** (1 / depth)
    return _path(depth, signed, num_steps, alpha, settings["rate"], x, y, true, held)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _path(
    depth: int, signed: bool, num_steps: int, alpha: Any, rate: Any, x: Any, y: Any, true: Any,
    held: Any,
) -> dict[str, Any]:  # fmt: skip
    """Plain descent on ||X w - y||^2 / n, looked at before each step."""
    start = jnp.full(x.shape[1], alpha, x.dtype)
    columns = x.T

    def step(pair: Any, _: Any) -> Any:
        u, v = pair
        weights = models.diagonal_weights(u, v, depth=depth)
        residual = (2 / len(y)) * (columns @ (x @ weights - y))
        seen = {"error": jnp.sum((weights - true) ** 2), "first": weights[:4]}
        if held is not None:
            seen["held"] = jnp.mean((held[0] @ weights - held[1]) ** 2)
        move = lambda one, sign: one - sign * rate * depth * residual * one ** (depth - 1)
        return (move(u, 1.0), None if v is None else move(v, -1.0)), seen

    (u, v), seen = jax.lax.scan(step, (start, start if signed else None), None, length=num_steps)
    report = diagnostics.sparse_recovery(u, v, depth=depth, true_weights=true)
    return {
        **seen,
        "weights": models.diagonal_weights(u, v, depth=depth),
        "positive": report.is_positive,
    }
