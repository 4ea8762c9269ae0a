"""What a compiled program does on one chip: operations, bytes and collectives, read off its text.

The compilers' own accounts count the body of a loop once, however often it runs, and that for CUDA
is missing. Here each instruction counts as often as it runs: bodies of loops by the bound in their
condition. Of a conditional the branch with the most traffic counts, but where branches hold loops
or conditionals the one with the least: those of our own are for what is rare, a second pass over a
basis or a fresh direction.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.reach import _multiplications
from benchmarks.reach._text import Computation, Instruction, parse

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip
# They move nothing by themselves, or what they move is counted where it is done.
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier", "iota",
    "copy-done", "async-start", "async-done", "async-update", "slice-done",
))  # fmt: skip


class Collective(NamedTuple):
    """One kind of message: how many a chip takes part in, their bytes, and how many chips each."""

    kind: str
    num_messages: int
    num_bytes: int
    num_chips: int
    in_loops: int


class Account(NamedTuple):
    """What a program does on one chip.

    Attributes:
      operations: multiplications and additions of matrix products and convolutions.
      num_bytes: read from and written to the chip's memory, each operand once an instruction.
      collectives: messages by kind and number of chips; `num_bytes` are those of the largest of
        what goes in and comes out, over all turns of the loops.
      largest: bytes of the largest array that a collective gives: whole parameters show here.
    """

    operations: float
    num_bytes: float
    collectives: tuple[Collective, ...]
    largest: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, by rings: all-reduce twice, all others once, (n - 1) / n."""
        twice = {"all-reduce": 2}
        return sum(
            twice.get(each.kind, 1) * each.num_bytes * (each.num_chips - 1) / each.num_chips
            for each in self.collectives
        )


def account(text: str, num_chips: int) -> Account:
    """Reads the account of a compiled program off its text.

    Args:
      text: `compiled.as_text()`.
      num_chips: for collectives that do not say how many take part.

    Returns:
      The `Account` of one chip.
    """
    return _Reader(*parse(text), num_chips).read()


class _Reader:
    def __init__(self, computations: dict[str, Computation], entry: str, num_chips: int):
        self.computations, self.entry, self.num_chips = computations, entry, num_chips
        self.messages: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0] * 3)
        self.largest, self.channels = 0, set[str]()

    def read(self) -> Account:
        operations, num_bytes = self._cost(self.entry, 1)
        found = [
            Collective(kind, count, total, chips, in_loops)
            for (kind, chips), (count, total, in_loops) in sorted(self.messages.items())
        ]
        return Account(operations, num_bytes, tuple(found), self.largest)

    def _cost(self, name: str, times: int) -> tuple[float, float]:
        """Operations and bytes of all turns of a computation that the chip runs line by line."""
        operations = num_bytes = 0.0
        computation = self.computations[name]
        for line in computation.values():
            operations += times * self._operations(line, computation)
            if line.opcode == "while":
                (condition,), (body,) = line.called("condition"), line.called("body")
                more, bytes_ = self._cost(body, times * self._turns(condition, body))
            elif line.opcode == "conditional":
                more, bytes_ = self._branch(line, times)
            elif line.opcode in ("call", "async-start"):
                costs = [
                    self._cost(each, times)
                    for kind in ("to_apply", "calls", "called_computations")
                    for each in line.called(kind)
                ]
                more, bytes_ = (sum(column) for column in zip((0.0, 0.0), *costs, strict=True))
            else:
                more, bytes_ = 0.0, times * self._traffic(line, computation)
            operations, num_bytes = operations + more, num_bytes + bytes_
            self._note(line, computation, times)
        return operations, num_bytes

    def _branch(self, line: Instruction, times: int) -> tuple[float, float]:
        names = [
            name
            for kind in ("branch_computations", "true_computation", "false_computation")
            for name in line.called(kind)
        ]
        kept, found = self.messages, []
        for name in names:
            self.messages = collections.defaultdict(lambda: [0] * 3)
            found.append((self._cost(name, times), self.messages))
        self.messages = kept
        is_rare = any(
            inner.opcode in ("while", "conditional")
            for name in names
            for inner in self._within(name)
        )
        choose = min if is_rare else max
        cost, messages = choose(found, key=lambda branch: branch[0][1])
        for key, values in messages.items():
            kept[key] = [a + b for a, b in zip(kept[key], values, strict=True)]
        return cost

    def _turns(self, condition: str, body: str) -> int:
        """Of a loop that counts from 0: to the largest integer in its condition; 1 without one."""
        bounds = [
            int(line.arguments)
            for line in self._within(condition)
            if line.opcode == "constant" and line.arguments.lstrip("-").isdigit()
        ]
        return -(-max([*bounds, 1]) // self._step(condition, body))

    def _step(self, condition: str, body: str) -> int:
        """By how much it counts on: 2 where the compiler has put two turns into one."""
        lines = self.computations[body]
        (root,) = (line for line in lines.values() if line.is_root)
        for read in self.computations[condition].values():
            place = re.search(r"index=(\d+)", read.attributes)
            if read.opcode == "get-tuple-element" and place and root.opcode == "tuple":
                added = list(self._constants(lines[root.operands[int(place[1])]], lines))
                if len(added) == 1 and added[0] > 0:
                    return added[0]
        return 1

    def _constants(self, line: Instruction, lines: Computation) -> Iterator[int]:
        """The integers that a sum, or a fusion that is one, adds."""
        if line.opcode == "fusion":
            (name,) = line.called("calls")
            fused = self.computations[name]
            if any(each.is_root and each.opcode == "add" for each in fused.values()):
                lines = {**lines, **fused}
                line = next(each for each in fused.values() if each.is_root)
        for name in line.operands if line.opcode == "add" else ():
            given = lines.get(name)
            if given is not None and given.opcode == "constant" and given.arguments.isdigit():
                yield int(given.arguments)

    def _within(self, name: str) -> Iterator[Instruction]:
        for line in self.computations[name].values():
            yield line
            for each in line.called("calls"):
                yield from self._within(each)

    def _operations(self, line: Instruction, computation: Computation) -> float:
        if line.opcode == "fusion":
            return sum(self._fused(each) for each in line.called("calls"))
        shapes = [computation[name].arrays for name in line.operands if name in computation]
        if line.opcode == "dot":
            axes = _numbers(line.attributes, "lhs_contracting_dims")
            summed = math.prod(shapes[0][0].shape[axis] for axis in axes)
            return 2.0 * math.prod(line.arrays[0].shape) * summed
        if line.opcode == "convolution":
            return _multiplications.of_convolution(
                line, shapes[0][0].shape, shapes[1][0].shape, line.arrays[0].shape
            )
        if line.opcode == "custom-call" and "__cudnn$conv" in line.attributes:
            return _multiplications.of_cudnn(line, shapes[0][0].shape, shapes[1][0].shape)
        if line.opcode == "custom-call" and "matmul" in line.attributes:
            return _multiplications.of_library(line, shapes[0][0].shape)
        return 0.0

    @functools.cache  # noqa: B019 (lives as long as the reader)
    def _fused(self, name: str) -> float:
        computation = self.computations[name]
        return sum(self._operations(line, computation) for line in computation.values())

    def _traffic(self, line: Instruction, computation: Computation) -> float:
        if line.opcode in _FREE or line.opcode.endswith("-done"):
            return 0.0
        operands = [computation[name] for name in line.operands if name in computation]
        read = [sum(array.traffic for array in each.arrays) for each in operands]
        written = sum(array.traffic for array in line.arrays)
        if line.opcode == "fusion":
            for fused in line.called("calls"):
                read, written = self._of_fusion(self.computations[fused], read, written)
                passed = sum(
                    array.traffic
                    for each in self.computations[fused].values()
                    if each.opcode in COLLECTIVES
                    for array in each.arrays
                )
                # One of the steps of a message that goes on meanwhile: its buffer is handed on.
                read = [size for size in read if size != passed]
                written = max(0, written - passed)
        elif line.opcode in ("dynamic-slice", "slice", "gather"):
            read = [min(read[0], sum(array.num_bytes for array in line.arrays)), *read[1:]]
        elif line.opcode == "dynamic-update-slice":
            read, written = [read[1]], read[1]
        elif line.opcode in ("copy-start", "slice-start"):
            # From one memory to the other: what lies in the large one moves once, and of an array
            # that is taken in parts the part.
            first = [array for array in line.arrays if array.shape][:2]
            least = min(array.num_bytes for array in first)
            return float(sum(min(least, array.traffic) for array in first))
        elif line.opcode.endswith("-start"):
            written = read[0] if read else written
        return float(sum(read) + written)

    def _of_fusion(
        self, fused: Computation, read: list[int], written: int
    ) -> tuple[list[int], int]:
        """What is read in slices counts as these, and what is updated in place as the update."""
        places = {
            line.name: int(line.arguments) for line in fused.values() if line.opcode == "parameter"
        }
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for line in fused.values():
            for name in line.operands:
                users[name].append(line)
        for name, place in places.items():
            if place >= len(read) or read[place] == 0:
                continue
            found = list(_through_bitcasts(name, users))
            if found and all(_reads_a_part(name_, line) for name_, line in found):
                read[place] = min(read[place], sum(self._part(line, fused) for _, line in found))
        for line in fused.values():
            if line.opcode == "dynamic-update-slice" and not line.arrays[0].on_chip:
                update = sum(array.num_bytes for array in fused[line.operands[1]].arrays)
                written = max(update, written - line.arrays[0].num_bytes + update)
        return read, written

    def _part(self, line: Instruction, fused: Computation) -> int:
        if line.opcode == "dynamic-update-slice":
            return 0  # in place
        return sum(array.num_bytes for array in line.arrays)

    def _note(self, line: Instruction, computation: Computation, times: int) -> None:
        lines = [(line, computation)]
        for name in line.called("calls") if line.opcode == "fusion" else []:
            fused = self.computations[name]
            lines += [(each, fused) for each in fused.values()]
        for each, where in lines:
            kind = each.opcode.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            if kind not in COLLECTIVES or (channel and channel[1] in self.channels):
                continue  # written down once for each of its steps
            if channel:
                self.channels.add(channel[1])
            operands = [where[name] for name in each.operands if name in where]
            inputs = sum(array.num_bytes for operand in operands for array in operand.arrays)
            outputs = sum(array.num_bytes for array in each.arrays)
            if each.opcode.endswith("-start"):
                outputs = max(outputs - inputs, inputs) if kind != "all-reduce" else inputs
            entry = self.messages[kind, self._num_chips(each)]
            entry[0] += times
            entry[1] += times * max(inputs, outputs)
            entry[2] += times * max(inputs, outputs) if times > 1 else 0
            self.largest = max(self.largest, *(array.num_bytes for array in each.arrays))

    def _num_chips(self, line: Instruction) -> int:
        groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", line.attributes)
        if groups:
            return int(groups[2])
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line.attributes)
        if listed:
            return len(listed[1].split(","))
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line.attributes)
        if mesh:
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            # Of a part of an axis, 'axis_0':(2)4, the second number.
            names = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[name]) for name, part in names)
        return self.num_chips


def _reads_a_part(name: str, line: Instruction) -> bool:
    if line.opcode in ("dynamic-slice", "slice", "gather"):
        return line.operands[0] == name
    return line.opcode == "dynamic-update-slice" and line.operands[0] == name


def _through_bitcasts(
    name: str, users: dict[str, list[Instruction]]
) -> Iterator[tuple[str, Instruction]]:
    for line in users[name]:
        if line.opcode == "bitcast":
            yield from _through_bitcasts(line.name, users)
        else:
            yield name, line


def _numbers(attributes: str, name: str) -> list[int]:
    found = re.search(name + r"=\{([\d,]*)\}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []
