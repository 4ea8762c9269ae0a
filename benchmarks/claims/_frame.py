"""What stands around the panels of a claim's figure, so that it can be read without the table.

Above them the claim in a sentence and a mark for each part and data set, below them the legend of
all panels and a line that says what points and bars are.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import _papers
from benchmarks.claims import _figures

WIDTH = 6.8  # inches, of a page
_MARGIN, _LINE = 0.08, 0.15  # inches; a line is one of small print
_TITLE = {"fontsize": 9.5, "fontweight": "bold"}
_SMALL = 7.5
_MARKS = {
    word: (mark, color)
    for (word, mark), color in zip(
        _papers.MARKS.items(), (*_figures.COLORS[:2], "0.45", "0.45"), strict=True
    )
}


def parts(verdicts: Sequence[Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The parts of a claim with their verdict on each data set ("" where there is none)."""
    found: dict[str, dict[str, str]] = {}
    for verdict in _papers.verdicts({"verdicts": verdicts}):
        found.setdefault(verdict.part or "as claimed", {})[verdict.data] = verdict.word
    return found


def save(
    figure: Any, path: pathlib.Path, *, claim: str, verdicts: Sequence[Any], note: str
) -> None:
    """Adds title, marks, legend and note to the drawn panels and writes a small PNG."""
    body, rows = figure.get_figheight(), parts(verdicts)
    room = WIDTH - 2 * _MARGIN
    title = wrap(figure, f"{claim[0].upper()}{claim[1:]}.", room, **_TITLE)
    small = wrap(figure, note, room, fontsize=_SMALL)
    left = _lefts(rows)["words"]
    lines = {text: wrap(figure, text, WIDTH - _MARGIN - left, fontsize=_SMALL) for text in rows}
    legend = _legend(figure)
    below = _LINE * len(small) + 0.08
    if legend is not None:
        below += legend.get_window_extent().height / figure.dpi + 0.04
    above = 0.18 * len(title) + 0.2 + _LINE * (1 + sum(map(len, lines.values())))
    height = above + body + below
    figure.set_size_inches(WIDTH, height)
    if legend is not None:
        legend.set_bbox_to_anchor((0.5, (_LINE * len(small) + 0.06) / height))
    figure.get_layout_engine().set(rect=(0, below / height, 1, body / height))
    figure.text(_MARGIN / WIDTH, 1 - 0.06 / height, "\n".join(title), va="top", linespacing=1.25,
                **_TITLE)  # fmt: skip
    _draw_marks(figure, rows, lines, 0.18 * len(title) + 0.1)
    figure.text(_MARGIN / WIDTH, 0.05 / height, "\n".join(small), fontsize=_SMALL, va="bottom",
                color="0.3", linespacing=1.3)  # fmt: skip
    write(figure, path)


def wrap(figure: Any, text: str, width: float, **font: Any) -> list[str]:
    """Lines that are at most so many inches long."""
    probe, lines = figure.text(0, 0, "", **font), list[str]()
    for word in text.split():
        probe.set_text(f"{lines[-1]} {word}" if lines else word)
        if lines and probe.get_window_extent().width <= width * figure.dpi:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    probe.remove()
    return lines


def _legend(figure: Any) -> Any:
    """One legend of what the panels label, each label once."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_legend() is not None:
            continue
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if not labels:
        return None
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), 130 // (longest + 7)))
    legend = figure.legend(
        list(labels.values()), list(labels), loc="lower center", ncols=columns, frameon=False,
        fontsize=7, borderpad=0, borderaxespad=0, columnspacing=1.5, handlelength=2.4,
    )  # fmt: skip
    legend.set_in_layout(False)
    return legend


def _lefts(rows: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """Where the column of each data set begins, and that of the words, in inches."""
    found, left = {}, _MARGIN
    for data in dict.fromkeys(data for row in rows.values() for data in row):
        found[data] = left
        left += 0.16 + 0.062 * len(_figures.NAMES.get(data, ""))
    return {**found, "words": left + 0.08}


def _draw_marks(
    figure: Any,
    rows: Mapping[str, Mapping[str, str]],
    lines: Mapping[str, Sequence[str]],
    top: float,
) -> None:
    """A table: the data sets, and for each part its marks and its words."""
    height, lefts = figure.get_figheight(), _lefts(rows)
    left = lefts.pop("words")

    def put(x: float, line: int, text: str, color: str = "black") -> None:
        y = 1 - (top + _LINE * line) / height
        figure.text(x / WIDTH, y, text, fontsize=_SMALL, va="top", color=color)

    for data, x in lefts.items():
        put(x, 0, _figures.NAMES.get(data, ""), "0.3")
    used = {word for row in rows.values() for word in row.values()}
    key = ",  ".join(f"{mark} {word}" for word, (mark, _) in _MARKS.items() if word in used)
    put(left, 0, key, "0.3")
    line = 1
    for text, row in rows.items():
        for data, word in row.items():
            put(lefts[data] + 0.02, line, *_MARKS[word])
        for one in lines[text]:
            put(left, line, one)
            line += 1


def write(figure: Any, path: pathlib.Path) -> None:
    """Writes a PNG with a palette, which takes a third of the bytes of true colours."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
