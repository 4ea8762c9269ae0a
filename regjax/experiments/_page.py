"""The page of a run: figures, tables and settings in one HTML file that needs nothing else.

It says nothing that the records and figures beside it do not: a later run may write it anew.
"""

import functools
import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regjax._files import CheckpointError
from regjax.experiments import _contents, _meanings, _record
from regjax.experiments._folder import PAGE, PAGE_MARK, all_options
from regjax.experiments._options import option
from regjax.experiments._pictures import Drawing, drawings_of, images
from regjax.experiments._record import Record
from regjax.experiments._settings import INCIDENTAL, TrainSettings
from regjax.experiments._table import Contents, Table
from regjax.experiments._words import command_line

# The records of single runs that a folder may hold, in the order of the page.
_RECORDS = {
    "training.json": "Training",
    "spectrum.json": "Spectrum",
    "landscape.json": "Loss surface",
}


class Row(NamedTuple):
    """Rows of a table that mean the same: their cells, and what they mean."""

    cells: list[list[str]]
    meaning: str


class Setting(NamedTuple):
    """An option with its value, and whether that is another than by default."""

    name: str
    value: str
    is_set: bool


def write_page(folder: Path, name: str, record: Record) -> None:
    """Writes the page of a run, and of the others in its folder that are of the same network.

    Args:
      folder: that of the results, with the figures.
      name: file name of the record.
      record: what came out.
    """
    found = {name: record}
    for other in _RECORDS.keys() - {name}:
        one = _read(folder / other)
        if one is not None and _is_alike(one, record):
            found[other] = one
    records = {title: found[name] for name, title in _RECORDS.items() if name in found}
    parts = [
        {
            "title": title,
            "summary": _contents.summary(one),
            "images": images(drawings_of(folder, one)),
            "contents": _contents.run_contents(one, with_training=number == 0),
            "command": one["command"],
            "options": one["settings"],
            "facts": _facts([one], one["finished"]),
        }
        for number, (title, one) in enumerate(records.items())
    ]
    options = record["settings"]
    _write(folder, f"{options['model']} on {record['data']['name']}", parts)


def write_compared_page(
    folder: Path,
    settings: TrainSettings,
    records: _contents.Compared,
    drawings: Sequence[Drawing],
    finished: Record,
) -> None:
    """Writes the page of a comparison.

    Args:
      folder: that of the results.
      settings: the common options.
      records: by item, one for each seed.
      drawings: the figures.
      finished: when the comparison ended, and what it took.
    """
    of = list(itertools.chain.from_iterable(records.values()))
    part = {
        "title": f"Comparison of {', '.join(records)}",
        "summary": _contents.compared_summary(records),
        "images": images(drawings),
        "contents": _contents.compared_contents(records),
        "command": command_line(settings),
        "options": all_options(settings),
        "facts": _facts(of, finished),
    }
    names = dict.fromkeys(record["data"]["name"] for record in of)
    _write(folder, f"{len(records)} networks on {', '.join(names)}", [part])


def _write(folder: Path, title: str, parts: list[dict[str, Any]]) -> None:
    import jinja2

    for part in parts:
        part["contents"] = list(_shown(part["contents"]))
        part["is_wide"] = part["options"].get("figure_width", "page") == "page"
        part["settings"] = _settings(part["options"], part["command"])
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("_page.html").read_text("utf-8"))
    mark = f'{PAGE_MARK} {_record.versions()["regjax"]}">'
    text = template.render(mark=mark, title=title, parts=parts)
    _record.write_bytes(folder / PAGE, text.encode())


def _shown(contents: Contents) -> Iterator[dict[str, Any]]:
    """Brings together the rows of tables that stand behind each other and mean the same."""
    for part in contents:
        if isinstance(part, str):
            yield {"text": part}
            continue
        groups = itertools.groupby(part.rows, functools.partial(_meaning, part))
        rows = [Row(list(cells), meaning) for meaning, cells in groups]
        yield {"head": part.head, "groups": rows, "width": len(part.rows[0])}


def _meaning(table: Table, row: list[str]) -> str:
    """Says what a row means, and what its error covers."""
    text, error = _meanings.meaning(row[0])
    error = error if table.error is None else table.error
    return f"{text} {error}." if error else text


def _settings(options: Record, command: str) -> list[Setting]:
    """Returns the options, those of methods that are not used left out."""
    given = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
    return [
        Setting(option(name), _value(value), _is_given(name, given))
        for name, value in options.items()
        if not isinstance(value, dict)
    ]


def _is_given(name: str, given: set[str]) -> bool:
    outer, dot, inner = name.rpartition(".")
    return not given.isdisjoint((option(name), option(f"{outer}{dot}no_{inner}")))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "not given" if value is None else str(value)


def _facts(records: Sequence[Record], finished: Record) -> dict[str, str]:
    data = dict.fromkeys(
        f"{of['name']} ({of['source']}), {of['num_train']} training and {of['num_test']} test "
        f"examples of shape {' x '.join(map(str, of['image_shape']))}, {of['num_classes']} "
        f"classes, SHA-256 {of['sha256']}"
        for of in (record["data"] for record in records)
    )
    versions = records[0]["versions"]
    return {
        "Data": "; ".join(data),
        "Device": ", ".join(dict.fromkeys(record["device"] for record in records)),
        "Versions": ", ".join(f"{name} {text}" for name, text in versions.items()),
        "Finished": finished["date"],
        "Duration": f"{finished['seconds']:.1f} s",
    }


def _read(path: Path) -> Record | None:
    """Reads the record of another run; None if there is none, or none that can be read."""
    try:
        return _with_nan(_record.read(path))
    except CheckpointError:
        return None


def _with_nan(value: Any) -> Any:
    """Makes NaN again of the numbers in lists that were not finite."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [float("nan") if item is None else _with_nan(item) for item in value]
    return value


def _is_alike(other: Record, record: Record) -> bool:
    """Tells whether another record is whole, of this version, and of the same network."""
    return "finished" in other and _network(other) == _network(_record.plain(record))


def _network(record: Record) -> tuple[Any, ...]:
    names = [name for name in TrainSettings.__dataclass_fields__ if name not in INCIDENTAL]
    options = {
        name: value
        for name, value in record["settings"].items()
        if (name in names or "." in name) and not isinstance(value, dict)
    }
    training = record["training"]["num_epochs"], record["data"]["sha256"]
    return options, training, record["versions"]["regjax"]
