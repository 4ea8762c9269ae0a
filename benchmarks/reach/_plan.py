"""What XLA for TPUs decides about a program before it writes instructions.

Nine tenths of its time go into the instructions, of which nothing is recorded: operations, traffic
and messages are read off the program in its final order, and memory off the places of its buffers.
Both are among the files that XLA writes on the way, after which it is stopped.
"""

import pathlib
import re
import tempfile
import threading
import time
from typing import Any, NamedTuple

_TEXT = "*.after_optimizations_after_buffer_assignment.txt"  # the last that is needed
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$", re.MULTILINE)
_PAUSE = 0.2


class Plan(NamedTuple):
    """A program in its final order, and the bytes that it holds on a chip, by what they are for."""

    text: str
    num_bytes: dict[str, int]


def plan(lowered: Any) -> Plan:
    """Compiles until the plan is made; the compiler works on until this process ends.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses the program.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        options = {"xla_dump_to": name, "xla_dump_hlo_as_text": True}
        refused: list[Exception] = []

        def compile_() -> None:
            try:
                lowered.compile(compiler_options=options)
            except Exception as error:  # handed on below, whatever it is
                refused.append(error)

        worker = threading.Thread(target=compile_, daemon=True)
        worker.start()
        while worker.is_alive() and _finished(folder) is None:
            time.sleep(_PAUSE)
        text = _finished(folder)
        if text is None:
            worker.join()
            raise refused[0] if refused else FileNotFoundError(_TEXT)
        return Plan(text, bytes_of(next(folder.glob(_BUFFERS)).read_text()))


def _finished(folder: pathlib.Path) -> str | None:
    """The text of the program, when all of it is written."""
    for path in folder.glob(_TEXT):
        text = path.read_text()
        if text.endswith("\n}\n\n"):  # of the entry, which comes last
            return text
    return None


def bytes_of(buffers: str) -> dict[str, int]:
    """Bytes in the large memory of a chip, as XLA's list of buffers has them."""
    found = {"arguments": 0, "temporaries": 0, "results": 0}
    for size, rest in _ALLOCATION.findall(buffers):
        if "color" in rest:  # another memory: the chip's own, or the host's
            continue
        is_result = "maybe-live-out" in rest or "output shape" in rest
        kind = "arguments" if "parameter" in rest else "results" if is_result else "temporaries"
        found[kind] += int(size)
    return {**found, "total": sum(found.values())}
