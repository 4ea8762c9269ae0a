"""Strong L2 kills a deep net beyond a tolerance; a gate on gradient coherence keeps it alive."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import transforms

_STRENGTHS = (0.0, 0.06, 0.1, 0.15)
_GATES = ("always", "delayed", "cosine")
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 6),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}
_BATCH, _EPOCHS, _DELAY = 60, 30, 5  # the delay in epochs
_CHANCE, _SMALL = 0.15, 1e-3


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "gate": gate, "strength": strength, "seed": seed, "epochs": 1}
            for gate, strength in (("always", 0.0), ("always", 0.15), ("cosine", 0.15))
            for seed in (0, 1)
        ]
    return [
        {"data": data, "gate": gate, "strength": strength, "seed": seed, "epochs": _EPOCHS}
        for data, (_, num_seeds) in _DATA.items()
        for strength in _STRENGTHS
        for gate in (_GATES if strength else _GATES[:1])
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    per_epoch = len(split.y) // _BATCH
    sizes = (split.x.shape[1], *[64] * 10, 10)
    trained = _networks.train(
        _networks.he_network(sizes, jax.random.key(seed)),
        _chain(settings["gate"], settings["strength"], per_epoch),
        split,
        batch_size=_BATCH,
        num_steps=settings["epochs"] * per_epoch,
        seed=seed,
    )
    kernels = jnp.concatenate([jnp.ravel(layer["kernel"]) for layer in trained.params])
    return {
        "accuracy": _networks.accuracy(trained.params, split),
        "sparsity": float(jnp.mean(jnp.abs(kernels) < _SMALL)),
        "on": float(trained.state[0].num_on) / trained.num_steps,
        "loss": trained.loss,
    }


@functools.cache
def _chain(gate: str, strength: float, per_epoch: int) -> Any:
    gates = {
        "always": transforms.always_gate(),
        "delayed": transforms.delayed_gate(_DELAY * per_epoch),
        "cosine": transforms.cosine_gate(0.5, hold=per_epoch),
    }
    kernels = lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, params)
    penalty = transforms.coherent_regularization(strength, gate=gates[gate], mask=kernels)
    return optax.chain(penalty, optax.sgd(0.02, momentum=0.9))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        plain = _claims.numbers(_claims.select(own, strength=0.0), "sparsity").mean()
        strengths = sorted({record["strength"] for record in own} - {0.0})
        dead, helped, texts = [], [], []
        for strength in strengths:
            at = {
                gate: _claims.select(own, strength=strength, gate=gate)
                for gate in dict.fromkeys(record["gate"] for record in own)
            }
            at = {gate: found for gate, found in at.items() if found}
            accuracy = {gate: _claims.numbers(found, "accuracy") for gate, found in at.items()}
            texts.append(
                f"{strength:g}: "
                + ", ".join(f"{gate} {values.mean():.2f}" for gate, values in accuracy.items())
            )
            if np.mean(accuracy["always"] < _CHANCE) <= 0.5:
                continue
            dead.append(strength)
            gain, error = _claims.mean_and_error(accuracy["cosine"] - accuracy["always"])
            on = _claims.numbers(at["cosine"], "on").mean()
            sparsity = _claims.numbers(at["cosine"], "sparsity").mean()
            if gain > 2 * error and on > 0.5 and sparsity > plain:
                helped.append(strength)
            texts[-1] += f" (cosine {gain:+.2f} ± {error:.2f}, on {on:.0%}, sparse {sparsity:.0%})"
        evidence = "mean test accuracy at strength " + "; ".join(texts)
        killed = f"at {', '.join(f'{s:g}' for s in dead)}" if dead else "at none of the strengths"
        verdicts.append(
            Verdict(
                f"{_claims.word(dead)} ({data}): beyond a tolerance L2 kills most nets, {killed}",
                evidence,
            )
        )
        if dead:
            verdicts.append(
                Verdict(
                    f"{_claims.word(helped)} ({data}): there a coherence "
                    "gate keeps them alive and still regularises",
                    evidence,
                )
            )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    words = {
        "always": "L2 in every step",
        "delayed": f"L2 after {_DELAY} epochs",
        "cosine": "L2 where gradients are coherent",
    }
    names = {"accuracy": "test accuracy", "sparsity": f"share of weights\nbelow {_SMALL:g}"}
    strengths = sorted(_claims.groups(records, "strength"))
    for axes, own, name in _figures.panels(figure, records, names):
        gates = [gate for gate in words if _claims.select(own, gate=gate)]
        lines = {  # a strength of zero is the same with every gate
            words[gate]: [r for r in own if r["gate"] == gate or not r["strength"]]
            for gate in gates
        }
        _figures.sweeps(axes, lines, "strength", name, values=strengths)
        axes.set_ylim(-0.05, 1.12)
        _figures.label(axes, x="strength of L2")
        if name == "accuracy":
            _figures.level(axes, _CHANCE, name="below: a dead net")
    return f"{_figures.BARS} At strength 0 all are the same training."


CLAIM = _claims.Claim(
    name="gradient_coherence",
    paper="Park et al. 2018 (arXiv:1811.08056)",
    statement="strong L2 stops killing deep nets if it waits for coherent gradients",
    printed="only the abstract was read; the coherence statistic is our reading",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
