"""The command line: `python -m benchmarks speed|claims|reach|growth --preset ...`."""

import dataclasses
import functools
import importlib
import json
import pathlib
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import tqdm
import tyro

from benchmarks import _claims, _papers, _timing, growth, reach, speed

_Found = TypeVar("_Found")

_RESULTS = pathlib.Path(__file__).parent / "results"
# The bars of the project were measured with two; a wider machine must not change who wins.
_NUM_CORES = 2


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time the library against itself and other tools; answers are checked first."""

    preset: Literal["smoke", "cpu", "gpu"] = "smoke"
    """smoke: tiny, minutes, writes nothing by itself. cpu: two cores. gpu: needs an accelerator."""
    only: str | None = None
    """Run only the cases with this in their name, such as `curvature/product`."""
    out: pathlib.Path | None = None
    """Folder of speed_<preset>.jsonl. Default: benchmarks/results, for smoke nowhere."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """Run the papers' claims at a small size and say what came out; goes on where it stopped."""

    preset: Literal["smoke", "cpu", "gpu"] = "smoke"
    """smoke: minutes, two seeds, writes nothing by itself. cpu: two cores, hours. gpu: as cpu, but
    the paper's own size where it needs an accelerator (batch_entropy: 500 layers)."""
    only: str | None = None
    """Run only the claims with this in their name."""
    redraw: bool = False
    """Judge and draw again what is recorded, without a run: minutes for all, seconds with --only.
    The preset is then cpu unless it is gpu."""
    summary: bool = False
    """Write the tables of verdicts in benchmarks/README.md and docs/papers again; run nothing."""
    out: pathlib.Path | None = None
    """Folder of claims.json, the figures and the runs. Default: benchmarks/results, or its gpu."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """Compile the library's programs for chips that are not here; nothing is run."""

    preset: Literal["smoke", "cpu", "full"] = "smoke"
    """smoke: a tiny model, minutes, writes nothing by itself. cpu: the smallest models. full: all,
    a day and more on two cores; goes on where it stopped."""
    only: str | None = None
    """Only the cases with this in their name, such as `GPT 124M / v5e x 4 / gradient`."""
    limit: float = 30.0
    """Minutes after which the compiler is stopped, which is then the record of the case."""
    again: bool = False
    """Compile what is in the records already as well."""
    plan: bool = False
    """Stop the compiler for TPUs before it writes instructions: seconds instead of minutes."""
    measure: bool = False
    """Run the programs of the devices of this machine instead, beside what was compiled."""
    redraw: bool = False
    """Write table and figure of what is recorded again; compile nothing."""
    out: pathlib.Path | None = None
    """Folder of reach.jsonl, the table and the figure. Default: benchmarks/results, or nowhere."""


@dataclasses.dataclass(frozen=True)
class Growth:
    """Measure how time and memory grow with the size of a problem; goes on where it stopped."""

    preset: Literal["smoke", "cpu"] = "smoke"
    """smoke: tiny, seconds, writes nothing by itself. cpu: two cores, ten minutes."""
    only: str | None = None
    """Only the points with this in their name, such as `depth` or `parameters / 100000`."""
    redraw: bool = False
    """Print the table and draw the figure of what is recorded again; measure nothing."""
    out: pathlib.Path | None = None
    """Folder of growth.jsonl and the figure. Default: benchmarks/results, for smoke nowhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 if an answer was wrong, 2 if nothing ran."""
    command: Any = tyro.extras.subcommand_cli_from_dict(
        {"speed": Speed, "claims": Claims, "reach": Reach, "growth": Growth}, args=arguments
    )
    if isinstance(command, Reach):
        return run_reach(command)
    if isinstance(command, Growth):
        return run_growth(command)
    return run_speed(command) if isinstance(command, Speed) else run_claims(command)


def run_reach(command: Reach) -> int:
    """Compiles the cases one after the other; returns 1 if nothing is known of any of them."""
    if command.redraw:
        reach.conclude(_RESULTS if command.out is None else command.out)
        return 0
    cases = reach.cases(command.preset, measure=command.measure, planned=command.plan)
    chosen = _chosen({case.name: case for case in cases}, command.only)
    if not chosen:
        return 2
    out = command.out
    if out is None and command.preset != "smoke":
        out = _RESULTS
    path = None if out is None else out / reach.file_name(measure=command.measure)
    known = [] if path is None else reach.read(path)
    # What was only planned is compiled where that is asked for.
    done = (each for each in known if command.plan or not each.get("planned"))
    names = set() if command.again else {record["case"] for record in done}
    records = []
    for case in (case for name, case in chosen.items() if name not in names):
        records.append(reach.record_of(case, command.limit * 60))
        print(reach.summary(records[-1]), flush=True)
        if path is not None:
            record(path, json.dumps(records[-1]))
    if out is not None:
        reach.conclude(out)
    return 0 if not records or any(reach.is_known(each) for each in records) else 1


def run_growth(command: Growth) -> int:
    """Measures the points that are not recorded; returns 1 if an answer was wrong."""
    small = command.preset == "smoke"
    out = _RESULTS if command.out is None and (command.redraw or not small) else command.out
    path = None if out is None else out / "growth.jsonl"
    known = [] if path is None else reach.read(path)
    wanted = 0
    if not command.redraw:
        found = {point.name: point for point in growth.points(command.preset)}
        chosen = _chosen(found, command.only)
        if not chosen:
            return 2
        names = {each["case"] for each in known}
        left = [point for name, point in chosen.items() if name not in names]
        wanted = len(known) + len(left)
        for measured in growth.records_of(left, here=small):
            print(growth.summary(measured), flush=True)
            known.append(measured)
            if path is not None:
                record(path, json.dumps(measured))
    steepness = growth.slopes(known)
    if steepness:  # a single point has none
        print(growth.table(steepness))
    if out is not None and steepness:
        growth.figure(known, out / "growth.png")
    return 0 if len(known) >= wanted else 1


def run_claims(command: Claims) -> int:
    """Runs the claims and writes their verdicts, by default into the tables for readers too."""
    if command.summary:
        _papers.write()
        return 0
    if command.preset == "gpu" and jax.default_backend() == "cpu":
        return _fail("`--preset` must be smoke or cpu without an accelerator, got gpu.")
    if command.redraw and command.preset == "smoke":
        command = dataclasses.replace(command, preset="cpu")
    found = _claims.find_claims()
    chosen = _chosen(found, command.only)
    if not chosen:
        return 2
    if command.preset == "smoke" and command.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_claims(dataclasses.replace(command, out=pathlib.Path(folder)))
    # An accelerator's verdicts do not take the place of those that the README shows.
    default = _RESULTS / "gpu" if command.preset == "gpu" else _RESULTS
    out = default if command.out is None else command.out
    out.mkdir(parents=True, exist_ok=True)
    runs = out / "claims_runs.jsonl"
    for name, claim in chosen.items():
        if command.redraw:
            records, wanted = _claims.kept(claim, command.preset, runs)
            if len(records) < wanted:
                return _fail(
                    f"{runs} has {len(records)} of the {wanted} runs of {name}; without --redraw "
                    "the others are run."
                )
        else:
            with tqdm.tqdm(desc=name) as bar:
                records = _claims.collect(
                    claim, command.preset, runs, functools.partial(_show, bar)
                )
        entry = _claims.conclude(claim, command.preset, records, out)
        for verdict in entry["verdicts"]:
            print(f"{name}: {verdict['verdict']}\n  {verdict['evidence']}", flush=True)
    if out == _RESULTS:
        _papers.write()
    return 0


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def run_speed(command: Speed) -> int:
    """Runs the cases of every `bench_*.py`, one at a time; a refused one does not stop the rest."""
    if command.preset == "cpu":
        _timing.use_cores(_NUM_CORES)
    if command.preset == "gpu" and jax.default_backend() == "cpu":
        return _fail("`--preset` must be smoke or cpu without an accelerator, got gpu.")
    chosen = _chosen(find_cases(command.preset), command.only)
    if not chosen:
        return 2
    out = command.out
    if out is None and command.preset != "smoke":
        out = _RESULTS
    status = 0
    for name, build in chosen.items():
        try:
            result = _measure(name, build(), command.preset)
        except _timing.WrongAnswer as error:
            print(f"REFUSED {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        print(_timing.summary(result), flush=True)
        if out is not None:
            record(out / f"speed_{command.preset}.jsonl", _timing.json_line(result))
    return status


def find_cases(preset: str) -> dict[str, Callable[[], _timing.Case]]:
    """The cases of all `bench_*.py`, named "<file>/<case>"."""
    names = sorted(module.name for module in pkgutil.iter_modules(speed.__path__))
    found = {}
    for name in names:
        if name.startswith("bench_"):
            module = importlib.import_module(f"{speed.__name__}.{name}")
            for case, build in module.cases(preset).items():
                found[f"{name.removeprefix('bench_')}/{case}"] = build
    return found


def record(path: pathlib.Path, line: str) -> None:
    """Puts the line into the file in place of an older one of the same case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    case = json.loads(line)["case"]
    kept = [old for old in lines if json.loads(old)["case"] != case]
    path.write_text("\n".join([*kept, line]) + "\n")


def _measure(name: str, case: _timing.Case, preset: str) -> _timing.Result:
    if preset == "smoke":
        return _timing.measure(name, case, budget=0.0, min_rounds=2)
    return _timing.measure(name, case)


def _chosen(found: Mapping[str, _Found], only: str | None) -> dict[str, _Found]:
    """What has `only` in its name; if that is nothing, it says so."""
    chosen = {name: value for name, value in found.items() if (only or "") in name}
    if not chosen:
        _fail(f"`--only` must be part of one of {sorted(found)}, got {only!r}.")
    return chosen


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
