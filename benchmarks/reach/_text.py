"""The text of a compiled program as data: computations of instructions and the arrays they give."""

import dataclasses
import math
import re
from typing import NamedTuple

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_ASYNCHRONOUS = ("fusion-start", "custom-call-start", "dynamic-slice-start", "dot-start")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    """An array in a program: dtype, shape, and whether it lies on the chip itself (TPU's VMEM)."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 32) // 8

    @property
    def traffic(self) -> int:
        """Bytes of the chip's memory that reading or writing it moves."""
        return 0 if self.on_chip else self.num_bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, the arrays that it gives, its operands by name, and what else it says."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    is_root: bool

    def called(self, attribute: str) -> list[str]:
        """The computations under an attribute such as `calls`."""
        found = re.search(attribute + r"=(\{[^}]*\}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(found[1]) if found else []


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the first."""
    computations: dict[str, Computation] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
            continue
        found = _LINE.match(line)
        if found:
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closed(rest, 0) if rest.startswith("(") else rest.index(" ")
    opened = rest.index("(", end)
    closed = _closed(rest, opened)
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), "S(1)" in layout)
        for dtype, shape, layout in _ARRAY.findall(rest[:end])
    )
    arguments, opcode = rest[opened + 1 : closed - 1], rest[end:opened].strip()
    operands = tuple(_NAME.findall(arguments))
    if opcode in _ASYNCHRONOUS:  # what goes in comes first in the type of what is begun
        opcode, arrays = opcode.removesuffix("-start"), arrays[len(operands) :]
    return Instruction(name, arrays, opcode, operands, rest[closed:], arguments, is_root)


def _closed(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)
