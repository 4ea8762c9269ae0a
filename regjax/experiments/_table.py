"""Tables and paragraphs of the command line, 80 columns wide."""

import textwrap

_COLUMNS = 80


def table(rows: list[list[str]]) -> str:
    """Sets rows in columns, the first to the left; columns that are too many go below."""
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


def wrapped(text: str) -> str:
    """Breaks a paragraph into lines, between words only."""
    return textwrap.fill(text, _COLUMNS, break_long_words=False, break_on_hyphens=False)
