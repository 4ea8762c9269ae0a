"""What is shown of records, paragraphs and tables, as the command line prints it."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

_COLUMNS = 80


class Table(NamedTuple):
    """A table.

    Attributes:
      rows: of texts, the first one names the row.
      head: what the columns are called, the first one often "".
      error: what the ± in every cell covers, where that does not depend on the row.
    """

    rows: list[list[str]]
    head: list[str] | None = None
    error: str | None = None


Contents: TypeAlias = Sequence[str | Table]
"""Paragraphs and tables in their order."""


def text(contents: Contents) -> str:
    """Returns the contents 80 columns wide."""
    shown = [wrapped(part) if isinstance(part, str) else _table(part) for part in contents]
    return "\n\n".join(shown)


def wrapped(text: str) -> str:
    """Breaks a paragraph into lines, between words only."""
    return textwrap.fill(text, _COLUMNS, break_long_words=False, break_on_hyphens=False)


def _table(shown: Table) -> str:
    """Sets rows in columns, the first to the left; columns that are too many go below."""
    rows = [*([] if shown.head is None else [shown.head]), *shown.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        taken = sum(2 + widths[i] for i in (0, *parts[-1], column))
        if parts[-1] and taken > _COLUMNS:
            parts.append([])
        parts[-1].append(column)
    return "\n\n".join("\n".join(_lines(rows, widths, columns)) for columns in parts)


def _lines(rows: list[list[str]], widths: list[int], columns: list[int]) -> list[str]:
    lines = []
    for row in rows:
        cells = [row[column].rjust(widths[column]) for column in columns]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *cells]))
    return lines
