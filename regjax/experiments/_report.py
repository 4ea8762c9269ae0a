"""What the command line prints of records."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._quantities import OF_PROBE, centre
from regjax.experiments._record import Record, title
from regjax.experiments._table import table, wrapped


def training_text(record: Record) -> str:
    """Describes the data, the network, and how well it does on both parts of the data."""
    options, data, numbers = record["settings"], record["data"], record["generalization"]
    # Methods without options of their own are those that change nothing.
    used = [options[kind] for kind in ("transformation", "init") if options[kind] in options]
    header = (
        f"{data['name']}, {data['num_train']} training and {data['num_test']} test examples; "
        f"{options['model']}, {record['num_parameters']:,} parameters; "
        f"{' with '.join([options['optimizer'], *used])}, {_epochs(record)}"
    )
    names = ("train", "test")
    loss = [_plain(numbers[f"{name}_loss"]) for name in names]
    accuracy = [f"{numbers[f'{name}_accuracy']:.2%}" for name in names]
    rows = [
        ["", *names, "gap"],
        ["loss", *loss, _plain(numbers["loss_gap"])],
        ["accuracy", *accuracy, f"{numbers['accuracy_gap']:.2%}"],
    ]
    failure = record["training"]["failure"]
    parts = [wrapped(header), table(rows), *([] if failure is None else [wrapped(failure)])]
    return "\n\n".join(parts)


def has_learned(record: Record) -> bool:
    """Tells whether the network of a record is better than a constant guess, if it was trained."""
    return record["training"]["failure"] is None


def spectrum_text(record: Record) -> str:
    """Lists the eigenvalues with their bounds and the summary of the density, block by block."""
    options, count = record["settings"], _divided_count(record)
    divided = f" (what divides evenly with --mesh {options['mesh']})" if count else ""
    what = (
        f"{title(options['matrix'])} of the mean loss over "
        f"{count or record['num_curvature_examples']} training examples{divided}{_mode(record)}"
    )
    blocks = [_block_text(what, name, block) for name, block in record["blocks"].items()]
    geometry = [_geometry_text(record)] if "geometry" in record else []
    return "\n\n".join([*blocks, *geometry, _LEGEND, _COUNT_LEGEND, *_of_drawn([record])])


def comparison_text(records: dict[str, Record]) -> str:
    """Makes one column for each record."""
    rows = [["", *records], *_remarks(records)]
    shared = _COMPARED
    if all("geometry" in record for record in records.values()):
        shared = {**_COMPARED, **_GEOMETRY}
    for name, text in shared.items():
        rows.append([name, *(text(record) for record in records.values())])
    return "\n\n".join(
        [table(rows), *failures(records), _ONE_SEED, _LEGEND, *_of_drawn(records.values())]
    )


def trainings_text(records: dict[str, Record]) -> str:
    """Makes one column for each record."""
    rows = [["", *records], *_remarks(records)]
    names = {name: text for name, text in _COMPARED.items() if name not in _OF_SPECTRUM}
    rows += [[name, *map(text, records.values())] for name, text in names.items()]
    return "\n\n".join([table(rows), *failures(records), _ONE_SEED])


def landscape_text(record: Record) -> str:
    """Describes the surface in a few numbers, and the probes at the end of training."""
    surface, probe = record["surface"], record["probes"][-1]
    header = (
        f"Loss surface of {surface['num_examples']} training examples, "
        f"{len(surface['positions'])} x {len(surface['positions'])} points in "
        f"{surface['seconds']:.1f} s{_mode(record)}; probes of {probe['num_examples']} examples"
    )
    rows = [[name, text(record)] for name, text in _LANDSCAPE.items()]
    return f"{wrapped(header)}\n\n{table(rows)}\n\n{_LANDSCAPE_LEGEND}"


def landscapes_text(records: dict[str, Record]) -> str:
    """Makes one column for each record."""
    rows = [["", *records], *_remarks(records)]
    names = {name: text for name, text in _COMPARED.items() if name not in _OF_SPECTRUM}
    for name, text in {**names, **_LANDSCAPE}.items():
        rows.append([name, *(text(record) for record in records.values())])
    return "\n\n".join([table(rows), *failures(records), _ONE_SEED, _LANDSCAPE_LEGEND])


def with_error(value: float | None, error: float | None) -> str:
    """Formats `value` to the second digit of its error (seven digits at most), and the error."""
    if value is None or error is None:
        return "not known"
    digits = 7
    if value and error:
        digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + 2
    return f"{value:.{min(max(digits, 1), 7)}g} ± {error:.2g}"


def _block_text(what: str, name: str, block: Record) -> str:
    eigenvalues, density = block["eigenvalues"], block["density"]
    products = eigenvalues["num_matvecs"] + density["num_matvecs"]
    steps = " and ".join(map(str, density["num_steps"]))
    header = (
        f"{what}, {name}: {block['num_parameters']:,} parameters, {products} products in "
        f"{eigenvalues['seconds'] + density['seconds']:.1f} s; density of {steps} Lanczos steps"
    )
    rows = [
        [f"eigenvalue {rank}", ("" if converged else "not converged ") + with_error(value, bound)]
        for rank, (value, bound, converged) in enumerate(
            zip(*_columns(eigenvalues), strict=True), start=1
        )
    ]
    size, trace, counts = block["num_parameters"], density["trace"], density["counts"]
    dimension = density["effective_dimension"]
    outlier, zero = counts["outlier_threshold"], counts["zero_threshold"]
    rows += [
        ["smallest eigenvalue", f"<= {density['smallest_ritz_value']:.4g}"],
        ["trace", _estimate(trace)],
        ["mean eigenvalue", with_error(trace["value"] / size, trace["standard_error"] / size)],
        [f"effective dimension at damping {dimension['damping']:g}", _estimate(dimension)],
        [f"eigenvalues above {outlier:.3g}", _count(counts["outliers"])],
        [f"eigenvalues from {zero:.3g} to {outlier:.3g}", _count(counts["bulk"])],
        [f"eigenvalues within ±{zero:.3g}", _count(counts["near_zero"])],
        [f"eigenvalues below -{zero:.3g}", _count(counts["negative"])],
    ]
    return f"{wrapped(header)}\n\n{table(rows)}"


def _geometry_text(record: Record) -> str:
    sharpness, count = record["geometry"]["spherical_sharpness"], record["geometry"]["num_examples"]
    which = "all leaves" if sharpness["of_all_leaves"] else f"{sharpness['num_leaves']} leaves"
    header = (
        f"Geometry of {count} training examples, inputs normalized; sharpness of "
        f"{sharpness['num_examples']}, {sharpness['mode']} mode, {which}"
    )
    rows = [[name, text(record)] for name, text in _GEOMETRY.items()]
    return f"{wrapped(header)}\n\n{table(rows)}"


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
    number = record["num_curvature_examples"]
    asked = record["settings"]["curvature_examples"] or record["data"]["num_train"]
    return "" if number == asked else f"{number} of {asked}"


def failures(records: dict[str, Record]) -> list[str]:
    """Says of each network that did not learn what went wrong."""
    failures = {name: record["training"]["failure"] for name, record in records.items()}
    return [wrapped(f"{name}: {text}") for name, text in failures.items() if text is not None]


def _plain(loss: float) -> str:
    """Formats a loss; one that has diverged in a few digits."""
    return f"{loss:.4f}" if abs(loss) < 1e4 else f"{loss:.3e}"


def _columns(eigenvalues: Record) -> tuple[list[Any], ...]:
    return tuple(eigenvalues[name] for name in ("values", "residual_norms", "converged"))


def _estimate(entry: Record) -> str:
    return with_error(entry["value"], entry["standard_error"])


def _count(entry: Record) -> str:
    """Formats a number of eigenvalues with its error and what the Lanczos steps leave open."""
    ends = [f"{entry[f'{end}_bound']:.4g}" for end in ("lower", "upper")]
    return f"{_estimate(entry)} [{', '.join(ends)}]"


def _of_drawn(records: Iterable[Record]) -> list[str]:
    """Says that errors leave out the draw of labels, where labels were drawn."""
    drawn = [record["settings"].get("num_samples") for record in records]
    counts = sorted({count for count in drawn if count is not None})
    if not counts:
        return []
    number = " or ".join(map(str, counts))
    return [
        wrapped(
            f"The Fisher matrix is that of {number} drawn label(s) per example: every ± and "
            "bracket is about that matrix, and leaves out how far it is from the exact one "
            "(without --num-samples)."
        )
    ]


def _number(name: str, form: str) -> Callable[[Record], str]:
    return lambda record: format(record["generalization"][name], form)


def _of_density(name: str) -> Callable[[Record], str]:
    return lambda record: _estimate(record["blocks"]["network"]["density"][name])


def _largest(record: Record) -> str:
    values, bounds, _ = _columns(record["blocks"]["network"]["eigenvalues"])
    return with_error(values[0], bounds[0])


_ONE_SEED = (
    "All of one seed: others give other numbers, and no ± here says how far apart.\n"
    "--seeds 5 trains each network five times."
)
_LEGEND = (
    "For eigenvalues and sharpness, ± bounds the distance to a true eigenvalue.\n"
    "Elsewhere it is one standard error from the random probes; what the quadrature\n"
    "leaves open is not included."
)
_COUNT_LEGEND = (
    "[a, b] behind a number of eigenvalues: what the Lanczos steps leave open, rigorous\n"
    "for the probes that were drawn; ± comes in addition. Steps are added until the\n"
    "bracket is about as narrow as ±, or 320 are made, unless --num-steps is given."
)
_COMPARED: dict[str, Callable[[Record], str]] = {
    "parameters": lambda record: f"{record['num_parameters']:,}",
    "train loss": lambda record: _plain(record["generalization"]["train_loss"]),
    "test loss": lambda record: _plain(record["generalization"]["test_loss"]),
    "loss gap": lambda record: _plain(record["generalization"]["loss_gap"]),
    "train accuracy": _number("train_accuracy", ".2%"),
    "test accuracy": _number("test_accuracy", ".2%"),
    "accuracy gap": _number("accuracy_gap", ".2%"),
    "largest eigenvalue": _largest,
    "trace": _of_density("trace"),
    "effective dimension": _of_density("effective_dimension"),
}
_OF_SPECTRUM = ("largest eigenvalue", "trace", "effective dimension")


def _width(index: int) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        flatness = record["flatness"][index]
        return ("" if flatness["converged"] else "more than ") + f"{flatness['interval_width']:.4g}"

    return text


def _short(compute: Callable[[Record], float]) -> Callable[[Record], str]:
    return lambda record: f"{compute(record):.4g}"


def _largest_loss(record: Record) -> float:
    return max(max(row) for row in record["surface"]["losses"])


_LANDSCAPE_LEGEND = (
    "Directions are random and filter-normalized; width 1 equals the norm of the\n"
    "filters (or layers). A probe goes 1/2 to 4 learning rates along the gradient."
)
_LANDSCAPE: dict[str, Callable[[Record], str]] = {
    "loss at the minimum": _short(centre),
    "largest loss on the surface": _short(_largest_loss),
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
        return f"{margins['low']:.3g}, {margins['median']:.3g}, {margins['high']:.3g}"

    return text


_GEOMETRY: dict[str, Callable[[Record], str]] = {
    "geometric complexity": lambda record: f"{record['geometry']['geometric_complexity']:.5g}",
    "spherical sharpness": _spherical,
    "margin in training, 5 %, median, 95 %": _margins("train"),
    "margin in the test": _margins("test"),
}
