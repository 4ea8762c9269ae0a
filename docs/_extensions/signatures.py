"""Signatures as they are written, for autodoc.

Types and defaults are taken from the source, where they are `LossFn` and 1e-3 and not what these
stand for. Private modules are not named.
"""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

PRIVATE = re.compile(r"\b(\w+\.)*_\w+\.")


@functools.cache
def _lines(path: str) -> list[bytes]:
    return pathlib.Path(path).read_bytes().splitlines()


def _text(path: str, node: ast.expr) -> str:
    """What a node is in the source, on one line."""
    lines = _lines(path)[node.lineno - 1 : node.end_lineno]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return " ".join(b" ".join(lines).decode().split())


@functools.cache
def _definitions(path: str) -> dict[str, ast.AST]:
    """The functions and classes of a file by qualified name."""
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(pathlib.Path(path).read_bytes()), "")
    return found


class _Source(str):
    """A default value, shown as it is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def written(value: object) -> tuple[dict[str, str], dict[str, _Source]]:
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
    return (
        {
            name: PRIVATE.sub("", _text(path, node)).strip("\"'")
            for name, node in types.items()
            if node
        },
        {name: _default(_text(path, node)) for name, node in given.items() if node},
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
                found = written(base.__init__ if has_own else base)
                types, defaults = types | found[0], defaults | found[1]
        types.pop("return", None)
    elif what in ("function", "method"):
        types, defaults = written(value)
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
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _without_private_modules)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
