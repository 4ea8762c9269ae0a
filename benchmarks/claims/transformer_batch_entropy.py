"""Batch entropy: a deep transformer with its norms behind the sums trains if its blocks keep some.

The entropy is that over the images of a batch, each position and feature a unit: a norm fixes the
variance over the features, not that one. Depth, rates, steps and the penalty that is judged were
chosen after a look at seed 0; the runs here have other seeds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _tokens
from regjax import models, regularizers

# Initial target (nats) and strength, of the authors' grids for transformers.
_PENALTIES = {
    "none": (0.8, 0.0),
    "warm-up": (0.8, 0.0),
    "0.8, 0.05": (0.8, 0.05),
    "0.8, 0.005": (0.8, 0.005),
}
_JUDGED = "0.8, 0.05"
_MIN_TARGET, _DEPTH, _RISING = 0.2, 12, 0.25
# Rate, steps and penalties; twice as long without, for what is only late.
_CASES: tuple[tuple[float, int, tuple[str, ...]], ...] = (
    (1e-3, 300, tuple(_PENALTIES)),
    (1e-3, 600, ("none",)),
    (2e-3, 300, ("none", _JUDGED)),
)
_POINTS, _MEASURED = 10, 256
_FLOOR = 1e-6  # of the logarithmic axis: a block that tells no image apart has exactly 0
_DATA: dict[str, tuple[Callable[[], _tokens.Images], int]] = {
    "digits": (_tokens.digits, 5),
    "fashion_mnist": (_tokens.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    data, cases, depth = {name: n for name, (_, n) in _DATA.items()}, _CASES, _DEPTH
    if preset == "smoke":
        data, cases, depth = {"digits": 2}, ((1e-2, 30, ("none", "warm-up", _JUDGED)),), 2
    return [
        {
            "data": name, "rate": rate, "steps": steps, "penalty": penalty, "seed": seed,
            "depth": depth,
        }
        for name, num_seeds in data.items()
        for rate, steps, penalties in cases
        for penalty in penalties
        for seed in range(1, 1 + num_seeds)
    ]  # fmt: skip


def _run(settings: Settings) -> dict[str, float]:
    images, depth, seed = _DATA[settings["data"]][0](), settings["depth"], settings["seed"]
    target, strength = _PENALTIES[settings["penalty"]]
    params = _start(images.x.shape[1] - 1, depth, target, seed)
    num_rising = round(_RISING * settings["steps"]) if settings["penalty"] == "warm-up" else 0
    rates = _tokens.warm_up(settings["rate"], settings["steps"], num_rising)
    loss_fn = Partial(_loss, jnp.float32(strength))
    trained, losses = _tokens.train(loss_fn, params, images, rates, seed)
    _, at_start = _measured(params, images.x_test)
    test_loss, at_end = _measured(trained, images.x_test)
    return {
        "test_loss": float(test_loss),
        "by_position": images.by_position,
        "lowest_start": float(at_start.min()),
        "lowest": float(at_end.min()),
        **{f"entropy_{i}": float(value) for i, value in enumerate(at_end)},
        **_tokens.smoothed(losses, _POINTS),
    }


def _start(length: int, depth: int, target: float, seed: int) -> dict[str, Any]:
    """The parameters of the GPT, those of its blocks stacked, and the targets."""
    params = dict(_tokens.transformer(length, depth, seed).params)
    blocks = [params.pop(f"block_{i}") for i in range(depth)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "blocks": stacked, "targets": jnp.full(depth, target, jnp.float32)}


def _outputs(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits as of the GPT, and the entropy behind each block, which the GPT does not give."""
    embedding = params["tokens"]["embedding"]

    def block(features: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
        features = nnx.merge(_block(), nnx.State(weights))(features)
        return features, regularizers.batch_entropy(features)

    features = embedding[tokens] + params["positions"]["embedding"][None]
    features, entropies = jax.lax.scan(block, features, params["blocks"])
    return features @ embedding.T, entropies


@functools.cache
def _block() -> nnx.GraphDef:
    """What every block computes: the arrays come from outside."""
    model = models.GPT(
        2, context=1, width=_tokens.WIDTH, depth=1, post_norm=True, rngs=nnx.Rngs(0)
    )  # fmt: skip
    return nnx.split(model.block_0)[0]


def _loss(strength: jax.Array, params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    logits, entropies = _outputs(params, tokens)
    task = _tokens.cross_entropy(logits, targets)
    return task + regularizers.layerwise_batch_entropy(
        task, entropies, params["targets"], strength=strength, min_target_entropy=_MIN_TARGET
    )


@jax.jit
def _measured(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Test loss, and the entropies over some test images."""
    tokens, targets = _tokens.inputs_and_targets(x)
    task = _tokens.cross_entropy(_outputs(params, tokens)[0], targets)
    return task, _outputs(params, tokens[:_MEASURED])[1]


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        few = min(record["steps"] for record in own)
        for rate, part in _claims.groups(_claims.select(own, steps=few), "rate").items():
            verdicts.append(_on_loss(data, rate, part))
        verdicts += [_on_training(data, own), _on_entropies(data, own)]
    return verdicts


def _on_loss(data: str, rate: float, records: Sequence[Record]) -> Verdict:
    penalties = _claims.groups(records, "penalty")
    losses = [_claims.numbers(penalties[name], "test_loss") for name in ("none", _JUDGED)]
    gain, error = _claims.mean_and_error(losses[0] - losses[1])
    shown = "; ".join(f"({name}) {_losses(part)}" for name, part in penalties.items())
    first = records[0]
    return Verdict(
        f"{_claims.word(gain > 2 * error)} ({data}, rate {rate:g}): a lower test loss with it",
        f"{first['depth']} blocks, {first['steps']} steps; nats (runs that trained), with target "
        f"and strength: {shown}. Trained is below {first['by_position']:.3f}, what a net blind to "
        f"the pixels before has. (none) less ({_JUDGED}): {gain:+.3f} ± {error:.3f}",
    )


def _on_training(data: str, records: Sequence[Record]) -> Verdict:
    """On the claim in its strong form, at the first rate."""
    own = _claims.select(records, rate=records[0]["rate"])
    without = _claims.groups(_claims.select(own, penalty="none"), "steps")
    chosen = _claims.select(own, penalty=_JUDGED)
    counts = [f"without {_losses(part)} after {steps} steps" for steps, part in without.items()]
    is_never = not any(_is_trained(r) for part in without.values() for r in part)
    return Verdict(
        f"{_claims.word(is_never and all(map(_is_trained, chosen)))} ({data}, rate "
        f"{own[0]['rate']:g}): it trains with it only",
        f"test loss in nats (runs that trained): {', '.join(counts)}; with ({_JUDGED}) "
        f"{_losses(chosen)} after {chosen[0]['steps']}",
    )


def _is_trained(record: Record) -> bool:
    return bool(record["test_loss"] < record["by_position"])


def _losses(records: Sequence[Record]) -> str:
    values = _claims.numbers(records, "test_loss")
    return f"{values.mean():.3f} ({sum(map(_is_trained, records))} of {len(records)})"


def _on_entropies(data: str, records: Sequence[Record]) -> Verdict:
    is_trained = np.array([_is_trained(record) for record in records])
    lowest = _claims.numbers(records, "lowest")
    text = f"({data}): no block without entropy in a net that trains"
    counts = f"{is_trained.sum()} of {len(records)} runs trained"
    if is_trained.all() or not is_trained.any():
        return Verdict(f"not testable at this size {text}", counts)
    bounds = lowest[is_trained].min(), lowest[~is_trained].max()
    start = _claims.numbers(records, "lowest_start")
    return Verdict(
        f"{_claims.word(bounds[0] > bounds[1])} {text}",
        f"{counts}: the lowest entropy of a block is {bounds[0]:.2g} nats or more in them, "
        f"{bounds[1]:.2g} or less in the others ({start.min():.2g} to {start.max():.2g} before)",
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    first = records[0]
    names = {
        "test_loss": "test loss (nats)",
        "entropy": "entropy of a block\nat the end (nats)",
        "loss": "training loss (nats),\nwith the penalty",
    }
    penalties = list(_claims.groups(records, "penalty"))
    cases = list(_claims.groups([_case(record, first) for record in records], "case"))
    for axes, own, name in _figures.panels(figure, records, names, height=2.4):
        shown = _claims.select(own, rate=first["rate"], steps=first["steps"])
        if name == "test_loss":
            for place, case in enumerate(cases):
                part = [r for r in own if _case(r, first)["case"] == case]
                if part:
                    index = penalties.index(part[0]["penalty"])
                    _figures.column(axes, place, _claims.numbers(part, name), index=index)
            axes.set_xticks(range(len(cases)), cases, rotation=60, ha="right", va="top")
            axes.tick_params(axis="x", pad=1)
            _figures.label(axes, x="penalty (target, strength)")
            _figures.level(
                axes, own[0]["by_position"], name="a network blind to the earlier pixels"
            )
            continue
        for record in shown:
            text = record["penalty"]
            style = {
                "color": _figures.COLORS[penalties.index(text)], "linewidth": 0.8, "alpha": 0.8,
                "label": {"none": "no penalty", "warm-up": "no penalty, rate warmed up"}.get(
                    text, "penalty with target {}, strength {}".format(*text.split(", "))
                    if ", " in text else text,
                ),
            }  # fmt: skip
            if name == "entropy":
                entropies = [record[f"entropy_{j}"] for j in range(record["depth"])]
                places = 1 + np.arange(len(entropies))
                axes.plot(places, np.maximum(entropies, _FLOOR), **style)
            else:
                steps = record["steps"] * (np.arange(_POINTS) + 0.5) / _POINTS
                axes.plot(steps, [record[f"loss_{j}"] for j in range(_POINTS)], **style)
        if name == "entropy":
            _figures.logarithmic(axes)
            _figures.ticks(axes, "x", range(3, record["depth"] + 1, 3))
        where = f"rate {first['rate']:g}, {first['steps']} steps"
        _figures.label(axes, x=f"{'block' if name == 'entropy' else 'step'} ({where})")
    return (
        "Left: each point is one seed, the black bars are means. Middle and right: one line per "
        "seed. Above the dashed line a network has learnt nothing from the earlier pixels."
    )


def _case(record: Record, first: Record) -> Record:
    """The record with its penalty, and with what else differs from the first one."""
    text = record["penalty"]
    text += f", rate {record['rate']:g}" if record["rate"] != first["rate"] else ""
    text += f", {record['steps']} steps" if record["steps"] != first["steps"] else ""
    return {**record, "case": text}


CLAIM = _claims.Claim(
    name="transformer_batch_entropy",
    paper="Peer et al. 2022 (arXiv:2208.01134), on transformers",
    statement="a deep transformer trains, or trains better, if each block keeps batch entropy",
    printed="not checked: the authors' grids are known, no result is",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
