"""The directive `names`: entries of public names, under the names by which users import them.

    .. names:: regjax.curvature

       hessian
       fisher

A table of the names with their first sentences, then an entry each. At the end of the build every
public name of every room must have an entry: one that is missing is a warning, which `-W` refuses.
"""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOMS = (
    "regjax", "regjax.curvature", "regjax.diagnostics", "regjax.experiments", "regjax.initializers",
    "regjax.models", "regjax.models.linen", "regjax.normalization", "regjax.normalization.linen",
    "regjax.normalization.nnx", "regjax.plots", "regjax.pruning", "regjax.regularizers",
    "regjax.regularizers.linen", "regjax.regularizers.nnx", "regjax.schedules", "regjax.transforms",
    "regjax.typing",
)  # fmt: skip


def public_names(room: str) -> list[str]:
    """The names that a user may take from a room: defined there or imported with `as`; no modules."""
    module = importlib.import_module(room)
    names = getattr(module, "__all__", None) or list(_exported(module))
    return [name for name in names if _is_documented(module, getattr(module, name))]


def _exported(module: ModuleType) -> Iterator[str]:
    for node in ast.parse(inspect.getsource(module)).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.ImportFrom(names=aliases):
                names = [alias.asname for alias in aliases if alias.asname]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case _:
                continue
        yield from (name for name in names if not name.startswith("_"))


def _is_documented(module: ModuleType, value: object) -> bool:
    if isinstance(value, ModuleType):
        return False
    ours = getattr(value, "__module__", "").startswith("regjax") and callable(value)
    return ours or module.__name__ == "regjax.typing"


@functools.cache
def addresses() -> dict[str, dict[str, str]]:
    """Of each room what its public names are called in full."""
    return {room: {name: f"{room}.{name}" for name in public_names(room)} for room in ROOMS}


def address_of(text: str, room: str) -> str | None:
    """The full name of a public name as it is written in a room: `hessian`, `curvature.hessian`."""
    where, _, name = text.rpartition(".")
    rooms = (
        [room, "regjax", "regjax.typing"]
        if not where
        else [where, f"regjax.{where}", f"{room}.{where}"]
    )
    return next((addresses()[r][name] for r in rooms if name in addresses().get(r, {})), None)


class Names(SphinxDirective):
    """Writes the table and the entries."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parses the directives that autosummary and autodoc have for the names."""
        room = self.arguments[0]
        names = [line.strip() for line in self.content if line.strip()] or public_names(room)
        lines = ["", f".. currentmodule:: {room}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names]
        for name in names:
            value = getattr(importlib.import_module(room), name)
            kind = (
                "class"
                if inspect.isclass(value)
                else "function"
                if inspect.isroutine(value)
                else "data"
            )
            lines += ["", f".. auto{kind}:: {name}"]
            if kind == "class":
                lines += ["   :members:", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=False)


def _check(app: Sphinx, env: object) -> None:
    """Warns for each public name without an entry."""
    documented = {name for name, *_ in app.env.get_domain("py").get_objects()}
    for room in ROOMS:
        for name in public_names(room):
            if f"{room}.{name}" not in documented:
                logging.getLogger(__name__).warning("%s.%s has no entry in docs/api", room, name)


def _skip_member(
    app: Sphinx, what: str, name: str, value: object, skip: bool, options: object
) -> bool | None:
    """Leaves out the fields of named tuples, which the docstring describes, and classes held by others."""
    is_field = type(value).__name__ in ("_tuplegetter", "member_descriptor")
    return True if is_field or inspect.isclass(value) else None


def _resolve(
    app: Sphinx, env: object, node: nodes.Element, content: nodes.Node
) -> nodes.Node | None:
    """Finds the types of signatures, which are written without their room."""
    target = address_of(node.get("reftarget", ""), node.get("py:module") or "regjax")
    if node.get("refdomain") != "py" or target is None or target == node["reftarget"]:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("names", Names)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("missing-reference", _resolve)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
