"""Forward and backward pass of each normalization layer over flax's own of the same shape."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from benchmarks._timing import Case
from regjax import normalization
from regjax.normalization import _group_norm

_SHAPES = ((512, 512), (64, 28, 28, 32), (128, 8, 8, 128))
_WIDTH = 512  # of the weight-normalized layer
_GROUPS, _GHOST = 8, 16
_BAR = 1.10
# GroupNorm+ normalizes twice; a layer with noise takes half as long again beside the draw.
_TWICE, _BESIDE_DRAW = 2.2, 1.5
_NOISE, _DRAW = "NoisyBatchNorm less its draw", "draw of its noise"


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    shapes = ((16, 4, 4, 16),) if preset == "smoke" else _SHAPES
    found: dict[str, Callable[[], Case]] = {}
    for shape in shapes:
        name = "x".join(map(str, shape))
        has_bars = preset != "smoke"
        found[f"batch_{name}"] = functools.partial(_case, _batch_layers(), shape, has_bars)
        found[f"group_{name}"] = functools.partial(_case, _group_layers(), shape, has_bars)
    width = 16 if preset == "smoke" else _WIDTH
    bar = _BAR if preset != "smoke" else None
    found[f"weight_{width}"] = functools.partial(_weight_case, width, bar)
    return found


def _batch_layers() -> dict[str, Any]:
    ours = normalization.linen
    return {
        "flax BatchNorm": linen.BatchNorm(use_running_average=False),
        "BatchNorm": ours.BatchNorm(use_running_average=False),
        "GhostBatchNorm": ours.GhostBatchNorm(use_running_average=False, ghost_size=_GHOST),
        "MeanOnlyBatchNorm": ours.MeanOnlyBatchNorm(use_running_average=False),
        "LpNorm, 1": ours.LpNorm(use_running_average=False, order=1),
        "LpNorm, 2": ours.LpNorm(use_running_average=False, order=2),
        "LpNorm, inf": ours.LpNorm(use_running_average=False, order=np.inf),
        "NoisyBatchNorm": ours.NoisyBatchNorm(use_running_average=False),
        _DRAW: "draw",
    }


def _group_layers() -> dict[str, Any]:
    plus = normalization.linen.GroupNormPlus
    return {
        "flax GroupNorm": linen.GroupNorm(num_groups=_GROUPS),
        "group part": _GroupPart(),
        "GroupNormPlus": plus(use_running_average=False, num_groups=_GROUPS),
        "GroupNormPlus, usable": plus(
            use_running_average=False, num_groups=_GROUPS, batch_axes=None, track_running=True
        ),
    }


def _weight_case(width: int, bar: float | None) -> Case:
    """A weight-normalized layer; flax's begins with columns of length 1, ours as the plain one."""
    layers = {
        "flax WeightNorm": linen.WeightNorm(linen.Dense(width)),
        "WeightNormDense": normalization.linen.WeightNormDense(width),
        "flax Dense": linen.Dense(width),
    }
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(size=(width, width)), jnp.float32) for _ in range(2))
    candidates = {label: _candidate(layer, x, weight) for label, layer in layers.items()}

    def error(label: str, answer: Any) -> float:
        (_, (outputs, _)), _ = answer
        leaves = jax.tree.leaves(candidates[label].args[0])
        kernel = np.asarray(next(leaf for leaf in leaves if leaf.ndim == 2), np.float64)
        if label == "flax WeightNorm":
            kernel = kernel / np.linalg.norm(kernel, axis=0)
        return float(np.abs(outputs - np.asarray(x, np.float64) @ kernel).max())

    return Case(
        candidates=candidates,
        error=error,
        tolerance=1e-3,
        sizes={"width": width, "batch": width, "dtype": "float32"},
        bars={} if bar is None else {"WeightNormDense": bar},
    )


class _GroupPart(linen.Module):
    """`group_normalize` with scale and bias, as flax's GroupNorm has."""

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        scale, bias = (
            self.param(name, init, (inputs.shape[-1],))
            for name, init in (
                ("scale", linen.initializers.ones),
                ("bias", linen.initializers.zeros),
            )
        )
        return _group_norm.group_normalize(inputs, num_groups=_GROUPS, epsilon=1e-5) * scale + bias


def _case(layers: dict[str, Any], shape: tuple[int, ...], has_bars: bool) -> Case:
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(1, 2, shape), jnp.float32) for _ in range(2))
    candidates = {label: _candidate(layer, x, weight) for label, layer in layers.items()}
    # A maximum is arithmetic of another kind: no bar for the norm of order inf.
    same_kind = ("BatchNorm", "GhostBatchNorm", "MeanOnlyBatchNorm", "LpNorm, 1", "LpNorm, 2")
    bars = dict.fromkeys((*same_kind, "group part"), _BAR)
    bars |= {"GroupNormPlus": _TWICE, "GroupNormPlus, usable": _TWICE}
    bars = {name: bars[name] for name in bars if name in layers}
    bars |= {_NOISE: _BESIDE_DRAW} if _DRAW in layers else {}

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers
        if _DRAW not in seconds:
            return {}
        beside = seconds["NoisyBatchNorm"] - seconds[_DRAW]
        return {_NOISE: beside / seconds["flax BatchNorm"]}

    return Case(
        candidates=candidates,
        error=lambda label, answer: _error(label, answer, np.asarray(x, np.float64)),
        tolerance=1e-4,
        sizes={"shape": list(shape), "dtype": "float32"},
        facts=facts,
        bars=bars if has_bars else {},
    )


def _candidate(layer: Any, x: jax.Array, weight: jax.Array) -> functools.partial[Any]:
    key = jax.random.key(0)
    if layer == "draw":
        draw = lambda key: [f(key, x.shape) for f in (jax.random.uniform, jax.random.normal)]
        return functools.partial(jax.jit(draw), key)
    variables = layer.init({"params": key, "dropout": key}, x)

    @jax.jit
    def run(params: Any, state: Any, x: jax.Array, weight: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            outputs, new = layer.apply(
                {"params": params, **state}, x, mutable=list(state), rngs={"dropout": key}
            )
            return jnp.sum(outputs * weight), (outputs, new)

        return jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(params, x)

    state = {name: value for name, value in variables.items() if name != "params"}
    return functools.partial(run, variables["params"], state, x, weight)


def _error(label: str, answer: Any, x: np.ndarray) -> float:
    """Largest difference to NumPy in float64; for noise whether the bulk is where it should be."""
    if label == _DRAW:
        return 0.0 if abs(float(answer[1].std()) - 1) < 0.1 else 1.0
    (_, (outputs, _)), (_, slope) = answer
    if not np.all(np.isfinite(slope)):
        return np.inf
    expected = _expected(label, x)
    if label == "NoisyBatchNorm":
        return 0.0 if 0.05 < np.abs(outputs - expected).mean() < 1 else 1.0
    return float(np.abs(outputs - expected).max())


def _expected(label: str, x: np.ndarray) -> np.ndarray:
    axes = tuple(range(x.ndim - 1))
    if label == "GhostBatchNorm":
        ghosts = x.reshape(-1, _GHOST, *x.shape[1:])
        inner = tuple(range(1, ghosts.ndim - 1))
        spread = np.sqrt(ghosts.var(inner, keepdims=True) + 1e-5)
        return ((ghosts - ghosts.mean(inner, keepdims=True)) / spread).reshape(x.shape)
    if label == "MeanOnlyBatchNorm":
        return x - x.mean(axes)
    if label.startswith("LpNorm"):
        order = float(label.split()[-1])
        norm = np.abs(x).max(axes) if order == np.inf else (np.abs(x) ** order).mean(axes)
        root = np.sqrt(norm) if order == 2 else norm
        return (x - x.mean(axes)) / (root + 1e-5)
    if "BatchNorm" in label:
        return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    grouped = x.reshape(*x.shape[:-1], _GROUPS, -1)
    inner = (*range(1, x.ndim - 1), x.ndim)
    mean, freedom = grouped.mean(inner, keepdims=True), 0 if label.startswith("flax") else 1
    std = grouped.std(inner, ddof=freedom, keepdims=True)
    spread = np.sqrt(std**2 + 1e-6) if label.startswith("flax") else std + 1e-5
    group = ((grouped - mean) / spread).reshape(x.shape)
    if "Plus" not in label:
        return group
    over = axes if "usable" in label else (0,)
    mean, std = group.mean(over, keepdims=True), group.std(over, ddof=1, keepdims=True)
    share = 1 / (1 + np.exp(-1.0))
    return share * group + (1 - share) * (group - mean) / (std + 1e-5)
