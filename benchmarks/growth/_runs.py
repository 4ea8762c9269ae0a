"""The points measured, the records in the order in which they come."""

import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import _timing
from benchmarks.growth import _measure
from benchmarks.growth._points import Point

_ROOT = pathlib.Path(__file__).parents[2]


def records_of(points: Iterable[Point], *, here: bool = False) -> Iterator[dict[str, Any]]:
    """The records of points; those of an axis share a process.

    Args:
      points: in the order of their axes.
      here: whether they are measured in this process: quicker, and its seconds mean little.

    Yields:
      A record as soon as it is measured. Points whose answer was wrong have none, and say so.
    """
    if here:
        yield from (_measure.record_of(point, cold=False) for point in points)
        return
    for _, group in itertools.groupby(points, lambda point: point.axis):
        yield from _of_one_process(list(group))


def _of_one_process(points: list[Point]) -> Iterator[dict[str, Any]]:
    devices = max(point.devices for point in points)
    environment = _timing.cold_environment()
    if devices > 1:  # nothing is timed there; with few threads virtual devices may wait forever
        environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "16"}
    command = [sys.executable, "-m", "benchmarks.growth", json.dumps(points)]
    with subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
