"""One case in a process of its own: `python -m benchmarks.reach._case MODEL CHIP CHIPS PROGRAM`.

A compiler keeps memory and settings of what it did before, and one that takes too long can only be
killed. The last line of the output is the record.
"""

import datetime
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled is for machines that are not here

import jax

from benchmarks import _timing
from benchmarks.reach import _account, _chips, _models, _programs
from regjax import curvature


def run(model: str, chip_name: str, num_chips: int, program_name: str, precision: str) -> Any:
    """The record of a case: a dictionary that JSON can write."""
    chip, size = _chips.CHIPS[chip_name], _models.SIZES[model]
    mesh = _chips.mesh_of(chip, num_chips)
    problem = _models.problem_on(mesh, size)
    record: dict[str, Any] = {
        "case": name_of(model, chip_name, num_chips, program_name, precision),
        "model": model, "chip": chip_name, "chips": num_chips, "program": program_name,
        "precision": precision, "parameters": problem.num_params,
        "batch": list(problem.x.shape), "compiler": _chips.compiler(chip),
    }  # fmt: skip
    with jax.default_matmul_precision(precision):
        program = _programs.program_of(program_name, problem, mesh)
        start = time.perf_counter()
        lowered = jax.jit(program.function, donate_argnums=program.donated).lower(
            *program.arguments
        )
        traced = time.perf_counter()
        record["seconds_to_trace"] = round(traced - start, 1)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return record | failed(str(error), time.perf_counter() - traced)
        record["seconds_to_compile"] = round(time.perf_counter() - traced, 1)
        record |= {"compiled": True, **account_of(compiled, chip, num_chips, precision)}
        if program.solver is not None:
            record["memory_estimate"] = _estimate(program, problem)
    return record


def _estimate(program: _programs.Program, problem: _models.Problem) -> dict[str, int]:
    """What the library says before it runs; the start of a solver is traced, not allocated."""
    found: list[curvature.MemoryResult] = []

    def look(start: Any) -> None:
        found.append(curvature.memory_estimate(program.solver(start)))

    jax.eval_shape(look, problem.params)
    return found[0]._asdict()


def name_of(model: str, chip: str, num_chips: int, program: str, precision: str) -> str:
    """The name of a case."""
    suffix = "" if precision == "default" else f", {precision}"
    return f"{model} / {chip} x {num_chips} / {program}{suffix}"


def failed(message: str, seconds: float) -> dict[str, Any]:
    """What is recorded of a program that a compiler refuses."""
    return {
        "compiled": False,
        "reason": message.splitlines()[0][:300],
        "seconds_to_compile": round(seconds, 1),
    }


def account_of(compiled: Any, chip: _chips.Chip, num_chips: int, precision: str) -> dict[str, Any]:
    """Memory, work and messages of a chip, and the seconds that the published rates allow."""
    memory = compiled.memory_analysis()
    found = _account.account(compiled.as_text(), num_chips)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    rate = chip.highest if precision == "highest" else chip.matmul
    seconds = {
        "operations": found.operations / rate,
        "memory": found.num_bytes / chip.bandwidth,
        "network": found.sent / chip.sent_per_second(num_chips),
    }
    return {
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "results": results,
            "total": total,
        },
        "fits": bool(total <= chip.memory),
        "operations": found.operations,
        "bytes_moved": found.num_bytes,
        "bytes_sent": found.sent,
        "collectives": [each._asdict() for each in found.collectives],
        "largest_collective": found.largest,
        "roofline_seconds": {**seconds, "largest": max(seconds.values())},
    }


def main(arguments: list[str]) -> None:
    """Prints the record."""
    model, chip, num_chips, program, precision = arguments
    record = run(model, chip, int(num_chips), program, precision)
    record["versions"] = _timing.versions()
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
