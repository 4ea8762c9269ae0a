"""Docstrings as they are written, for autodoc.

Docstrings here are plain text with `code` in single backticks and indented formulas, which read
well in `help()`. For Sphinx they become reStructuredText: code that is a public name becomes a
link, an indented paragraph a literal block, and |x| or *batch stay what they are.
"""

import re
from collections.abc import Iterator

from public_names import address_of
from signatures import written
from sphinx.application import Sphinx

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
MARKUP = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")


def rst_of(lines: list[str], room: str) -> list[str]:
    """Makes reStructuredText of a plain docstring."""
    result: list[str] = []
    for kind, block in _blocks(lines):
        if kind == "text":
            pieces = CODE.split("\n".join(block))
            pieces[::2] = [MARKUP.sub(r"\\\g<0>", piece) for piece in pieces[::2]]
            for index in range(1, len(pieces), 2):
                # An escaped space where a letter follows, as in `name`s; none at the end of a line.
                before, after = pieces[index - 1][-1:].strip(), pieces[index + 1][:1].strip()
                code = _code(pieces[index], room)
                pieces[index] = "\\ " * bool(before) + code + "\\ " * bool(after)
            result += "".join(pieces).split("\n")
        elif kind == "formula":
            base = " " * _indent(next(filter(_is_full, reversed(result)), ""))
            result += [f"{base}.. code-block:: none", f"{base}   :class: formula", ""]
            result += [f"{base}   {line[_indent(block[0]) :]}" for line in block] + [""]
        else:
            result += block
    return result


def _code(piece: str, room: str) -> str:
    text = " ".join(piece.strip("`").split())
    target = address_of(text.removesuffix("()"), room)
    return f":py:obj:`{text} <{target}>`" if target else f"``{text}``"


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Cuts lines into text, formulas (indented after an empty line) and code (doctests, `::`)."""
    text: list[str] = []
    index = 0
    while index < len(lines):
        line, indent = lines[index], _indent(lines[index])
        last = next(filter(_is_full, reversed(lines[:index])), "")
        begins = index > 0 and _is_full(line) and not _is_full(lines[index - 1])
        is_doctest = line.lstrip().startswith(">>>")
        is_code = is_doctest or (begins and last.endswith("::"))
        if not is_code and not (begins and indent > _indent(last)):
            text.append(line)
            index += 1
            continue
        rest = range(index, len(lines))
        ends = (i for i in rest if _ends(lines[i], indent, is_doctest=is_doctest))
        stop = next(ends, len(lines))
        if text:
            yield "text", text
            text = []
        yield "code" if is_code else "formula", lines[index:stop]
        index = stop
    if text:
        yield "text", text


def _ends(line: str, indent: int, *, is_doctest: bool) -> bool:
    return not _is_full(line) if is_doctest else _is_full(line) and _indent(line) < indent


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_full(line: str) -> bool:
    return bool(line.strip())


def _docstring(app, what, name, value, options, lines):
    if what == "class":
        lines[:] = _with_types(lines, written(value)[0])
    lines[:] = rst_of(lines, app.env.ref_context.get("py:module", "regjax"))


def _with_types(lines: list[str], types: dict[str, str]) -> list[str]:
    """Adds the types to the fields under `Attributes:`, as napoleon reads them."""
    start = lines.index("Attributes:") + 1 if "Attributes:" in lines else len(lines)
    stop = next(
        (i for i in range(start, len(lines)) if lines[i] and lines[i][0] != " "), len(lines)
    )
    typed = lambda match: f"{match[1]} ({types[match[1]]}):" if match[1] in types else match[0]
    fields = [re.sub(r"(?<=^  )(\w+):", typed, line) for line in lines[start:stop]]
    return [*lines[:start], *fields, *lines[stop:]]


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers this extension."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon comes at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
