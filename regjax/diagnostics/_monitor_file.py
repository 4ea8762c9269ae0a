"""Rows of numbers on disk, one JSON object a line, that outlive the process that writes them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

Row: TypeAlias = dict[str, float]
"""Numbers by name, as any logger takes them; flags are 0 or 1, what is not known is NaN."""


def read_monitor(path: Path | str) -> list[Row]:
    """Reads the rows that a `Monitor` has written.

    A last line without its end, of a process that was killed while it wrote, is left out. Numbers
    that are not finite come back as NaN.

    Example:
      >>> import pathlib, tempfile
      >>> loss_fn, batch = lambda w, x: jnp.mean(x * w**2), (jnp.array([1.0, 3.0]),)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "monitor.jsonl"
      ...     monitor = diagnostics.Monitor(
      ...         loss_fn, batch, every=1, key=jax.random.key(0), measures=("loss",), path=path
      ...     )
      ...     row = monitor(0, jnp.array(2.0))
      ...     rows = diagnostics.read_monitor(path)
      >>> print(rows[0]["loss"], rows[0]["gradient_norm"])
      8.0 8.0

    Args:
      path: the file.

    Returns:
      The rows in the order of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a JSON object of numbers; the message names the line.
    """
    return _parsed(path)[0]


def keep_whole_lines(path: Path) -> list[Row]:
    """Cuts an unfinished last line off a file, and returns the rows that are left."""
    rows, num_bytes = _parsed(path)
    if num_bytes < path.stat().st_size:
        os.truncate(path, num_bytes)
    return rows


def append_row(path: Path, row: Row) -> None:
    """Writes a line and hands it to the operating system, from where a kill does not take it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))
        file.flush()


def replace_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a file anew, or leaves it as it is: never half of each."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text("".join(map(_line, rows)), encoding="utf-8")
    os.replace(beside, path)


def _line(row: Row) -> str:
    # JSON has no word for what is not finite.
    known = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(known) + "\n"


def _parsed(path: Path | str) -> tuple[list[Row], int]:
    """The rows, and the number of bytes of their lines."""
    rows: list[Row] = []
    num_bytes = 0
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        rows.append(_row(line, number, path))
        num_bytes += len(line)
    return rows, num_bytes


def _row(line: bytes, number: int, path: Path | str) -> Row:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    is_row = isinstance(values, Mapping) and all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in values.values()
    )
    if not is_row or "step" not in values or values["step"] is None:
        raise ValueError(
            f"`path` must hold a JSON object of numbers with a step in each line, got something "
            f"else in line {number} of {path}."
        )
    return {name: math.nan if value is None else value for name, value in values.items()}
