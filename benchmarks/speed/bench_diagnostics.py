"""Diagnostics over the bare passes that they are made of: forward, gradient, vector-Jacobian."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import diagnostics, regularizers

_SURFACE, _COMPLEXITY, _PROBE = 1.1, 1.2, 1.1
_STEPS = 8
_RATES = np.float32(0.1) * np.geomspace(0.5, 4, _STEPS).astype(np.float32)
_LAYERS = {
    "mlp": ("layer_0", "layer_1", "head"),
    "small_mlp": ("layer_0", "layer_1", "head"),
    "resnet": ("stem", "block_0", "block_1", "block_2", "block_3", "head"),
}


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    found: dict[str, Callable[[], Case]] = {}
    has_bars = preset != "smoke"
    # Network, examples, points along each direction.
    surfaces: tuple[tuple[str, int, int], ...] = (
        ("mlp", 512, 51),
        ("mlp", 4096, 11),
        ("small_mlp", 1437, 51),
        ("resnet", 64, 11),
    )
    passes: tuple[tuple[str, int], ...] = (("mlp", 128), ("mlp", 512), ("resnet", 32))
    if preset == "smoke":
        surfaces, passes = (("small_mlp", 64, 5),), (("small_mlp", 64),)
    for name, examples, points in surfaces:
        found[f"surface_{name}_{examples}"] = functools.partial(
            _surface, name, examples, points, has_bars
        )
    for name, examples in passes:
        for kind, make in (
            ("complexity", _complexity),
            ("probe", _probe),
            ("covariate_shift", _covariate_shift),
            ("gradient_norm", _gradient_norm),
        ):
            found[f"{kind}_{name}_{examples}"] = functools.partial(make, name, examples, has_bars)
    return found


def _problem(name: str, examples: int) -> _problems.Problem:
    problem = _problems.trained(name, max(examples, 512) if name != "small_mlp" else 1437)
    return problem._replace(x=problem.x[:examples], y=problem.y[:examples])


def _surface(name: str, examples: int, points: int, has_bars: bool) -> Case:
    loss_fn, params, x, y = _problem(name, examples)
    first, second = (
        diagnostics.filter_normalized_direction(params, key=key)
        for key in jax.random.split(jax.random.key(0))
    )
    positions = np.linspace(-1, 1, points, dtype=np.float32)
    forward = jax.jit(loss_fn)
    surface = functools.partial(diagnostics.loss_surface, positions=positions)
    corner = lambda a, b: forward(
        jax.tree.map(lambda w, d, e: w + a * d + b * e, params, first, second), x, y
    )
    expected = [float(corner(a, b)) for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1))]
    at_origin = float(forward(params, x, y))

    def error(label: str, answer: Any) -> float:
        if label == "forward passes":
            return abs(float(answer) - at_origin)
        corners = [float(answer[i, j]) for i in (0, -1) for j in (0, -1)]
        return float(np.max(np.abs(np.divide(corners, expected) - 1)))

    whole = jax.jit(surface).lower(loss_fn, params, first, second, x, y).compile()
    alone = forward.lower(params, x, y).compile()
    extra = _memory(whole) - _memory(alone)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return Case(
        candidates={
            "forward passes": lambda: [forward(params, x, y) for _ in range(points**2)][-1],
            "loss_surface": lambda: surface(loss_fn, params, first, second, x, y),
        },
        error=error,
        tolerance=1e-4,
        sizes={"network": name, "examples": examples, "points": f"{points}x{points}"},
        facts=lambda *_: {
            "memory beyond a forward pass, in copies of the parameters": extra / size
        },
        bars={"loss_surface": _SURFACE} if has_bars else {},
    )


def _memory(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def _complexity(name: str, examples: int, has_bars: bool) -> Case:
    loss_fn, params, x, _ = _problem(name, examples)
    model_fn = loss_fn.function

    @jax.jit
    def products(model_fn: Any, params: Any, x: jax.Array) -> jax.Array:
        """The k vector-Jacobian products, one after the other."""
        outputs, pull_back = jax.vjp(lambda x: model_fn(params, x), x)
        basis = jnp.eye(outputs.shape[1])
        rows = [pull_back(jnp.broadcast_to(row, outputs.shape))[0] for row in basis]
        return jnp.sum(jnp.stack([jnp.sum(row**2) for row in rows])) / len(x)

    exact = np.mean(
        [np.sum(np.asarray(_jacobian(model_fn, params, row), np.float64) ** 2) for row in x[:8]]
    )
    few = float(regularizers.geometric_complexity(model_fn, params, x[:8]))
    if abs(few / exact - 1) > 1e-4:
        raise AssertionError(f"geometric complexity {few} of 8 examples, their Jacobians {exact}")
    reference = float(products(model_fn, params, x))
    key = jax.random.key(0)
    estimate = jax.jit(regularizers.geometric_complexity_estimate)
    return Case(
        candidates={
            "k products": lambda: products(model_fn, params, x),
            "geometric_complexity": lambda: regularizers.geometric_complexity(model_fn, params, x),
            "one projection": lambda: estimate(model_fn, params, x, key=key)[0],
        },
        # A single projection is right on average only: within a factor of 3 on many examples.
        error=lambda label, answer: (
            abs(float(answer) / reference - 1) * (1e-4 if label == "one projection" else 1)
        ),
        tolerance=2e-4,
        sizes={"network": name, "examples": examples, "outputs": 10},
        bars={"geometric_complexity": _COMPLEXITY} if has_bars else {},
    )


@jax.jit
def _jacobian(model_fn: Any, params: Any, row: jax.Array) -> jax.Array:
    return jax.jacrev(lambda x: model_fn(params, x[None])[0])(row)


def _probe(name: str, examples: int, has_bars: bool) -> Case:
    loss_fn, params, x, y = _problem(name, examples)
    gradient = jax.jit(jax.value_and_grad(loss_fn))
    loss, grads = gradient(params, x, y)
    moved = jax.tree.map(lambda w, g: w - _RATES[3] * g, params, grads)
    expected = float(gradient(moved, x, y)[0])

    def error(label: str, answer: Any) -> float:
        value = answer[0] if label == "gradients" else answer.losses[3]
        return abs(float(value) - (float(loss) if label == "gradients" else expected))

    return Case(
        candidates={
            "gradients": lambda: [gradient(params, x, y) for _ in range(_STEPS + 1)][-1],
            "line_probe": lambda: diagnostics.line_probe(
                loss_fn, params, x, y, learning_rates=_RATES
            ),
        },
        error=error,
        tolerance=1e-4,
        sizes={"network": name, "examples": examples, "steps": _STEPS},
        bars={"line_probe": _PROBE} if has_bars else {},
    )


def _covariate_shift(name: str, examples: int, has_bars: bool) -> Case:
    loss_fn, params, x, y = _problem(name, examples)
    gradient = jax.jit(jax.grad(loss_fn))
    grads = gradient(params, x, y)
    moved = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    layers = [layer for layer in _LAYERS[name] if layer in params]
    if set(layers) != set(params):
        raise AssertionError(f"layers {layers} of {sorted(params)}")
    # The last layer behind all others moved.
    mixed = {**moved, layers[-1]: params[layers[-1]]}
    change = jax.tree.map(jnp.subtract, gradient(mixed, x, y)[layers[-1]], grads[layers[-1]])
    expected = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(change))))
    shift = functools.partial(diagnostics.internal_covariate_shift, layers=layers)
    compiled = jax.jit(shift)

    def error(label: str, answer: Any) -> float:
        return 0.0 if label == "gradients" else abs(float(answer.distances[-1]) / expected - 1)

    return Case(
        candidates={
            "gradients": lambda: [gradient(params, x, y) for _ in layers][-1],
            "internal_covariate_shift": lambda: compiled(loss_fn, params, moved, x, y),
            "called from Python": lambda: shift(loss_fn, params, moved, x, y),
        },
        error=error,
        tolerance=1e-3,
        sizes={"network": name, "examples": examples, "layers": len(layers)},
        bars={"internal_covariate_shift": _PROBE} if has_bars else {},
    )


def _gradient_norm(name: str, examples: int, has_bars: bool) -> Case:
    """The gradient of the penalty over plain reverse-over-reverse differentiation; no bar."""
    del has_bars
    loss_fn, params, x, y = _problem(name, examples)

    @jax.jit
    def plain(params: Any, x: jax.Array, y: jax.Array) -> Any:
        squared = lambda p: sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss_fn)(p, x, y))
        )
        return jax.grad(squared)(params)

    penalty = functools.partial(regularizers.gradient_norm_penalty, loss_fn)
    ours = jax.jit(jax.grad(penalty))
    expected = plain(params, x, y)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))

    def error(_: str, answer: Any) -> float:
        difference = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), answer, expected)
        return max(map(float, jax.tree.leaves(difference))) / scale

    gradient = jax.jit(jax.grad(loss_fn))
    return Case(
        candidates={
            "reverse over reverse": lambda: plain(params, x, y),
            "gradient_norm_penalty": lambda: ours(params, x, y),
            "gradient": lambda: gradient(params, x, y),
        },
        error=lambda label, answer: 0.0 if label == "gradient" else error(label, answer),
        tolerance=1e-3,
        sizes={"network": name, "examples": examples},
    )
