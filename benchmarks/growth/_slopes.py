"""How steep the curves are beside their arithmetic."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.growth._points import AXES
from benchmarks.growth._tools import REGJAX

Record = Mapping[str, Any]

MEASURES = {"seconds": "warm call", "compile": "compilation", "bytes": "memory"}
# Slopes are of the last points; the first ones show what a call takes whatever its size.
LAST = 3
_ROOM = 0.1
_UNITS = {"seconds": "s", "compile": "s to compile", "bytes": "bytes"}


class Slope(NamedTuple):
    """The exponents with which something grows along an axis.

    Attributes:
      axis: one of `AXES`.
      measure: one of `MEASURES`.
      tools: tool -> exponent of its curve.
      arithmetic: that of what the points ask for.
    """

    axis: str
    measure: str
    tools: Mapping[str, float]
    arithmetic: float

    @property
    def met(self) -> bool:
        """Whether our curve is no steeper than its arithmetic."""
        return self.tools[REGJAX] <= self.arithmetic + _ROOM


def curve(records: Sequence[Record], axis: str, measure: str, tool: str) -> dict[float, float]:
    """Sizes on an axis and what a tool (or "arithmetic") takes there, in order."""
    found = {}
    for record in records:
        if record["axis"] == axis:
            source = record["arithmetic"] if tool == "arithmetic" else record["tools"].get(tool, {})
            value = source.get(measure)
            if value is not None:
                size = record["parameters"] if axis == "parameters" else record["value"]
                found[size] = float(value)
    return dict(sorted(found.items()))


def slopes(records: Sequence[Record]) -> list[Slope]:
    """The slope of every axis and measure of which there are two points."""
    names = list(dict.fromkeys(name for record in records for name in record["tools"]))
    found = []
    for axis in AXES:
        for measure in MEASURES:
            curves = {name: curve(records, axis, measure, name) for name in names}
            own = curves.get(REGJAX, {})
            if len(own) < 2:
                continue
            asked = curve(records, axis, measure, "arithmetic")
            exponents = {name: _exponent(each) for name, each in curves.items() if len(each) > 1}
            asked = {size: asked[size] for size in own}
            found.append(Slope(axis, measure, exponents, _exponent(asked)))
    return found


def _exponent(points: Mapping[float, float]) -> float:
    last = list(points.items())[-LAST:]
    sizes, values = np.log([size for size, _ in last]), np.log([value for _, value in last])
    return float(np.polyfit(sizes, values, 1)[0])


def rounded(number: float) -> str:
    """Two decimals, and no zero with a sign."""
    return f"{round(number, 2) + 0:.2f}"


def table(found: Iterable[Slope]) -> str:
    """Markdown, a row for each slope; `docs/benchmarks/growth.md` has it."""
    found = list(found)
    others = [name for name in dict.fromkeys(n for s in found for n in s.tools) if name != REGJAX]
    lines = [
        f"| axis | curve | {REGJAX} | arithmetic | | {' | '.join(others)} |",
        "|---" * (5 + len(others)) + "|",
    ]
    for slope in found:
        cells = [
            AXES[slope.axis], MEASURES[slope.measure],
            rounded(slope.tools[REGJAX]), rounded(slope.arithmetic),
            "met" if slope.met else "**missed**",
            *(rounded(slope.tools[name]) if name in slope.tools else "" for name in others),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(record: Record) -> str:
    """One record for people, in a line."""
    parts = []
    for name, numbers in record["tools"].items():
        own = [f"{numbers[key]:.3g} {unit}" for key, unit in _UNITS.items() if numbers.get(key)]
        parts.append(f"{name} {', '.join(own)}")
    return f"{record['case']}: {'; '.join(parts)} (load {record['load'][1]})"
