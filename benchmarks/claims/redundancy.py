"""The rank of per-example gradients at the gates as a forecast of how many units can go."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

import regjax
from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks, _pruning
from regjax import pruning

_EXAMPLES, _CHUNK = 1024, 64  # of the gradients
_LOSS = 0.01  # of test accuracy
_SPEARMAN = 0.7
_RANKS = ("rank", "energy_rank", "effective_rank", "stable_rank")


def _settings(preset: str) -> Sequence[Settings]:
    channels, plans = [16, 32, 64], {"digits": (range(5), 20), "fashion_mnist": (range(3), 20)}
    if preset == "smoke":
        channels, plans = [4, 8], {"digits": (range(2), 1)}
    return [
        {
            "data": data, "layer": layer, "units": units, "seed": seed,
            "epochs": epochs, "channels": channels,
        }
        for data, (seeds, epochs) in plans.items()
        for seed in seeds
        for layer, units in enumerate(channels)
    ]  # fmt: skip


def _run(settings: Settings) -> dict[str, float]:
    data, channels, seed = settings["data"], tuple(settings["channels"]), settings["seed"]
    steps = len(_pruning.split(data).y) // _pruning.BATCH
    steps *= settings["epochs"]
    problem, structure = (
        _pruning.trained(data, channels, steps, seed),
        _pruning.structure(data, channels),
    )
    name = sorted(structure.groups)[settings["layer"]]
    report = pruning.gradient_redundancy(_gradients(data, channels, steps, seed)[name])
    scores = {
        "saliency": pruning.redundancy_saliency(report),
        "norm": pruning.incoming_norm(structure, problem.end.params)[name],
    }
    values = report.singular_values
    return {
        "rank": int(report.rank),
        "energy_rank": int(pruning.energy_rank(values)),
        "effective_rank": float(pruning.effective_rank(values)),
        "stable_rank": float(pruning.stable_rank(values)),
        "smallest_null_energy": float(report.smallest_null_energy),
        "is_vanishing": bool(report.is_vanishing),
        **{
            f"removable_by_{by}": _count_removable(structure, problem, name, found)
            for by, found in scores.items()
        },
    }


@functools.cache
def _gradients(data: str, channels: tuple[int, ...], steps: int, seed: int) -> Any:
    """Of the gates of all layers, a row for each training example."""
    problem, structure = (
        _pruning.trained(data, channels, steps, seed),
        _pruning.structure(data, channels),
    )
    loss = regjax.model_loss(problem.end, _networks.cross_entropy)
    gate_loss = pruning.gated_loss(structure, loss, problem.end.params)
    gates = pruning.unit_gates(structure, problem.end.params)
    batch = problem.split.x[:_EXAMPLES], problem.split.y[:_EXAMPLES]
    return pruning.gradient_matrix(gate_loss, gates, *batch, chunk_size=_CHUNK)


def _count_removable(
    structure: pruning.Structure, problem: _pruning.Problem, name: str, scores: jax.Array
) -> int:
    """How many units of a layer go, lowest first and without training on, before accuracy does."""
    gates = pruning.unit_gates(structure, problem.end.params)
    whole = _networks.model_accuracy(problem.end, problem.split)
    for count, unit in enumerate(np.argsort(np.asarray(scores), stable=True)):
        gates = {**gates, name: gates[name].at[unit].set(0)}
        params = pruning.apply_gates(structure, problem.end.params, gates)
        model = problem.end._replace(params=params)
        if _networks.model_accuracy(model, problem.split) <= whole - _LOSS:
            return count
    return len(scores)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        layers = "; ".join(
            f"{part[0]['units']} units: {_of(part, 'removable_by_saliency')} can go (by |w| "
            f"{_of(part, 'removable_by_norm')}), ranks {_of(part, 'rank')} / "
            f"{_of(part, 'energy_rank')} / {_of(part, 'effective_rank')} / "
            f"{_of(part, 'stable_rank')}"
            for part in _claims.groups(own, "layer").values()
        )
        flagged = int(_claims.numbers(own, "is_vanishing").sum())
        found = {rank: _forecast(own, rank) for rank in _RANKS}
        verdicts.append(
            Verdict(
                f"{_claims.word(found['rank'] > _SPEARMAN)} ({data}): the numerical rank foretells "
                "how many units of a layer can go",
                f"Spearman {_shown(found['rank'])} over {len(own)} layers and seeds of the "
                f"redundant share with the share that can go at less than {_LOSS:.0%} of accuracy "
                f"without training on; means over seeds of numerical / energy / effective / stable "
                f"rank: {layers}; {flagged} reports flagged as vanishing",
            )
        )
        safe = _redundant(own, "energy_rank") <= _removable(own)
        verdicts.append(
            Verdict(
                f"{_claims.word(found['energy_rank'] > _SPEARMAN)} ({data}): so does the rank with "
                "99% of the energy",
                f"Spearman {_shown(found['energy_rank'])} (effective rank "
                f"{_shown(found['effective_rank'])}, stable rank {_shown(found['stable_rank'])}); "
                f"as many units as it says can go in {int(safe.sum())} of {len(own)} layers and "
                "seeds; added after a look at two seeds, in which the numerical rank was full",
            )
        )
    return verdicts


def _forecast(records: Sequence[Record], rank: str) -> float:
    """Of shares, as wider layers have more to give by any measure."""
    return _spearman(_redundant(records, rank), _removable(records))


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    """NaN where one of them does not vary."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.spearmanr(one, other)[0])


def _redundant(records: Sequence[Record], rank: str) -> np.ndarray:
    return 1 - _claims.numbers(records, rank) / _claims.numbers(records, "units")


def _removable(records: Sequence[Record]) -> np.ndarray:
    return _claims.numbers(records, "removable_by_saliency") / _claims.numbers(records, "units")


def _of(records: Sequence[Record], name: str) -> str:
    return f"{_claims.numbers(records, name).mean():.1f}"


def _shown(correlation: float) -> str:
    return "undefined (one of them is constant)" if np.isnan(correlation) else f"{correlation:.2f}"


def _draw(records: Sequence[Record], figure: Any) -> str:
    texts = {"rank": "numerical rank", "energy_rank": "rank with 99 % of the energy"}
    names = dict.fromkeys(texts, "units that can go\n(share of the layer)")
    for axes, own, rank in _figures.panels(figure, records, names, height=2):
        for i, (layer, part) in enumerate(_claims.groups(own, "layer").items()):
            style = {**_figures.look(i), "linestyle": "", "alpha": 0.7}
            axes.plot(_redundant(part, rank), _removable(part), **style, label=f"layer {layer + 1}")
        axes.axline((0, 0), slope=1, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)),
                    label="as many as the rank foretells")  # fmt: skip
        axes.set(xlim=(-0.04, 0.72), ylim=(-0.04, 0.72))
        _figures.label(axes, x=f"1 - {texts[rank]} / units")
    return "One point per layer and seed. All points at 0: the rank is full and foretells nothing."


CLAIM = _claims.Claim(
    name="redundancy",
    paper="Zhou et al. 2022 (arXiv:2206.03596)",
    statement="the rank deficit of a layer's gradients tells how many of its units are redundant",
    printed="only the abstract and a summary were read; the criterion is a reconstruction",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
