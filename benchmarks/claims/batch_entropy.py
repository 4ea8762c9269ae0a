"""Plain perceptrons of 30 layers and more stay at chance unless every layer keeps some entropy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import regularizers

# Initial target (nats) and strength.
_PENALTIES = {
    "none": (0.5, 0.0),
    "0.5, 0.1": (0.5, 0.1),
    "0.5, 1": (0.5, 1.0),
    "2, 0.1": (2.0, 0.1),  # of the authors' code for 500 layers
}
_MIN_TARGET, _BATCH, _MEASURED, _SHOWN = 0.2, 128, 10, 10
_CHANCE, _TRAINED = 0.01, 0.6  # the loss is that close to ln 10; a test accuracy
_DEEP, _PAPER_DEPTH = 30, 500
_FLOOR = 1e-20  # of the logarithmic axes: a dead layer has an entropy of exactly 0
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
    "fashion_mnist, all": (lambda: _networks.fashion_mnist(60_000), 3),
}
_EPOCHS = {"digits": 100, "fashion_mnist": 50}  # half as many again for 50 layers


def _settings(preset: str) -> Sequence[Settings]:
    one = {"width": 64, "rate": 1e-3}
    if preset == "smoke":
        return [
            {"data": "digits", "depth": 30, "penalty": p, "epochs": 10, "seed": seed, **one}
            for p in ("none", "0.5, 0.1")
            for seed in (0, 1)
        ]
    if preset == "gpu":
        one = {"width": 1000, "rate": 1e-6, "epochs": 1000, "depth": _PAPER_DEPTH}
        return [
            {"data": "fashion_mnist, all", "penalty": p, "seed": seed, **one}
            for p in ("none", "2, 0.1")
            for seed in range(3)
        ]
    cases = [("digits", depth, list(_PENALTIES)) for depth in (10, 30, 50)]
    cases += [("fashion_mnist", depth, ["none", "0.5, 0.1"]) for depth in (30, 50)]
    return [
        {"data": data, "depth": depth, "penalty": p, "seed": seed, **one,
         "epochs": _EPOCHS[data] * 3 // 2 if depth == 50 else _EPOCHS[data]}
        for data, depth, penalties in cases
        for p in penalties
        for seed in range(_DATA[data][1])
    ]  # fmt: skip


def _run(settings: Settings) -> dict[str, float]:
    split, epochs = _DATA[settings["data"]][0](), settings["epochs"]
    target, strength = _PENALTIES[settings["penalty"]]
    random = np.random.default_rng(settings["seed"])
    params = _network(split.x.shape[1], settings["width"], settings["depth"], target, random)
    state, lowest = _ADAM.init(params), [_lowest(params, split)]
    for epoch in range(epochs):
        order = random.permutation(len(split.y))
        order = order[: len(order) - len(order) % _BATCH].reshape(-1, _BATCH)
        params, state = _epoch(
            params, state, split.x, split.y, order, settings["rate"], strength
        )  # fmt: skip
        if (epoch + 1) * _MEASURED // epochs > epoch * _MEASURED // epochs:
            lowest.append(_lowest(params, split))
    logits, entropies = _outputs(params, split.x)
    shown = np.linspace(0, len(entropies) - 1, _SHOWN).round().astype(int)
    right = jnp.argmax(_outputs(params, split.x_test)[0], 1) == split.y_test
    return {
        "accuracy": float(jnp.mean(right)),
        "loss": float(_networks.cross_entropy(logits, split.y)),
        **{f"entropy_{i}": float(entropies[layer]) for i, layer in enumerate(shown)},
        **{f"lowest_{i}": value for i, value in enumerate(lowest)},
    }


def _network(
    num_inputs: int, width: int, depth: int, target: float, random: np.random.Generator
) -> dict[str, Any]:
    """`depth` hidden layers and a linear one, U(-1, 1) / sqrt(inputs): the default of PyTorch."""

    def layers(count: int, inputs: int, outputs: int) -> dict[str, jax.Array]:
        bound = np.float32(1 / math.sqrt(inputs))
        draw = lambda *shape: jnp.asarray(bound * (2 * random.random(shape, np.float32) - 1))
        return {"kernel": draw(count, inputs, outputs), "bias": draw(count, outputs)}

    return {
        "first": layers(1, num_inputs, width),
        "hidden": layers(depth - 1, width, width),
        "last": layers(1, width, 10),
        "targets": jnp.full(depth - 1, target, jnp.float32),
    }


@jax.jit
def _outputs(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits, and the entropies of the hidden layers but for the first."""

    def layer(x: jax.Array, own: Any) -> Any:
        x = jax.nn.relu(x @ own["kernel"] + own["bias"])
        return x, regularizers.batch_entropy(x)

    first, last = (jax.tree.map(lambda leaf: leaf[0], params[name]) for name in ("first", "last"))
    x, entropies = jax.lax.scan(layer, layer(x, first)[0], params["hidden"])
    return x @ last["kernel"] + last["bias"], entropies


_ADAM = optax.scale_by_adam()


@jax.jit
def _epoch(
    params: Any, state: Any, x: jax.Array, y: jax.Array, order: Any, rate: Any, strength: Any
) -> Any:
    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits, entropies = _outputs(params, x[rows])
        task = _networks.cross_entropy(logits, y[rows])
        return task + regularizers.layerwise_batch_entropy(
            task, entropies, params["targets"], strength=strength, min_target_entropy=_MIN_TARGET
        )

    def step(carry: Any, rows: jax.Array) -> Any:
        params, state = carry
        directions, state = _ADAM.update(jax.grad(loss)(params, rows), state)
        return (jax.tree.map(lambda p, d: p - rate * d, params, directions), state), None

    return jax.lax.scan(step, (params, state), order)[0]


def _lowest(params: Any, split: _networks.Split) -> float:
    return float(jnp.min(_outputs(params, split.x)[1]))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        for depth, part in _claims.groups(own, "depth").items():
            if depth >= _DEEP:
                verdicts.append(_on_training(data, depth, part))
        verdicts.append(_on_entropies(data, own))
    if max(record["depth"] for record in records) < _PAPER_DEPTH:
        text = "the paper's networks, of width 1000, need an accelerator (preset gpu)"
        verdicts.append(Verdict(f"not testable at this size: {_PAPER_DEPTH} layers", text))
    return verdicts


def _on_training(data: str, depth: int, records: Sequence[Record]) -> Verdict:
    penalties = _claims.groups(records, "penalty")
    without = penalties.pop("none")
    name, chosen = next(iter(penalties.items()))
    distance = np.abs(_claims.numbers(without, "loss") - math.log(10)).max()
    holds = distance < _CHANCE and _claims.numbers(chosen, "accuracy").min() > _TRAINED
    others = "".join(
        f"; with ({other}) {_accuracies(part)}" for other, part in list(penalties.items())[1:]
    )
    return Verdict(
        f"{_claims.word(holds)} ({data}, {depth} layers): at chance without, trained with it",
        f"test accuracy {_accuracies(without)} without, the training loss at most {distance:.4f} "
        f"from ln 10; {_accuracies(chosen)} with target and strength ({name}){others}",
    )


def _on_entropies(data: str, records: Sequence[Record]) -> Verdict:
    is_stuck = np.abs(_claims.numbers(records, "loss") - math.log(10)) < _CHANCE
    lowest = _claims.numbers(records, f"lowest_{_MEASURED}")
    text = f"({data}): no layer without entropy in a net that leaves chance"
    counts = f"{(~is_stuck).sum()} of {len(records)} runs left it"
    if is_stuck.all() or not is_stuck.any():
        return Verdict(f"not testable at this size {text}", counts)
    bounds = lowest[~is_stuck].min(), lowest[is_stuck].max()
    at_start = _claims.numbers(records, "lowest_0")[~is_stuck]
    shallow = [r for r in records if r["depth"] < _DEEP and r["penalty"] == "none"]
    control = f"; {shallow[0]['depth']} layers without: {_accuracies(shallow)}" if shallow else ""
    return Verdict(
        f"{_claims.word(bounds[0] > bounds[1])} {text}",
        f"{counts}: the lowest entropy of a layer was {at_start.max():.1g} or less in them at the "
        f"start and is {bounds[0]:.2g} or more at the end; at chance {bounds[1]:.1g} or "
        f"less{control}",
    )


def _accuracies(records: Sequence[Record]) -> str:
    """Mean over the seeds, lowest and highest."""
    values = _claims.numbers(records, "accuracy")
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(3.9)
    panels = figure.subplot_mosaic([["accuracy"] * 2, ["layers", "training"]])
    penalties = [penalty for penalty in _PENALTIES if _claims.select(records, penalty=penalty)]
    places = list(dict.fromkeys((record["data"], record["depth"]) for record in records))
    words = {
        penalty: "no penalty" if penalty == "none"
        else "penalty with target {}, strength {}".format(*penalty.split(", "))
        for penalty in penalties
    }  # fmt: skip
    for place, (data, depth) in enumerate(places):
        for i, penalty in enumerate(penalties):
            own = _claims.select(records, data=data, depth=depth, penalty=penalty)
            at = place + 1.4 * _figures.side(i, len(penalties))
            values = _claims.numbers(own, "accuracy")
            _figures.column(panels["accuracy"], at, values, index=i, of=4, name=words[penalty])
    names = [f"{_figures.NAMES[data]},\n{depth} layers" for data, depth in places]
    panels["accuracy"].set_xticks(range(len(places)), names)
    panels["accuracy"].set(xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.05))
    _figures.level(panels["accuracy"], 0.1, "chance", left=0.01)
    _figures.label(panels["accuracy"], y="test accuracy")
    data, depth = places[0][0], max(depth for data, depth in places if data == places[0][0])
    shown = _claims.select(records, data=data, depth=depth)
    for axes, name, count in (
        (panels["layers"], "entropy", _SHOWN), (panels["training"], "lowest", _MEASURED + 1),
    ):  # fmt: skip
        for record in shown:
            entropies = [record[f"{name}_{i}"] for i in range(count)]
            color = _figures.COLORS[penalties.index(record["penalty"])]
            axes.plot(
                np.linspace(0, 1, count), np.maximum(entropies, _FLOOR), linewidth=0.8, alpha=0.8,
                color=color,
            )  # fmt: skip
        _figures.logarithmic(axes)
        axes.set_title(f"{_figures.NAMES[data]}, {depth} layers", fontsize=8)
    _figures.label(panels["layers"], x="place of the layer (0: first, 1: last)",
                   y="entropy of a layer\nat the end (nats)")  # fmt: skip
    _figures.label(panels["training"], x="share of the training that is done",
                   y="lowest entropy of\nany layer (nats)")  # fmt: skip
    return f"Above: {_figures.DOTS[0].lower()}{_figures.DOTS[1:-1]}. Below: one line per seed."


CLAIM = _claims.Claim(
    name="batch_entropy",
    paper="Peer et al. 2022 (arXiv:2208.01134)",
    statement="very deep plain networks train only if each layer keeps a positive batch entropy",
    printed="500 layers of width 1000 become trainable; the tables were not checked",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
