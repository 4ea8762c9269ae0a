"""The rules of the house that a program can check: layers, imports, names, docstrings, loops."""

import ast
import collections.abc
import importlib
import inspect
import pathlib
import re
import types
import typing

import matplotlib.axes
import matplotlib.figure
import mpl_toolkits.mplot3d
import pytest

from regjax import curvature

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "regjax"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "curvature": 1,
    "normalization": 1,
    "regularizers": 1,
    "pruning": 1,
    "schedules": 1,
    "transforms": 2,
    "initializers": 2,
    "diagnostics": 2,
    "models": 2,
    "plots": 2,
    "experiments": 3,
}
ROOMS = sorted(room for room in LAYERS if (PACKAGE / room / "__init__.py").exists())

# Everywhere else a loop goes through `_loops.py`, which knows about slow convolutions. These bodies
# hold dense linear algebra on the basis alone, never a product or a gradient.
LOOPS = {
    "regjax._loops": {"scan", "while_loop", "cond", "switch"},
    "regjax.curvature._engine._accumulation": {"fori_loop"},  # slabs of columns
    # Filled blocks only; slabs; one row after the other.
    "regjax.curvature._engine._basis": {"fori_loop", "cond", "map"},
    "regjax.curvature._deflation": {"fori_loop"},  # two passes over the rows
    "regjax.curvature._krylov": {"cond"},  # a fresh direction
    "regjax.curvature._quadrature": {"fori_loop"},  # a recurrence of twelve numbers
    "regjax.curvature._orthogonal": {"while_loop", "fori_loop"},  # one pass or two
    "regjax.normalization._batch_norm": {"scan"},  # ticks of running averages
    "regjax.models._transformer": {"scan"},  # equal blocks, without convolution
    "regjax.pruning._evaluation": {"scan"},  # the model's own
}
# What is multiplied knows nothing of how it runs, and neither of the methods.
FLOORS = ("regjax.curvature._operators", "regjax.curvature._engine", "regjax.curvature")
CONTROL_FLOW = {"scan", "while_loop", "fori_loop", "map", "cond", "switch", "associative_scan"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = [module_name(path) for path in FILES]


def imports(source, module, known):
    """The modules of the package that `source` imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                found.add(child if child in known else node.module)
    return {name for name in found if name.split(".")[0] == "regjax"}


def room_of(module):
    """The room of `module`; the command line is the front of `experiments`, None is layer 0."""
    if module == "regjax.__main__":
        return "experiments"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


def wrong_arrow(module, target):
    """Why `module` may not import `target`, or None if it may."""
    here, there = room_of(module), room_of(target)
    if target == "regjax.__main__":
        return "nothing imports the command line"
    if target == "regjax":
        return None if LAYERS.get(here) == 3 else "import the room or the file, not the package"
    if there is None:
        return None
    if here == there:
        is_file_to_face = target == f"regjax.{there}" and module != target
        return "inside a room import the file" if is_file_to_face else None
    if target != f"regjax.{there}":
        return "across rooms import the room"
    if module != "regjax" and LAYERS.get(here, 0) <= LAYERS[there]:
        return f"layer {LAYERS.get(here, 0)} imports layer {LAYERS[there]}"
    return None


def cycles(graph):
    """The modules that can reach themselves."""
    reach = {node: set(targets) for node, targets in graph.items()}
    for middle in graph:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    return sorted(node for node, targets in reach.items() if node in targets)


def control_flow(source):
    """The `lax` control flow that `source` calls, under either spelling of `lax`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"lax", "jax.lax"}:
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            names |= {alias.name for alias in node.names}
    return names & CONTROL_FLOW


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("regjax.curvature._eigen", "regjax._space", True),
        ("regjax.curvature._eigen", "regjax.curvature._lanczos", True),
        ("regjax.experiments._training", "regjax.models", True),
        ("regjax", "regjax.curvature", True),
        ("regjax.__main__", "regjax.experiments._settings", True),
        ("regjax", "regjax.curvature._eigen", False),
        ("regjax.curvature._eigen", "regjax.curvature", False),
        ("regjax.curvature._eigen", "regjax.models", False),
        ("regjax.plots._spectrum", "regjax.models", False),
        ("regjax.experiments._training", "regjax.models._mlp", False),
        ("regjax._tree", "regjax.curvature", False),
        ("regjax.plots._spectrum", "regjax", False),
    ],
)
def test_the_rule_of_arrows_itself(module, target, allowed):
    assert (wrong_arrow(module, target) is None) == allowed


def test_the_readers_of_source_find_what_they_look_for():
    source = "def f():\n    from regjax import _tree, models\n    import regjax.plots\n"
    known = {"regjax._tree", "regjax.models", "regjax.plots"}
    assert imports(source, "x", known) == known
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert control_flow("jax.lax.scan(f)\nlax.map(g)\njax.tree.map(h)") == {"scan", "map"}


def floor_of(module):
    """The floor of a module of the curvature room; None for what all floors stand on."""
    if module == "regjax.curvature._precision":
        return None
    return next((i for i, floor in enumerate(FLOORS) if module.startswith(f"{floor}.")), None)


def test_floors_of_curvature():
    for path in FILES:
        module = module_name(path)
        here = floor_of(module)
        for target in imports(path.read_text(), module, NAMES) if here is not None else ():
            there = floor_of(target)
            assert there is None or there <= here, f"{module} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_arrows_point_down(path):
    module = module_name(path)
    reasons = {t: wrong_arrow(module, t) for t in imports(path.read_text(), module, NAMES)}
    assert {t: reason for t, reason in reasons.items() if reason} == {}


def test_no_import_cycle():
    graph = {
        module_name(path): imports(path.read_text(), module_name(path), NAMES) for path in FILES
    }
    assert cycles(graph) == []


def test_every_folder_is_a_known_room():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_loops_over_expensive_bodies_are_chosen_in_one_place(path):
    assert control_flow(path.read_text()) <= LOOPS.get(module_name(path), set())


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_short_private_and_well_named(path):
    assert len(path.read_text().splitlines()) <= 350
    assert not re.search(r"utils?|misc|helpers?|common", path.stem)
    assert path.stem.startswith("_") or path.stem in {"linen", "nnx", "typing"}


def public_objects():
    """(dotted name, object) of everything that the package and its rooms export."""
    for face in ["regjax", *(f"regjax.{room}" for room in ROOMS)]:
        module = importlib.import_module(face)
        for name, value in vars(module).items():
            if not name.startswith("_") and not isinstance(value, types.ModuleType):
                yield f"{face}.{name}", value


def public_methods(cls):
    for name, value in vars(cls).items():
        if not name.startswith("_") and inspect.isfunction(value):
            yield name, value


def missing_sections(function):
    """What the docstring of `function` lacks: itself, `Args`, an argument's name, or `Returns`.

    A function that makes a solver has the arguments of the plain function, which says them.
    """
    text = inspect.getdoc(function)
    if not text:
        return ["docstring"]
    if function.__name__.endswith("_solver"):
        return []
    signature = inspect.signature(function)
    arguments = [name for name in signature.parameters if name != "self"]
    missing = ["Args:"] if arguments and "Args:" not in text else []
    missing += [name for name in arguments if not re.search(rf"\b{name}\b", text)]
    returns = signature.return_annotation
    if returns not in (None, "None", inspect.Signature.empty) and "Returns:" not in text:
        missing.append("Returns:")
    return missing


def test_missing_sections_are_found():
    def undocumented(vector: int) -> int:
        return vector

    def half(vector: int, matrix: int) -> int:
        """Does.

        Args:
          vector: one.
        """
        return vector + matrix

    assert missing_sections(undocumented) == ["docstring"]
    assert missing_sections(half) == ["matrix", "Returns:"]


@pytest.mark.parametrize(("name", "value"), list(public_objects()))
def test_every_public_name_is_documented(name, value):
    if not inspect.isclass(value):
        assert missing_sections(value) == []
        return
    text = value.__doc__
    # NamedTuple and dataclass write a docstring of their own: the signature.
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{value.__name__}("), f"{name} has no docstring of its own"
    fields = [field for field in getattr(value, "_fields", ()) if not field.startswith("_")]
    assert [field for field in fields if not re.search(rf"\b{field}\b", text)] == []
    undocumented = [m for m, _ in public_methods(value) if not inspect.getdoc(getattr(value, m))]
    assert undocumented == []


# What the room of figures imports only while types are checked.
ONLY_FOR_TYPES = {
    "Axes": matplotlib.axes.Axes,
    "Axes3D": mpl_toolkits.mplot3d.Axes3D,
    "Figure": matplotlib.figure.Figure,
    "Sequence": collections.abc.Sequence,
    "DensityCurveResult": curvature.DensityCurveResult,
    "DensityDistancesResult": curvature.DensityDistancesResult,
    "DensityResult": curvature.DensityResult,
}


def types_in(annotation):
    """The classes and type variables that an annotation is made of."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return {annotation}
    parts = [part for a in arguments for part in (a if isinstance(a, list) else [a])]
    return set().union(*(types_in(part) for part in parts), {typing.get_origin(annotation)})


@pytest.mark.parametrize(("name", "value"), list(public_objects()))
def test_types_in_public_signatures_have_public_names(name, value):
    if not inspect.isfunction(value):
        return
    public = {id(value) for _, value in public_objects()} | {
        id(value) for value in vars(importlib.import_module("regjax.typing")).values()
    }
    hints = typing.get_type_hints(value, localns=ONLY_FOR_TYPES)
    found = set().union(*map(types_in, hints.values()), set())
    ours = [
        kind
        for kind in found
        if getattr(kind, "__module__", "").startswith("regjax") and inspect.isclass(kind)
    ]
    assert [kind for kind in ours if id(kind) not in public] == [], name


def first_word(value):
    return re.match(r"\w*", inspect.getdoc(value) or "").group()


def test_docstrings_of_functions_begin_with_a_verb():
    """A formula or a name as the first word would be capitalised by the linter."""
    found = {
        name: first_word(value) for name, value in public_objects() if inspect.isfunction(value)
    }
    assert {
        name: word for name, word in found.items() if not re.fullmatch("[A-Z][a-z]+s", word)
    } == {}


def annotations(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            every += [arguments.vararg, arguments.kwarg]
            yield from (a.annotation for a in every if a is not None and a.annotation)
            yield from [node.returns] if node.returns else []
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def test_at_most_a_tenth_of_the_annotations_say_nothing():
    found = [node for path in FILES for node in annotations(path.read_text())]
    says_any = lambda node: any(
        isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(node)
    )
    assert sum(map(says_any, found)) <= len(found) / 10


def test_constraints_hold_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pattern = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [a-zA-Z0-9_<>=!.'() -]+)?")
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    assert {"jax", "flax", "optax", "pytest"} <= {line.split("==")[0] for line in lines}
