"""The records as a table and as a figure."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.claims import _figures, _frame
from benchmarks.reach import _chips
from benchmarks.reach._programs import GRADIENT, PROGRAMS

Record = Mapping[str, Any]

_COMPILED, _MEASURED = "reach.jsonl", "reach_measured.jsonl"
_OVER = ("operations", "bytes_moved", "bytes_sent")
_TITLE = "Compiled, not run: seconds are estimates from the chips' published rates"


def file_name(*, measure: bool) -> str:
    """Of the records in the folder of the results."""
    return _MEASURED if measure else _COMPILED


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_known(record: Record) -> bool:
    """Whether a record says what a program does: it was compiled, or planned at least."""
    return bool(record["compiled"] or record.get("planned"))


def summary(record: Record) -> str:
    """One record for people, in a line."""
    if not is_known(record):
        return f"{record['case']}: not compiled: {record['reason']}"
    parts = [
        f"{record['case']}: {_seconds(record)} to compile",
        f"{_short(record['bytes']['total'])}B a chip" + ("" if record["fits"] else " (too much)"),
        f"{_short(record['operations'])} operations, {_short(record['bytes_moved'])}B moved, "
        f"{_short(record['bytes_sent'])}B sent",
    ]
    if "roofline_seconds" in record:
        parts.append(f"{record['roofline_seconds']['largest']:.3g} s by the published rates")
    if "measured" in record:
        parts.append(f"{record['measured']['seconds']:.3g} s measured")
    return ", ".join(parts)


def conclude(out: pathlib.Path) -> None:
    """Writes the table and the figure of the records that are there."""
    records = with_ratios(read(out / _COMPILED))
    if records:
        text = table(records, read(out / _MEASURED))
        (out / "reach.md").write_text(text)
        figure(records, out / "reach.png")


def with_ratios(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The records with what each program takes over the gradient of its model on its chips."""
    records = list(records)
    place = lambda record: (record["model"], record["chip"], record["chips"], record["precision"])
    gradients = {
        place(record): record
        for record in records
        if record["program"] == GRADIENT and is_known(record)
    }
    found = []
    for record in records:
        base = gradients.get(place(record)) if is_known(record) else None
        over = (
            {}
            if base is None
            else {name: record[name] / base[name] for name in _OVER if base[name]}
        )
        found.append({**record, "over_gradient": over})
    return found


def table(records: Iterable[Record], measured: Iterable[Record]) -> str:
    """Markdown: a row a case, in the order of models, chips and programs."""
    seconds = {record["case"]: record for record in measured if "measured" in record}
    lines = [
        f"# {_TITLE}.",
        "",
        "| model | chips | program | compiled in | GB a chip | 1e12 operations | over gradient | "
        "GB moved | over gradient | GB sent | seconds | bound by | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=_order):
        lines.append(_row(record, seconds.get(record["case"])))
    sources = [f"- {name}: {chip.source}." for name, chip in _chips.CHIPS.items()]
    return "\n".join([*lines, "", "Rates:", *sources, ""])


def _order(record: Record) -> tuple[Any, ...]:
    chips = list(_chips.CHIPS)
    size = record.get("parameters", 0)
    return (
        record["model"] == "ResNet 11M", record["model"], chips.index(record["chip"]),
        record["chips"], PROGRAMS.index(record["program"]), record["precision"], size,
    )  # fmt: skip


def _row(record: Record, measured: Record | None) -> str:
    place = f"{record['chips']} {record['chip']}"
    program = record["program"] + _suffix(record)
    front = f"| {record['model']} | {place} | {program} "
    if not is_known(record):
        return front + f"| {record['reason']} |" + " |" * 9
    over, seconds = record["over_gradient"], record["roofline_seconds"]
    bound = max(("operations", "memory", "network"), key=seconds.__getitem__)
    ratio = lambda name: f"{over[name]:.2f}" if name in over else ""
    cells = [
        _seconds(record),
        f"{record['bytes']['total'] / 1e9:.2f}" + ("" if record["fits"] else ", too much"),
        f"{record['operations'] / 1e12:.3g}", ratio("operations"),
        f"{record['bytes_moved'] / 1e9:.3g}", ratio("bytes_moved"),
        f"{record['bytes_sent'] / 1e9:.3g}", f"{seconds['largest']:.3g}", bound,
        "" if measured is None else f"{measured['measured']['seconds']:.3g} s",
    ]  # fmt: skip
    return front + "".join(f"| {cell} " for cell in cells) + "|"


def _seconds(record: Record) -> str:
    """That the compiler took, and whether it was stopped when all that is recorded was known."""
    planned = " (planned)" if record.get("planned") else ""
    return f"{record['seconds_to_compile']:.0f} s{planned}"


def _suffix(record: Record) -> str:
    return "" if record["precision"] == "default" else f", {record['precision']}"


def figure(records: Iterable[Record], path: pathlib.Path) -> None:
    """Memory and seconds against the number of chips, a column a model, a line a program."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [r for r in records if is_known(r) and r["precision"] == "default"]
    models = [model for _, model in sorted({(r["parameters"], r["model"]) for r in shown})]
    programs = [name for name in PROGRAMS if any(r["program"] == name for r in shown)]
    chips = {
        chip: style
        for chip, style in {"v5e": ("o", "-"), "v5p": ("s", ":"), "H100": ("^", "--")}.items()
        if any(r["chip"] == chip for r in shown)
    }
    values = {
        "memory per chip (GB)": lambda r: r["bytes"]["total"] / 1e9,
        "estimated seconds": lambda r: r["roofline_seconds"]["largest"],
    }
    fig = Figure(figsize=(7.6, 4.8), dpi=200, layout="constrained")
    grid = fig.subplots(2, len(models), squeeze=False)
    for row, (text, value) in enumerate(values.items()):
        for axes, model in zip(grid[row], models, strict=True):
            own = [r for r in shown if r["model"] == model]
            for i, program in enumerate(programs):
                for chip, (marker, line) in chips.items():
                    points = sorted(
                        # Side by side, where they would lie upon each other.
                        (r["chips"] * 1.1 ** (i - len(programs) / 2), value(r))
                        for r in own
                        if (r["program"], r["chip"]) == (program, chip)
                    )
                    look = {"color": _figures.COLORS[i], "alpha": 0.8}
                    if points:
                        x, y = zip(*points, strict=True)
                        axes.plot(x, y, linestyle=line, linewidth=1, **look)
                        # No point is hidden behind the name of a level.
                        axes.plot(x, y, marker, markersize=4, zorder=4, **look)
            if row == 0:
                for place, chip in enumerate(chips):
                    memory = _chips.CHIPS[chip].memory / 1e9
                    # Side by side: v5p and H100 have nearly as much.
                    _figures.level(axes, memory, f"one {chip}", left=0.98 - 0.36 * (place % 2))
                    # Readable where a line passes.
                    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}
                    axes.texts[-1].set(bbox=white, zorder=3)
                axes.set_title(model, fontsize=8)
            axes.set(xscale="log", yscale="log")
            axes.set_xlim(0.6, 420)
            _figures.ticks(axes, "x", (1, 4, 16, 64, 256))
            axes.margins(y=0.12)
            _figures.logarithmic(axes)
            _figures.label(axes, x="chips" if row else None, y=text if model == models[0] else None)
    colors = dict(zip(programs, _figures.COLORS, strict=False))
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles += [
        Line2D([], [], marker=marker, linestyle=line, color="0.4", label=chip)
        for chip, (marker, line) in chips.items()
    ]
    fig.legend(handles=handles, loc="outside lower center", fontsize=7, frameon=False, ncols=4)
    fig.suptitle(f"{_TITLE}.", fontsize=9, fontweight="bold")
    _frame.write(fig, path)


def _short(number: float) -> str:
    for scale, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number:.3g} "
