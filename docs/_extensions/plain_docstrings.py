"""Docstrings and signatures as they stand in the source, for autodoc.

Docstrings here are plain text with `code` in single backticks and indented formulas, which read
well in `help()`. For Sphinx they become reStructuredText: code that is a public name becomes a
link, an indented paragraph a literal block, and |x| or *batch stay what they are. Signatures take
their types from the source, where they are `LossFn` and not what that stands for.
"""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
from collections.abc import Iterator

from docutils import nodes
from public_names import address_of
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
PRIVATE = re.compile(r"\b(\w+\.)*_\w+\.")
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
            indent = " " * _indent(block[0])
            result += [f"{indent[:-2]}.. code-block:: none", f"{indent[:-2]}   :class: formula", ""]
            result += [f"  {line}" for line in block] + [""]
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


@functools.cache
def _source(path: str) -> str:
    return pathlib.Path(path).read_text()


@functools.cache
def _definitions(path: str) -> dict[str, ast.AST]:
    """The functions and classes of a file by qualified name."""
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(_source(path)), "")
    return found


class _Source(str):
    """A default value, shown as it is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _written(value: object) -> tuple[dict[str, str], dict[str, _Source]]:
    """Annotations and defaults of a function's arguments or a dataclass's fields, as written."""
    value = inspect.unwrap(value)
    path = inspect.getsourcefile(value)
    node = _definitions(path).get(value.__qualname__)
    if isinstance(node, ast.ClassDef):
        fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
        types = {field.target.id: field.annotation for field in fields}
        given = {field.target.id: field.value for field in fields}
    elif node is None:
        return {}, {}
    else:
        every = node.args
        positional = [*every.posonlyargs, *every.args]
        arguments = [*positional, *every.kwonlyargs, every.vararg, every.kwarg]
        types = {arg.arg: arg.annotation for arg in arguments if arg} | {"return": node.returns}
        last = zip(reversed(positional), reversed(every.defaults), strict=False)
        pairs = [*last, *zip(every.kwonlyargs, every.kw_defaults, strict=True)]
        given = {arg.arg: default for arg, default in pairs}
    text = lambda node: " ".join(ast.get_source_segment(_source(path), node).split())
    return (
        {name: PRIVATE.sub("", text(node)).strip("\"'") for name, node in types.items() if node},
        {name: _default(text(node)) for name, node in given.items() if node},
    )


def _default(text: str) -> _Source:
    return _Source("..." if re.search(r"(^|\.)_|field\(|<|\w\(", text) else text)


def _shown(parameter: inspect.Parameter, defaults: dict[str, _Source]) -> object:
    if parameter.default is parameter.empty:
        return parameter.empty
    return defaults.get(parameter.name) or _default(repr(parameter.default))


def _signature(app, what, name, value, options, signature, returns):
    """Replaces what Python has made of types and defaults by what the source says."""
    types: dict[str, str] = {}
    defaults: dict[str, _Source] = {}
    if what == "class":
        if hasattr(value, "_fields"):
            return "", None  # made by functions; the docstring has the fields
        layer = getattr(value, "layer_type", object)  # an nnx face has the options of its layer
        for base in (*reversed(layer.__mro__), *reversed(value.__mro__)):
            if base.__module__.split(".")[0] in ("regjax", "flax"):
                has_own = "__init__" in vars(base) and not dataclasses.is_dataclass(base)
                found = _written(base.__init__ if has_own else base)
                types, defaults = types | found[0], defaults | found[1]
        types.pop("return", None)
    elif what in ("function", "method"):
        types, defaults = _written(value)
    else:
        return None
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    parameters = [
        p.replace(annotation=types.get(p.name, p.annotation), default=_shown(p, defaults))
        for p in found.parameters.values()
        if not (what == "method" and p.name in ("self", "cls"))
        and "Sentinel" not in repr(p.default)
    ]
    result = types.get("return", found.empty)
    found = found.replace(parameters=parameters, return_annotation=result)
    text = stringify_signature(found, unqualified_typehints=True)
    arguments, arrow, result = text.rpartition(" -> ")
    return (arguments, result) if arrow else (text, None)


def _docstring(app, what, name, value, options, lines):
    if what == "class":
        lines[:] = _with_types(lines, _written(value)[0])
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


def _without_private_modules(app: Sphinx, doctree: nodes.document) -> None:
    """Types of properties and of aliases, which autodoc writes in full."""
    for reference in doctree.findall(addnodes.pending_xref):
        if reference.get("refdomain") == "py":
            reference["reftarget"] = PRIVATE.sub("", reference["reftarget"])
    for signature in doctree.findall(addnodes.desc_signature):
        for text in list(signature.findall(nodes.Text)):
            if PRIVATE.search(text):
                text.parent.replace(text, nodes.Text(PRIVATE.sub("", text)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers this extension."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon comes at 500
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _without_private_modules)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
