"""Docstrings and signatures as they stand in the source, for autodoc.

Docstrings here are plain text with `code` in single backticks and indented formulas, which reads well
in `help()`. For Sphinx they become reStructuredText: code that is a public name becomes a link, an
indented paragraph a literal block, and |x| or *batch stay what they are. Signatures take their types
from the source, where they are `LossFn` and not what that stands for.
"""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
from collections.abc import Iterator

from public_names import address_of
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
MARKUP = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")


def rst_of(lines: list[str], room: str) -> list[str]:
    """Makes reStructuredText of a plain docstring."""
    result: list[str] = []
    for kind, block in _blocks(lines):
        if kind == "text":
            pieces = CODE.split("\n".join(block))
            pieces[::2] = [MARKUP.sub(r"\\\g<0>", piece) for piece in pieces[::2]]
            pieces[1::2] = [_code(piece, room) for piece in pieces[1::2]]
            result += "".join(pieces).split("\n")
        elif kind == "formula":
            result += ["::", "", *block, ""]
        else:
            result += block
    return result


def _code(piece: str, room: str) -> str:
    text = " ".join(piece.strip("`").split())
    target = address_of(text.removesuffix("()"), room)
    # The escaped spaces let a letter follow: `name`s.
    return rf"\ :py:obj:`{text} <{target}>`\ " if target else rf"\ ``{text}``\ "


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Cuts lines into text, formulas (indented after an empty line) and code (doctests, `::`)."""
    text: list[str] = []
    index = 0
    while index < len(lines):
        line, before = lines[index], lines[index - 1].strip() if index else "text"
        indent = len(line) - len(line.lstrip())
        last = next((old for old in reversed(lines[:index]) if old.strip()), "")
        is_doctest = line.lstrip().startswith(">>>")
        is_code = is_doctest or (bool(line.strip()) and last.endswith("::") and not before)
        is_formula = bool(line.strip()) and not before and indent > len(last) - len(last.lstrip())
        if not (is_code or is_formula):
            text.append(line)
            index += 1
            continue
        stop = index
        while stop < len(lines) and (
            lines[stop].strip()
            if is_doctest
            else not lines[stop].strip() or _indent(lines[stop]) >= indent
        ):
            stop += 1
        if text:
            yield "text", text
            text = []
        yield "code" if is_code else "formula", lines[index:stop]
        index = stop
    if text:
        yield "text", text


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@functools.cache
def _definitions(path: str) -> dict[str, ast.AST]:
    """The functions and classes of a file by qualified name."""
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(pathlib.Path(path).read_text()), "")
    return found


def _annotations(value: object) -> dict[str, str]:
    """The annotations of a function's arguments, or of a dataclass's fields, as they are written."""
    value = inspect.unwrap(value)
    node = _definitions(inspect.getsourcefile(value)).get(value.__qualname__)
    if isinstance(node, ast.ClassDef):
        return {
            s.target.id: ast.unparse(s.annotation)
            for s in node.body
            if isinstance(s, ast.AnnAssign)
        }
    if node is None:
        return {}
    arguments = node.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    found = {arg.arg: ast.unparse(arg.annotation) for arg in every if arg and arg.annotation}
    return found | ({"return": ast.unparse(node.returns)} if node.returns else {})


def _signature(app, what, name, value, options, signature, returns):
    """Replaces what Python has made of the annotations by what the source says."""
    if what == "class":
        if hasattr(value, "_fields"):
            return "", None  # made by functions; the docstring has the fields
        annotations = {}
        for base in reversed(value.__mro__):
            if base.__module__.startswith("regjax"):
                own = (
                    base.__init__
                    if "__init__" in vars(base) and not dataclasses.is_dataclass(base)
                    else base
                )
                annotations |= _annotations(own)
    elif what in ("function", "method"):
        annotations = _annotations(value)
    else:
        return None
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    parameters = list(found.parameters.values())
    if what == "method" and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    parameters = [p.replace(annotation=annotations.get(p.name, p.annotation)) for p in parameters]
    found = found.replace(
        parameters=parameters, return_annotation=annotations.get("return", found.empty)
    )
    text = stringify_signature(found, unqualified_typehints=True)
    arguments, arrow, result = text.rpartition(" -> ")
    return (arguments, result) if arrow else (text, None)


def _docstring(app, what, name, value, options, lines):
    lines[:] = rst_of(lines, app.env.ref_context.get("py:module", "regjax"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon comes at 500
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
