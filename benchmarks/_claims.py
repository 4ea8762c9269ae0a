"""Claims: runs that are kept, verdicts that are drawn from all of them, and figures.

A claim module has `CLAIM`, a `Claim`. Every run is one line of claims_runs.jsonl as soon as it is
done, so that an interrupted command goes on where it stopped.
"""

import datetime
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Settings = Mapping[str, Any]
Record = dict[str, Any]


class Verdict(NamedTuple):
    """What the runs say.

    Attributes:
      verdict: "reproduced", "not reproduced" or "not testable at this size", with what.
      evidence: the numbers behind it, in a line.
    """

    verdict: str
    evidence: str


class Claim(NamedTuple):
    """A paper's claim and how it is looked at.

    Attributes:
      name: of the claim, a word.
      paper: authors, year, arXiv number.
      statement: the claim in one line.
      printed: what the paper printed, where known, or why nothing is quoted.
      settings: preset -> the settings of all runs, each with its seed.
      run: settings -> numbers by name.
      judge: records (settings and numbers in one) -> verdicts.
      draw: (records, figure of matplotlib) -> what points and bars are, in a sentence.
    """

    name: str
    paper: str
    statement: str
    printed: str
    settings: Callable[[str], Sequence[Settings]]
    run: Callable[[Settings], Mapping[str, float]]
    judge: Callable[[Sequence[Record]], Sequence[Verdict]]
    draw: Callable[[Sequence[Record], Any], str]


def find_claims() -> dict[str, Claim]:
    """The claims of all modules of `benchmarks.claims`, by name."""
    from benchmarks import claims

    names = sorted(m.name for m in pkgutil.iter_modules(claims.__path__))
    modules = [importlib.import_module(f"{claims.__name__}.{n}") for n in names if n[0] != "_"]
    return {module.CLAIM.name: module.CLAIM for module in modules}


def collect(
    claim: Claim, preset: str, path: pathlib.Path, report: Callable[[int, int], None]
) -> list[Record]:
    """The records of all runs of a preset; what `path` holds already is not run again."""
    known = _read(path)
    records, wanted = [], claim.settings(preset)
    for i, settings in enumerate(wanted):
        report(i, len(wanted))
        key = _key(claim, preset, settings)
        if key not in known:
            known[key] = {**settings, **claim.run(settings)}
            _append(path, {"key": key, "record": known[key]})
        records.append(known[key])
    report(len(wanted), len(wanted))
    return records


def kept(claim: Claim, preset: str, path: pathlib.Path) -> tuple[list[Record], int]:
    """The records of a preset as far as `path` holds them, and how many there should be."""
    known = _read(path)
    keys = [_key(claim, preset, settings) for settings in claim.settings(preset)]
    return [known[key] for key in keys if key in known], len(keys)


def conclude(claim: Claim, preset: str, records: Sequence[Record], folder: pathlib.Path) -> Record:
    """Writes the figure and the claim's entry of claims.json, and returns the entry.

    The date of an entry is that of the runs: it stays where the verdicts do.
    """
    entry: Record = {
        "paper": claim.paper,
        "statement": claim.statement,
        "printed": claim.printed,
        "preset": preset,
        "runs": len(records),
        "verdicts": [verdict._asdict() for verdict in claim.judge(records)],
    }
    draw(claim, records, entry["verdicts"], folder / f"claim_{claim.name}.png")
    path = folder / "claims.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    old = entries.get(claim.name, {})
    same = all(old.get(name) == entry[name] for name in ("preset", "runs", "verdicts"))
    entry["date"] = old["date"] if same else datetime.date.today().isoformat()
    entries[claim.name] = entry
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1, ensure_ascii=False) + "\n")
    return entry


def draw(
    claim: Claim, records: Sequence[Record], verdicts: Sequence[Any], path: pathlib.Path
) -> None:
    """Writes the claim's figure: its panels, with the claim and the verdicts above them."""
    from matplotlib.figure import Figure

    from benchmarks.claims import _frame

    figure = Figure(figsize=(_frame.WIDTH, 2.2), dpi=200, layout="constrained")
    note = claim.draw(records, figure)
    _frame.save(figure, path, claim=claim.statement, verdicts=verdicts, note=note)


def select(records: Sequence[Record], **values: Any) -> list[Record]:
    """The records with these values."""
    return [r for r in records if all(r[name] == value for name, value in values.items())]


def groups(records: Sequence[Record], name: str) -> dict[Any, list[Record]]:
    """The records for each value of `name`, in the order in which the values come."""
    values = dict.fromkeys(record[name] for record in records)
    return {value: select(records, **{name: value}) for value in values}


def word(holds: Any) -> str:
    """The verdict on what could be tested."""
    return "reproduced" if holds else "not reproduced"


def numbers(records: Sequence[Record], name: str) -> np.ndarray:
    """One number of each record."""
    return np.asarray([record[name] for record in records], np.float64)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over the seeds."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _key(claim: Claim, preset: str, settings: Settings) -> str:
    return json.dumps([claim.name, preset, dict(settings)], sort_keys=True)


def _read(path: pathlib.Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run
        known[entry["key"]] = entry["record"]
    return known


def _append(path: pathlib.Path, entry: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
