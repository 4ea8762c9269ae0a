"""All that is shown of a run or of a comparison, in the terminal and on its page."""

from collections.abc import Sequence

from regjax.experiments import _report, _seeds
from regjax.experiments._monitor_report import monitor_contents
from regjax.experiments._numbers import number
from regjax.experiments._record import Record, title
from regjax.experiments._table import Contents

Compared = dict[str, list[Record]]
"""Of each item of a comparison, one record for each seed."""


def run_contents(record: Record, *, with_training: bool = True) -> Contents:
    """Returns what is shown of one run, without its training if that stands elsewhere."""
    shown = [*_report.training_contents(record)] if with_training else []
    if "surface" in record:
        shown += _report.landscape_contents(record)
    if "blocks" in record:
        shown += _report.spectrum_contents(record)
    if "monitor" in record:
        shown += monitor_contents(record)
    return shown


def compared_contents(records: Compared) -> Contents:
    """Returns what is shown of a comparison."""
    if has_seeds(records):
        return _seeds.seeds_contents(records)
    return _report.comparison_contents({item: of[0] for item, of in records.items()})


def has_seeds(records: Compared) -> bool:
    """Tells whether networks were trained with several seeds."""
    return any(len(of) > 1 for of in records.values())


def summary(record: Record) -> str:
    """Says in one sentence what came out of a run."""
    options, failure = record["settings"], record["training"]["failure"]
    if failure is not None:
        return failure
    epochs, trained = record["training"]["num_epochs"], "before training"
    if epochs:
        length = f"{epochs} epoch{'' if epochs == 1 else 's'}"
        trained = f"trained for {length} with {_report.descent(options)}"
    accuracy = number(record["generalization"]["test_accuracy"], ".2%")
    text = (
        f"The {options['model']} with {record['num_parameters']:,} parameters, {trained}, "
        f"classifies {accuracy} of the test examples of {record['data']['name']} correctly"
    )
    if "blocks" in record:
        matrix, largest = title(options["matrix"]), _report.largest(record)
        text += f"; the largest eigenvalue of its {matrix} is {largest}"
    if "surface" in record:
        highest = number(_report.largest_loss(record))
        text += f"; on the surface drawn here its training loss rises to {highest}"
    return f"{text}."


def compared_summary(records: Compared) -> str:
    """Says in one sentence what was compared, and how far apart the networks are in the test."""
    one = len(records) == 1
    what = f"{len(records)} network{'' if one else 's'}"
    if has_seeds(records):
        what += f" with {max(map(len, records.values()))} seeds{'' if one else ' each'}"
    means = {item: _mean_accuracy(of) for item, of in records.items()}
    low, high = (choose(means, key=lambda item: means[item]) for choose in (min, max))
    share = f"{means[low]:.2%}"
    if means[low] != means[high]:
        share = f"from {share} ({low}) to {means[high]:.2%} ({high})"
    return f"{what} classif{'ies' if one else 'y'} {share} of the test examples correctly."


def _mean_accuracy(records: Sequence[Record]) -> float:
    values = [record["generalization"]["test_accuracy"] for record in records]
    return sum(values) / len(values)
