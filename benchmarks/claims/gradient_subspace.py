"""After a short time most of the gradient lies in the space of the leading Hessian eigenvectors."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import curvature, diagnostics

_STEPS = (0, 10, 30, 100, 300, 1000)
_BATCH, _CLASSES = 30, 10
_TX = optax.sgd(0.05)
_DATA = {"digits": (_networks.digits, 5), "fashion_mnist": (_networks.fashion_mnist, 3)}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [{"data": "digits", "width": 16, "seed": seed, "steps": 10} for seed in (0, 1)]
    return [
        {"data": data, "width": 128, "seed": seed, "steps": _STEPS[-1]}
        for data, (_, num_seeds) in _DATA.items()
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed, width = _DATA[settings["data"]][0](), settings["seed"], settings["width"]
    sizes = (split.x.shape[1], width, width, 10)
    params = _networks.he_network(sizes, jax.random.key(seed))
    numbers, before = {}, 0
    for i, step in enumerate(_looks(settings)):
        if step > before:
            params = _networks.train(
                params, _TX, split,
                batch_size=_BATCH, num_steps=step - before, seed=1000 * seed + i,
            ).params  # fmt: skip
        before = step
        hessian = curvature.hessian(_networks.loss_fn, params, split.x, split.y)
        top = curvature.top_eigenpairs(hessian, _CLASSES, key=jax.random.key(seed), tol=1e-2)
        batches = {"all": slice(None), "batch": slice(_BATCH)}
        for name, rows in batches.items():
            gradient = jax.grad(_networks.loss_fn)(params, split.x[rows], split.y[rows])
            found = diagnostics.gradient_share(gradient, top.vectors)
            numbers[f"share_{name}_{step}"] = float(found.share)
        numbers["null"] = float(found.null_share)
        numbers[f"complete_{step}"] = float(top.complete)
    return numbers


def _looks(settings: Settings) -> list[int]:
    return [step for step in _STEPS if step <= settings["steps"]]


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        steps = _looks(own[0])
        later = steps[len(steps) // 2 :]
        shares = np.asarray([[record[f"share_all_{step}"] for step in later] for record in own])
        of_batch = np.asarray([[record[f"share_batch_{step}"] for step in later] for record in own])
        start = _claims.numbers(own, "share_all_0").mean()
        complete = all(record[f"complete_{step}"] for record in own for step in steps)
        verdicts.append(
            Verdict(
                f"{_claims.word(np.all(shares > 0.5))} ({data}): more than half of the squared "
                "gradient lies in the space of as many leading eigenvectors as classes",
                f"{start:.2f} at the start, {shares.min():.2f} to {shares.max():.2f} (mean "
                f"{shares.mean():.2f}) from step {later[0]} on; of a batch of {_BATCH} "
                f"{of_batch.min():.2f} to {of_batch.max():.2f}; a random direction would have "
                f"{own[0]['null']:.1g}" + ("" if complete else "; not all eigenpairs converged"),
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {
        "all": "share of the full gradient",
        "batch": f"share of a gradient\nof {_BATCH} examples",
    }
    for axes, own, name in _figures.panels(figure, records, names):
        steps = _looks(own[0])
        for i, record in enumerate(own):
            shares = [record[f"share_{name}_{step}"] for step in steps]
            axes.plot(range(len(steps)), shares, **_figures.look(i), alpha=0.8)
        axes.set_xticks(range(len(steps)), [str(step) for step in steps])
        axes.set_ylim(0, 1.02)
        _figures.level(axes, 0.5, name="claimed: above, after the first steps")
        _figures.label(axes, x="training step")
    return (
        "One line per seed: the share of the gradient's squared norm that lies along the leading "
        f"{_CLASSES} Hessian eigenvectors, as many as there are classes."
    )


CLAIM = _claims.Claim(
    name="gradient_subspace",
    paper="Gur-Ari, Roberts, Dyer (2018), arXiv:1812.04754",
    statement="after a short time the gradient lies in the space of a few leading Hessian "
    "eigenvectors, as many as there are classes",
    printed="nothing is quoted: the abstract alone was read, which has no numbers",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
