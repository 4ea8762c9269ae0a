"""One case in a process of its own: `python -m benchmarks.reach._case CASE`, CASE as JSON.

A compiler keeps memory and settings of what it did before, and one that takes too long can only be
killed. The last line of the output is the record: it comes once when the program is compiled or
planned, and once more with what takes longer to find.
"""

import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from benchmarks import _timing
from benchmarks.reach import _account, _chips, _measure, _models, _plan, _programs
from regjax import curvature


class Case(NamedTuple):
    """A program of a model on so many chips.

    Attributes:
      model: one of `_models.SIZES`.
      chip: one of `_chips.CHIPS`; None: whatever is here, for which no rates are known.
      num_chips: how many.
      program: one of `_programs.PROGRAMS`.
      precision: of the model's matrix products.
      runs: whether it is run on the devices of this machine as well.
      planned: whether XLA for TPUs is stopped before it writes instructions.
    """

    model: str
    chip: str | None
    num_chips: int
    program: str
    precision: str = "default"
    runs: bool = False
    planned: bool = False

    @property
    def name(self) -> str:
        """As in the records."""
        suffix = "" if self.precision == "default" else f", {self.precision}"
        place = f"{self.chip or 'this machine'} x {self.num_chips}"
        return f"{self.model} / {place} / {self.program}{suffix}"

    @property
    def facts(self) -> dict[str, Any]:
        """What every record of it says."""
        facts = {**self._asdict(), "case": self.name, "chips": self.num_chips}
        del facts["num_chips"], facts["runs"], facts["planned"]
        return facts


def run(case: Case) -> Iterator[dict[str, Any]]:
    """The record of a case, which JSON can write, as far as it is known."""
    chip = None if case.chip is None else _chips.CHIPS[case.chip]
    size = _models.SIZES[case.model]
    mesh, compiler = _place(case, chip, size.most_shards)
    problem = _models.problem_on(mesh, size)
    record = {
        **case.facts, "parameters": problem.num_params, "batch": list(problem.x.shape),
        "shards": mesh.shape[_chips.AXIS], "compiler": compiler,
    }  # fmt: skip
    with jax.default_matmul_precision(case.precision):
        program = _programs.program_of(case.program, problem, mesh)
        start = time.perf_counter()
        jitted = jax.jit(program.function, donate_argnums=program.donated)
        lowered = jitted.lower(*program.arguments)
        traced = time.perf_counter()
        record["seconds_to_trace"] = round(traced - start, 1)
        try:
            compiled: Any = None
            if case.planned:
                text, num_bytes = _plan.plan(lowered)
            else:
                compiled = lowered.compile()
                text, num_bytes = compiled.as_text(), _timing.bytes_of(compiled)
        except jax.errors.JaxRuntimeError as error:
            yield record | failed(str(error), time.perf_counter() - traced)
            return
        record["seconds_to_compile"] = round(time.perf_counter() - traced, 1)
        stage = {"compiled": not case.planned, "planned": case.planned}
        record |= stage | account_of(text, num_bytes, chip, case)
        yield record
        if program.solver is not None and not (case.runs or case.planned):
            yield record | {"memory_estimate": _estimate(program, problem)}
        if case.runs and record["fits"]:
            yield record | {"measured": _measure.measured(program, compiled)}


def _place(case: Case, chip: _chips.Chip | None, most_shards: int | None) -> tuple[Mesh, str]:
    """The devices, and what compiles for them."""
    if case.runs or chip is None:
        return _chips.mesh_here(most_shards), f"jax {jax.__version__}"
    return _chips.mesh_of(chip, case.num_chips, most_shards), _chips.compiler(chip)


def _estimate(program: _programs.Program, problem: _models.Problem) -> dict[str, int]:
    """What the library says before it runs; the start of a solver is traced, not allocated."""
    found: list[curvature.MemoryResult] = []

    def look(start: Any) -> None:
        found.append(curvature.memory_estimate(program.solver(start)))

    jax.eval_shape(look, problem.params)
    return found[0]._asdict()


def failed(message: str, seconds: float) -> dict[str, Any]:
    """What is recorded of a program that a compiler refuses."""
    return {
        "compiled": False,
        "reason": message.splitlines()[0][:300],
        "seconds_to_compile": round(seconds, 1),
    }


def account_of(
    text: str, num_bytes: dict[str, int], chip: _chips.Chip | None, case: Case
) -> dict[str, Any]:
    """Memory, work and messages of a chip, and the seconds that the published rates allow."""
    found = _account.account(text, case.num_chips)
    facts = {
        "bytes": num_bytes,
        "fits": chip is None or bool(num_bytes["total"] <= chip.memory),
        "operations": found.operations,
        "bytes_moved": found.num_bytes,
        "bytes_sent": found.sent,
        "collectives": [each._asdict() for each in found.collectives],
        "largest_collective": found.largest,
    }
    if chip is None:
        return facts
    seconds = {
        "operations": found.operations / chip.rate(case.precision),
        "memory": found.num_bytes / chip.bandwidth,
        "network": found.sent / chip.sent_per_second(case.num_chips),
    }
    return facts | {"roofline_seconds": {**seconds, "largest": max(seconds.values())}}


def main(arguments: list[str]) -> None:
    """Prints the record."""
    case = Case(*json.loads(arguments[0]))
    for record in run(case):
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record |= {"versions": _timing.versions(), "date": date}
        print(json.dumps(record), flush=True)
    if case.planned:
        os._exit(0)  # with the compiler still at work


if __name__ == "__main__":
    main(sys.argv[1:])
