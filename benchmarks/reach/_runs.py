"""The cases of a preset, each compiled in a process of its own, with what came out of it."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.reach import _chips, _measure, _models
from benchmarks.reach._case import Case
from benchmarks.reach._programs import PROGRAMS

_ROOT = pathlib.Path(__file__).parents[2]
_MODELS = ("GPT 124M", "GPT 1.3B", "decoder 8B", "ResNet 11M")


def cases(preset: str, *, measure: bool = False, planned: bool = False) -> Iterator[Case]:
    """The cases in the order in which they are compiled, the gradient of each model first.

    Args:
      preset: "smoke": a tiny model. "cpu": the smallest of the others. "full": all.
      measure: the cases that run on the devices of this machine, instead of those for others.
      planned: whether XLA for TPUs is stopped before it writes instructions.
    """
    models = ("tiny",) if preset == "smoke" else _MODELS[:1] if preset == "cpu" else _MODELS
    if measure:
        # Convolutions of a ResNet are timed by `speed`, and 8B fit on no single chip.
        small = [model for model in models if _models.SIZES[model].kind == "gpt"][:2]
        chip, num_chips = _measure.devices_here()
        for model, program in itertools.product(small, PROGRAMS[:4]):
            yield Case(model, chip, num_chips, program, runs=True)
    elif preset == "smoke":
        for program in PROGRAMS[:2]:
            yield Case("tiny", "v5e", 4, program, planned=planned)
    else:
        places = [(name, n) for name, chip in _chips.CHIPS.items() for n in chip.topologies]
        for program, (chip, num_chips), model in itertools.product(PROGRAMS, places, models):
            is_tpu = _chips.CHIPS[chip].platform == "tpu"
            yield Case(model, chip, num_chips, program, planned=planned and is_tpu)


def record_of(case: Case, limit: float) -> dict[str, Any]:
    """The record of a case; one that takes longer than `limit` seconds is killed, and says so.

    What is known by then stays known.
    """
    why_not = _why_not(case)
    if why_not is not None:
        return _refused(case, why_not, 0)
    command = [sys.executable, "-m", "benchmarks.reach._case", json.dumps(case)]
    start = time.perf_counter()
    # What is compiled for machines that are not here needs no device of this one.
    environment = os.environ if case.runs else {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=_ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            # Asked politely, libtpu prints the stacks of all its threads first.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            errors = f"not compiled in {limit:.0f} s"
    if lines := output.splitlines():
        record: dict[str, Any] = json.loads(lines[-1])
        return record
    said = [line for line in errors.splitlines() if line.strip() and line[:10] != "-" * 10]
    last = [line for line in said if "internal frames" not in line][-1:] or ["no output"]
    return _refused(case, last[0][:300], time.perf_counter() - start)


def _why_not(case: Case) -> str | None:
    if case.runs or case.chip is None:
        return None
    chip = _chips.CHIPS[case.chip]
    package = _chips.missing(chip)
    if package is not None:
        return f"{package} is not installed"
    if chip.platform == "cuda" and _models.SIZES[case.model].kind == "resnet":
        return None if _chips.has_cudnn() else "nvidia-cudnn-cu13 is not installed"
    return None


def _refused(case: Case, reason: str, seconds: float) -> dict[str, Any]:
    return {
        **case.facts, "compiled": False, "planned": False, "reason": reason,
        "seconds_to_compile": round(seconds, 1),
    }  # fmt: skip
