"""Training of a small tanh perceptron on squared errors, mostly full-batch, with looks at it."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._claims import Record, Settings
from benchmarks.claims import _figures, _networks
from regjax import diagnostics

_WIDTH = 64
DATA = {"digits": _networks.digits, "fashion_mnist": _networks.small_fashion_mnist}
Look = Callable[[Any, Any, Any, jax.Array, jax.Array], Mapping[str, float]]
"""(params, state, updates, x, y) -> numbers by name; the updates are about to be added."""


def network(num_inputs: int, key: jax.Array) -> Any:
    """Two hidden layers, weights N(0, 1 / inputs), biases zero."""
    sizes = (num_inputs, _WIDTH, _WIDTH, 10)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(k, (n, m)) / jnp.sqrt(n), "bias": jnp.zeros(m)}
        for n, m, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
    ]


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared error against one-hot targets, mean over the examples."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    errors = x @ params[-1]["kernel"] + params[-1]["bias"] - jax.nn.one_hot(y, 10)
    return jnp.mean(jnp.sum(errors**2, 1)) / 2


def followed(settings: Settings, tx: optax.GradientTransformation, look: Look) -> dict[str, float]:
    """Trains for `steps` steps and looks every `every` steps, by the settings of a run.

    Batches of `batch` images are drawn anew at each step; 0 stands for all images.

    Returns:
      The numbers of each look, and the loss of its batch, with the step behind their names.
    """
    split, key = DATA[settings["data"]](), jax.random.key(settings["seed"])
    params = network(split.x.shape[1], key)
    state = tx.init(params)
    found: dict[str, float] = {}
    batch = settings.get("batch", 0) or None
    for step in looks(settings):
        keys = jax.random.split(jax.random.fold_in(key, step), settings["every"] + 1)
        params, state = _steps(tx.update, batch, params, state, split.x, split.y, keys[1:])
        x, y = _drawn(split.x, split.y, keys[0], batch)
        updates, loss = _next(tx.update, params, state, x, y)
        numbers = {**look(params, state, updates, x, y), "loss": float(loss)}
        found |= {f"{name}_{step}": value for name, value in numbers.items()}
    return found


def looks(settings: Settings) -> range:
    """The steps before which there is a look."""
    return range(settings["every"], settings["steps"] + 1, settings["every"])


def series(record: Record, name: str) -> np.ndarray:
    """The numbers of all looks of a run."""
    return np.asarray([record[f"{name}_{step}"] for step in looks(record)])


def edge_look(optimizer: str, rate: float, hyperparams: Mapping[str, Any]) -> Look:
    """The share of the threshold at which the sharpness stands, with a warm start."""
    start = None

    def look(params: Any, state: Any, updates: Any, x: jax.Array, y: jax.Array) -> Any:
        nonlocal start
        start = diagnostics.edge_of_stability(
            loss_fn, params, x, y,
            key=jax.random.key(0), optimizer=optimizer, optimizer_state=state,
            learning_rate=rate, hyperparams=hyperparams, start=start,
        )  # fmt: skip
        return {
            "ratio": float(start.stability_ratio),
            "error": float(start.residual_norm / start.threshold),
        }

    return look


def late(record: Record, name: str) -> np.ndarray:
    """The numbers of the last third."""
    numbers = series(record, name)
    return numbers[-(len(numbers) // 3) :]


NOTE = "Lines: median over the seeds; bands: their range."


def panels(records: Sequence[Record], figure: Any, *, y: str) -> Iterator[tuple[Any, Any]]:
    """Axes for each data set, with its records; what is drawn has a line at 1."""
    for axes, own, _ in _figures.panels(figure, records, {"": y}, height=2.3):
        _figures.level(axes, 1, name="edge of stability")
        yield axes, own


def draw_series(
    axes: Any, records: Sequence[Record], name: str, *, color: str, label: str, line: str = "-"
) -> None:
    """The median over seeds, and their range."""
    values = np.asarray([series(record, name) for record in records])
    steps = list(looks(records[0]))
    axes.plot(steps, np.median(values, 0), line, color=color, linewidth=1.2, label=label)
    axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    _figures.label(axes, x="training step")


def _drawn(x: jax.Array, y: jax.Array, key: jax.Array, batch: int | None) -> Any:
    if batch is None:
        return x, y
    chosen = jax.random.choice(key, len(y), (batch,), replace=False)
    return x[chosen], y[chosen]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(
    update: Any, batch: int | None, params: Any, state: Any, x: Any, y: Any, keys: Any
) -> Any:
    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss_fn)(params, *_drawn(x, y, key, batch))
        updates, state = update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), keys)[0]


@functools.partial(jax.jit, static_argnums=0)
def _next(update: Any, params: Any, state: Any, x: Any, y: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    return update(grads, state, params)[0], loss
