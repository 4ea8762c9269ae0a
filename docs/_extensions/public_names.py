"""The directive `names`: entries of public names, under the names by which users import them.

    .. names:: regjax.curvature

       hessian
       fisher

A table of the names with their first sentences, then an entry each. At the end of the build every
public name of every room must have an entry: one that is missing is a warning, which `-W` refuses.
"""

import functools
import importlib
import inspect
import re
from types import ModuleType

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
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
    """The names that a user may take from a room, modules left out."""
    module = importlib.import_module(room)
    return [name for name in module.__all__ if _is_documented(module, getattr(module, name))]


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
    rooms = [where, f"regjax.{where}", f"{room}.{where}"]
    if not where:
        rooms = [room, "regjax", "regjax.typing"]
    found = (addresses().get(place, {}).get(name) for place in rooms)
    return next(filter(None, found), None)


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
            is_class, is_function = inspect.isclass(value), inspect.isroutine(value)
            kind = "class" if is_class else "function" if is_function else "data"
            lines += ["", f".. auto{kind}:: {name}", *["   :members:", ""] * is_class]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=False)


def without_entry(documented: set[str]) -> list[str]:
    """The public names that are not among the documented ones."""
    every = [name for names in addresses().values() for name in names.values()]
    return [name for name in every if name not in documented]


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    for name in without_entry(documented):
        logging.getLogger(__name__).warning("%s has no entry in docs/api", name)


def _skip_member(app, what, name, value, skip, options):
    """Leaves out the fields of named tuples, which the docstring has, and classes that are held."""
    is_field = type(value).__name__ in ("_tuplegetter", "member_descriptor")
    return True if is_field or inspect.isclass(value) else None


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Node
) -> nodes.Node | None:
    """Finds the types of signatures, which are written without their room."""
    target = address_of(node.get("reftarget", ""), node.get("py:module") or "regjax")
    if node.get("refdomain") != "py" or target is None or target == node["reftarget"]:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


class LinkedCode(SphinxTransform):
    """Links code on Markdown pages that is a public name with its room: `curvature.hessian`."""

    default_priority = 210

    def apply(self, **kwargs: object) -> None:
        """Wraps each such piece of code, unless it stands in a link already."""
        for code in list(self.document.findall(nodes.literal)):
            text = code.astext().removesuffix("()")
            target = address_of(text, "regjax") if re.fullmatch(r"\w+(\.\w+)+", text) else None
            is_linked = isinstance(code.parent, nodes.reference | addnodes.pending_xref)
            if target and not is_linked and not code.get("classes"):
                link = addnodes.pending_xref(
                    "", code.deepcopy(), refdomain="py", reftype="obj", reftarget=target,
                    refdoc=self.env.docname, refexplicit=True,
                )  # fmt: skip
                code.replace_self(link)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers this extension."""
    app.add_directive("names", Names)
    app.add_transform(LinkedCode)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("missing-reference", _resolve)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
