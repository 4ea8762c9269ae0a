"""What is shown of networks that were trained with several seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypeGuard

from regjax.experiments import _meanings
from regjax.experiments._numbers import with_error
from regjax.experiments._quantities import OF_PROBE, centre
from regjax.experiments._record import Record
from regjax.experiments._report import failures
from regjax.experiments._table import Contents, Table


def seeds_contents(records: dict[str, list[Record]]) -> Contents:
    """Makes one column for each network: mean and deviation, and the difference to the first.

    Args:
      records: of each network, one record for each seed, in the same order.
    """
    columns = {
        name: {item: [compute(record) for record in of] for item, of in records.items()}
        for name, compute in QUANTITIES.items()
        if all(_has(record, compute) for of in records.values() for record in of)
    }
    first, *others = records
    seeds = [record["settings"]["seed"] for record in records[first]]
    deviation = _meanings.DEVIATION.format(count=len(seeds), first=seeds[0], last=seeds[-1])
    rows = [[name, *map(mean_and_deviation, by.values())] for name, by in columns.items()]
    tables, legend = [Table(rows, ["", *records], deviation)], f"{deviation}."
    if others:
        compared = [
            [name, *(paired_difference(by[item], by[first]) for item in others)]
            for name, by in columns.items()
        ]
        tables.append(Table(compared, [f"difference to {first}", *others], _meanings.PAIRED))
        legend += f" {_meanings.PAIRED}."
    by_seed = {
        f"{item}, seed {record['settings']['seed']}": record
        for item, of in records.items()
        for record in of
    }
    return [*tables, *failures(by_seed), legend]


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Formats the mean and the standard deviation, "not known" if a value is not."""
    known = [value for value in values if _is_known(value)]
    if len(known) < max(len(values), 2):
        return "not known"
    return with_error(statistics.fmean(known), statistics.stdev(known))


def paired_difference(values: Sequence[float | None], others: Sequence[float | None]) -> str:
    """Formats the mean difference of values that belong together, and its standard error."""
    pairs = zip(values, others, strict=True)
    differences = [a - b for a, b in pairs if _is_known(a) and _is_known(b)]
    if len(differences) < max(len(values), 2):
        return "not known"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return with_error(statistics.fmean(differences), error)


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _has(record: Record, compute: Callable[[Record], float | None]) -> bool:
    try:
        compute(record)
    except KeyError:
        return False
    return True


def _of_data(name: str, factor: float = 1) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        found = record["generalization"][name]
        return None if found is None else factor * found

    return value


def _largest(record: Record) -> float | None:
    eigenvalues = record["blocks"]["network"]["eigenvalues"]
    return eigenvalues["values"][0] if eigenvalues["converged"][0] else None


def _of_density(name: str) -> Callable[[Record], float | None]:
    return lambda record: record["blocks"]["network"]["density"][name]["value"]


def _sharpness(record: Record) -> float | None:
    sharpness = record["geometry"]["spherical_sharpness"]
    return sharpness["value"] if sharpness["converged"] else None


def _margin(part: str) -> Callable[[Record], float | None]:
    return lambda record: record["geometry"]["margins"][part]["median"]


def _width(index: int) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        flatness = record["flatness"][index]
        return flatness["interval_width"] if flatness["converged"] else None

    return value


def _last_seen(name: str, flag: str | None = None) -> Callable[[Record], float | None]:
    """What a monitor saw last, where that is to be relied on."""

    def value(record: Record) -> float | None:
        last = record["monitor"][-1]
        return last[name] if flag is None or last[flag] else None

    return value


QUANTITIES: dict[str, Callable[[Record], float | None]] = {
    "train loss": _of_data("train_loss"),
    "test loss": _of_data("test_loss"),
    "loss gap": _of_data("loss_gap"),
    "train accuracy, %": _of_data("train_accuracy", 100),
    "test accuracy, %": _of_data("test_accuracy", 100),
    "accuracy gap, %": _of_data("accuracy_gap", 100),
    "largest eigenvalue": _largest,
    "trace": _of_density("trace"),
    "effective dimension": _of_density("effective_dimension"),
    "geometric complexity": lambda record: record["geometry"]["geometric_complexity"],
    "spherical sharpness": _sharpness,
    "median margin in training": _margin("train"),
    "median margin in the test": _margin("test"),
    "loss at the minimum": centre,
    "width of {loss < e x minimum}, direction 1": _width(0),
    "width of {loss < e x minimum}, direction 2": _width(1),
    **OF_PROBE,
    "largest eigenvalue, monitor": _last_seen("sharpness", "sharpness_converged"),
    "noise scale, monitor": _last_seen("gradient_noise_scale", "noise_resolved"),
    "gradient in top eigenspace, monitor": _last_seen("gradient_share"),
}
