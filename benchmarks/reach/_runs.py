"""The cases of a preset, each compiled in a process of its own, with what came out of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.reach import _chips, _models
from benchmarks.reach._case import name_of
from benchmarks.reach._programs import GRADIENT, PROGRAMS

_ROOT = pathlib.Path(__file__).parents[2]
_LARGE = ("GPT 124M", "GPT 1.3B", "decoder 8B", "ResNet 11M")


class Case(NamedTuple):
    """A program of a model on so many chips."""

    model: str
    chip: str
    num_chips: int
    program: str
    precision: str = "default"

    @property
    def name(self) -> str:
        """As in the records."""
        return name_of(*self)


def cases(preset: str) -> Iterator[Case]:
    """The cases in the order in which they are compiled, the gradient of each model first.

    Args:
      preset: "smoke": a tiny model on four chips. "cpu": the models that compile in about a minute
        on two cores. "full": all.
    """
    if preset == "smoke":
        for program in PROGRAMS[:2]:
            yield Case("tiny", "v5e", 4, program)
        return
    models = _LARGE[:1] if preset == "cpu" else _LARGE
    for program in PROGRAMS:
        for chip_name, chip in _chips.CHIPS.items():
            for num_chips in chip.topologies:
                for model in models:
                    yield Case(model, chip_name, num_chips, program)


def compiled(case: Case, limit: float) -> dict[str, Any]:
    """The record of a case; one that takes longer than `limit` seconds is killed, and says so."""
    why_not = _why_not(case)
    if why_not is not None:
        return _refused(case, why_not, 0)
    command = [sys.executable, "-m", "benchmarks.reach._case", *map(str, case)]
    start = time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=_ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            # Asked politely, libtpu prints the stacks of all its threads first.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return _refused(case, f"not compiled in {limit:.0f} s", limit)
    lines = output.splitlines()
    if process.returncode or not lines:
        last = [line for line in errors.splitlines() if line.strip()][-1:] or ["no output"]
        return _refused(case, last[0][:300], time.perf_counter() - start)
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def _why_not(case: Case) -> str | None:
    chip = _chips.CHIPS[case.chip]
    package = _chips.missing(chip)
    if package is not None:
        return f"{package} is not installed"
    if chip.platform == "cuda" and _models.SIZES[case.model].kind == "resnet":
        return "convolutions need cuDNN, which is not here without a GPU"
    return None


def _refused(case: Case, reason: str, seconds: float) -> dict[str, Any]:
    return {
        "case": case.name, "model": case.model, "chip": case.chip, "chips": case.num_chips,
        "program": case.program, "precision": case.precision, "compiled": False,
        "reason": reason, "seconds_to_compile": round(seconds, 1),
    }  # fmt: skip


def with_ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with what each program takes over the gradient of its model on its chips."""
    place = lambda record: (record["model"], record["chip"], record["chips"], record["precision"])
    gradients = {
        place(record): record
        for record in records
        if record["program"] == GRADIENT and record["compiled"]
    }
    found = []
    for record in records:
        base = gradients.get(place(record))
        if base is not None and record["compiled"]:
            ratios = {
                name: round(record[name] / base[name], 3)
                for name in ("operations", "bytes_moved", "bytes_sent")
                if base[name]
            }
            record = {**record, "over_gradient": ratios}
        found.append(record)
    return found
