"""The records as a table and as a figure."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.reach import _chips
from benchmarks.reach._programs import GRADIENT, PROGRAMS

Record = Mapping[str, Any]

_COMPILED, _MEASURED = "reach.jsonl", "reach_measured.jsonl"
_OVER = ("operations", "bytes_moved", "bytes_sent")
_TITLE = "Compiled, not run: seconds are the published rates' and no program's"


def file_name(*, measure: bool) -> str:
    """Of the records in the folder of the results."""
    return _MEASURED if measure else _COMPILED


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(record: Record) -> str:
    """One record for people, in a line."""
    if not record["compiled"]:
        return f"{record['case']}: not compiled: {record['reason']}"
    parts = [
        f"{record['case']}: {record['seconds_to_compile']:.0f} s to compile",
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
        if record["program"] == GRADIENT and record["compiled"]
    }
    found = []
    for record in records:
        base = gradients.get(place(record)) if record["compiled"] else None
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
    if not record["compiled"]:
        return front + f"| {record['reason']} |" + " |" * 9
    over, seconds = record["over_gradient"], record["roofline_seconds"]
    bound = max(("operations", "memory", "network"), key=seconds.__getitem__)
    ratio = lambda name: f"{over[name]:.2f}" if name in over else ""
    cells = [
        f"{record['seconds_to_compile']:.0f} s",
        f"{record['bytes']['total'] / 1e9:.2f}" + ("" if record["fits"] else ", too much"),
        f"{record['operations'] / 1e12:.3g}", ratio("operations"),
        f"{record['bytes_moved'] / 1e9:.3g}", ratio("bytes_moved"),
        f"{record['bytes_sent'] / 1e9:.3g}", f"{seconds['largest']:.3g}", bound,
        "" if measured is None else f"{measured['measured']['seconds']:.3g} s",
    ]  # fmt: skip
    return front + "".join(f"| {cell} " for cell in cells) + "|"


def _suffix(record: Record) -> str:
    return "" if record["precision"] == "default" else f", {record['precision']}"


def figure(records: Iterable[Record], path: pathlib.Path) -> None:
    """Memory and seconds against the number of chips, a column a model, a line a program."""
    import matplotlib.pyplot as plt

    shown = [r for r in records if r["compiled"] and r["precision"] == "default"]
    models = sorted({(r["parameters"], r["model"]) for r in shown})
    colors = dict(zip(PROGRAMS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    marks = {"v5e": "o-", "v5p": "s-", "H100": "^--"}
    fig, axes = plt.subplots(
        2, len(models), figsize=(3.6 * len(models) + 1.5, 6.4), squeeze=False, layout="constrained"
    )
    values = (
        ("GB a chip", lambda r: r["bytes"]["total"] / 1e9),
        ("seconds by the published rates", lambda r: r["roofline_seconds"]["largest"]),
    )
    for column, (_, model) in enumerate(models):
        for row, (label, value) in enumerate(values):
            ax = axes[row][column]
            for program in PROGRAMS:
                for chip, mark in marks.items():
                    points = sorted(
                        (r["chips"], value(r))
                        for r in shown
                        if (r["model"], r["program"], r["chip"]) == (model, program, chip)
                    )
                    if points:
                        ax.plot(*zip(*points, strict=True), mark, color=colors[program], ms=5)
            if row == 0:
                for chip in _chips.CHIPS:
                    memory = _chips.CHIPS[chip].memory / 1e9
                    ax.axhline(memory, color="gray", lw=0.8, ls=":")
                    ax.annotate(chip, (1, memory), fontsize=7, color="gray", va="bottom")
            ax.set(xscale="log", yscale="log", xticks=(1, 4, 16, 64, 256), ylabel=label)
            ax.set_xticklabels(["1", "4", "16", "64", "256"])
            ax.set_xlim(0.8, 330)
            ax.set_title(model if row == 0 else "", fontsize=10)
            ax.set_xlabel("chips" if row else "")
    line = lambda style, **options: plt.Line2D([], [], linestyle=style, **options)
    handles = [line("-", color=color, label=name) for name, color in colors.items()]
    handles += [
        line(mark[1:], marker=mark[0], color="gray", label=chip) for chip, mark in marks.items()
    ]
    fig.legend(handles=handles, loc="outside right upper", fontsize=8)
    fig.suptitle(_TITLE, fontsize=11)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _short(number: float) -> str:
    for scale, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number:.3g} "
