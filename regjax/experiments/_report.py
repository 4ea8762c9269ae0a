"""What is shown of records: paragraphs and tables."""

from collections.abc import Callable, Iterable

import numpy as np

from regjax.experiments import _meanings
from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._numbers import count, estimate, loss_value, number, with_error
from regjax.experiments._quantities import OF_PROBE, centre
from regjax.experiments._record import Record, title
from regjax.experiments._table import Contents, Table


def training_contents(record: Record) -> Contents:
    """Describes the data, the network, and how well it does on both parts of the data."""
    options, data, numbers = record["settings"], record["data"], record["generalization"]
    header = (
        f"{data['name']}, {data['num_train']} training and {data['num_test']} test examples; "
        f"{options['model']}, {record['num_parameters']:,} parameters; "
        f"{descent(options)}, {_epochs(record)}"
    )
    names = ("train", "test")
    losses = [loss_value(numbers[f"{name}_loss"]) for name in names]
    accuracies = [number(numbers[f"{name}_accuracy"], ".2%") for name in names]
    rows = [
        ["loss", *losses, loss_value(numbers["loss_gap"])],
        ["accuracy", *accuracies, number(numbers["accuracy_gap"], ".2%")],
    ]
    failure = record["training"]["failure"]
    return [header, Table(rows, ["", *names, "gap"]), *([] if failure is None else [failure])]


def descent(options: Record) -> str:
    """Names the optimiser and the methods beside it; those without options change nothing."""
    used = [options[kind] for kind in ("transformation", "init") if options[kind] in options]
    return " with ".join([options["optimizer"], *used])


def has_learned(record: Record) -> bool:
    """Tells whether the network of a record is better than a constant guess, if it was trained."""
    return record["training"]["failure"] is None


def spectrum_contents(record: Record) -> Contents:
    """Lists the eigenvalues with their bounds and the summary of the density, block by block."""
    options, divided = record["settings"], _divided_count(record)
    remark = f" (what divides evenly with --mesh {options['mesh']})" if divided else ""
    what = (
        f"{title(options['matrix'])} of the mean loss over "
        f"{divided or record['num_curvature_examples']} training examples{remark}{_mode(record)}"
    )
    shown: list[str | Table] = []
    for name, block in record["blocks"].items():
        shown += _block(what, name, block)
    shown += _geometry(record) if "geometry" in record else []
    legends = [_meanings.SPECTRUM_LEGEND, _meanings.COUNT_LEGEND]
    return [*shown, *legends, *_of_drawn([record])]


def comparison_contents(records: dict[str, Record]) -> Contents:
    """Makes one column for each record: of trained networks, their spectra or their surfaces."""
    quantities, legends = dict(_OF_TRAINING), [_meanings.NO_SEEDS]
    of = list(records.values())
    if "blocks" in of[0]:
        quantities |= _OF_SPECTRUM
        if all("geometry" in record for record in of):
            quantities |= _GEOMETRY
        legends += [_meanings.SPECTRUM_LEGEND, *_of_drawn(of)]
    elif "surface" in of[0]:
        quantities |= _LANDSCAPE
        legends.append(_meanings.LANDSCAPE_LEGEND)
    rows = [[name, *(text(record) for record in of)] for name, text in quantities.items()]
    shown = Table([*_remarks(records), *rows], ["", *records])
    return [shown, *failures(records), *legends]


def landscape_contents(record: Record) -> Contents:
    """Describes the surface in a few numbers, and the probes at the end of training."""
    surface, probe = record["surface"], record["probes"][-1]
    header = (
        f"Loss surface of {surface['num_examples']} training examples, "
        f"{len(surface['positions'])} x {len(surface['positions'])} points in "
        f"{surface['seconds']:.1f} s{_mode(record)}; probes of {probe['num_examples']} examples"
    )
    rows = [[name, text(record)] for name, text in _LANDSCAPE.items()]
    return [header, Table(rows), _meanings.LANDSCAPE_LEGEND]


def _block(what: str, name: str, block: Record) -> Contents:
    eigenvalues, density = block["eigenvalues"], block["density"]
    products = eigenvalues["num_matvecs"] + density["num_matvecs"]
    steps = density["num_steps"]
    header = (
        f"{what}, {name}: {block['num_parameters']:,} parameters, {products} matrix-vector "
        f"products in {eigenvalues['seconds'] + density['seconds']:.1f} s; density from "
        f"{len(steps)} random probe{'s' * (len(steps) != 1)} with {' and '.join(map(str, steps))} "
        "Lanczos steps"
    )
    rows = [
        [f"eigenvalue {i + 1}", _eigenvalue(block, i)] for i in range(len(eigenvalues["values"]))
    ]
    size, trace, counts = block["num_parameters"], density["trace"], density["counts"]
    dimension = density["effective_dimension"]
    outlier, zero = counts["outlier_threshold"], counts["zero_threshold"]
    rows += [
        ["smallest eigenvalue", f"<= {number(density['smallest_ritz_value'])}"],
        ["trace", estimate(trace)],
        ["mean eigenvalue", with_error(trace["value"] / size, trace["standard_error"] / size)],
        [f"effective dimension at damping {dimension['damping']:g}", estimate(dimension)],
        [f"eigenvalues above {outlier:.3g}", count(counts["outliers"])],
        [f"eigenvalues from {zero:.3g} to {outlier:.3g}", count(counts["bulk"])],
        [f"eigenvalues within ±{zero:.3g}", count(counts["near_zero"])],
        [f"eigenvalues below -{zero:.3g}", count(counts["negative"])],
    ]
    return [header, Table(rows)]


def _geometry(record: Record) -> Contents:
    sharpness, count = record["geometry"]["spherical_sharpness"], record["geometry"]["num_examples"]
    which = "all leaves" if sharpness["of_all_leaves"] else f"{sharpness['num_leaves']} leaves"
    header = (
        f"Geometry of {count} training examples, inputs normalized; sharpness of "
        f"{sharpness['num_examples']}, {sharpness['mode']} mode, {which}"
    )
    rows = [[name, text(record)] for name, text in _GEOMETRY.items()]
    return [header, Table(rows), _meanings.GEOMETRY_LEGEND]


def _epochs(record: Record) -> str:
    """Says how many epochs there were, and whether they were run now."""
    options, training = record["settings"], record["training"]
    count, seconds = training["num_epochs"], f"{training['seconds']:.1f} s"
    epochs = f"{count} epoch{'' if count == 1 else 's'}"
    if options.get("checkpoint") is not None:
        return f"{epochs} before; read from {training['checkpoint']}, nothing was trained"
    return f"{epochs}, resumed for {seconds}" if options["resume"] else f"{epochs} in {seconds}"


def _mode(record: Record) -> str:
    """Says in which mode batch norm is looked at, if the network has some."""
    options = record["settings"]
    has_statistics = NORMALIZATIONS[options["normalization"]].has_batch_statistics
    if not has_statistics or "batch_norm_mode" not in options:
        return ""
    mode = options["batch_norm_mode"]
    chunks = f" of {options['chunk_size']}" if mode == "train_per_chunk" else ""
    return f", batch norm in {mode} mode{chunks}"


def _remarks(records: dict[str, Record]) -> list[list[str]]:
    """Returns the rows of a comparison that say with what the numbers are to be read."""
    rows = []
    modes = [_mode(record).partition("batch norm in ")[2] for record in records.values()]
    if any(modes):
        rows.append(["batch norm", *modes])
    counts = [_divided_count(record) for record in records.values()]
    if any(counts):
        rows.append(["examples in the matrix", *counts])
    if not all(map(has_learned, records.values())):
        learned = ["yes" if has_learned(record) else "NO" for record in records.values()]
        rows.append(["learned", *learned])
    return rows


def _divided_count(record: Record) -> str:
    """Says how many examples are in a matrix, where a mesh leaves some out; else ""."""
    if "num_curvature_examples" not in record:
        return ""
    found = record["num_curvature_examples"]
    asked = record["settings"]["curvature_examples"] or record["data"]["num_train"]
    return "" if found == asked else f"{found} of {asked}"


def failures(records: dict[str, Record]) -> list[str]:
    """Says of each network that did not learn what went wrong."""
    failures = {name: record["training"]["failure"] for name, record in records.items()}
    return [f"{name}: {text}" for name, text in failures.items() if text is not None]


def _eigenvalue(block: Record, index: int) -> str:
    names = ("values", "residual_norms", "converged")
    value, bound, converged = (block["eigenvalues"][name][index] for name in names)
    return ("" if converged else "not converged ") + with_error(value, bound)


def _of_drawn(records: Iterable[Record]) -> list[str]:
    """Says that errors leave out the draw of labels, where labels were drawn."""
    drawn = [record["settings"].get("num_samples") for record in records]
    counts = sorted({count for count in drawn if count is not None})
    if not counts:
        return []
    return [_meanings.DRAWN_LEGEND.format(number=" or ".join(map(str, counts)))]


def _percent(share: float | None) -> str:
    return number(share, ".2%")


def _of_data(name: str, form: Callable[[float | None], str]) -> Callable[[Record], str]:
    return lambda record: form(record["generalization"][name])


def _of_density(name: str) -> Callable[[Record], str]:
    return lambda record: estimate(record["blocks"]["network"]["density"][name])


def largest(record: Record) -> str:
    """Formats the largest eigenvalue of a network."""
    return _eigenvalue(record["blocks"]["network"], 0)


_OF_TRAINING: dict[str, Callable[[Record], str]] = {
    "parameters": lambda record: f"{record['num_parameters']:,}",
    "train loss": _of_data("train_loss", loss_value),
    "test loss": _of_data("test_loss", loss_value),
    "loss gap": _of_data("loss_gap", loss_value),
    "train accuracy": _of_data("train_accuracy", _percent),
    "test accuracy": _of_data("test_accuracy", _percent),
    "accuracy gap": _of_data("accuracy_gap", _percent),
}
_OF_SPECTRUM: dict[str, Callable[[Record], str]] = {
    "largest eigenvalue": largest,
    "trace": _of_density("trace"),
    "effective dimension": _of_density("effective_dimension"),
}


def _width(index: int) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        flatness = record["flatness"][index]
        return ("" if flatness["converged"] else "more than ") + number(flatness["interval_width"])

    return text


def _short(compute: Callable[[Record], float]) -> Callable[[Record], str]:
    return lambda record: number(compute(record))


def largest_loss(record: Record) -> float:
    """Returns the largest loss of a surface."""
    return float(np.max(record["surface"]["losses"]))  # NaN if there is one


_LANDSCAPE: dict[str, Callable[[Record], str]] = {
    "loss at the minimum": _short(centre),
    "largest loss on the surface": _short(largest_loss),
    "width of {loss < e x minimum}, direction 1": _width(0),
    "width of {loss < e x minimum}, direction 2": _width(1),
    **{name: _short(compute) for name, compute in OF_PROBE.items()},
}


def _spherical(record: Record) -> str:
    sharpness = record["geometry"]["spherical_sharpness"]
    text = with_error(sharpness["value"], sharpness["residual_norm"])
    return text if sharpness["converged"] else f"not converged {text}"


def _margins(part: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        margins = record["geometry"]["margins"][part]
        return ", ".join(number(margins[name], ".3g") for name in ("low", "median", "high"))

    return text


_GEOMETRY: dict[str, Callable[[Record], str]] = {
    "geometric complexity": lambda record: number(
        record["geometry"]["geometric_complexity"], ".5g"
    ),
    "spherical sharpness": _spherical,
    "margin in training (5 %, median, 95 %)": _margins("train"),
    "margin in the test": _margins("test"),
}
# The names of the rows that comparisons may have.
LISTED = (*_OF_TRAINING, *_OF_SPECTRUM, *_GEOMETRY, *_LANDSCAPE)
