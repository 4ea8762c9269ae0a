"""Every public function, and every class that a user makes, has an example that is true.

The examples are Python's own doctests in a section `Example:`. They assume the lines of `SESSION`,
as the docstring of `regjax` says.
"""

import doctest
import importlib
import inspect
import pydoc
import re

import numpy as np
import pytest
from flax import nnx

from tests.faces import FACES, public_names

SESSION = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
import regjax
from flax import linen, nnx
from regjax import curvature, diagnostics, experiments, initializers, models, normalization
from regjax import plots, pruning, regularizers, schedules, transforms
np.set_printoptions(precision=3, suppress=True)
"""
# Results, states and errors are made by a function whose example shows them.
MADE_BY_US = ("Result", "State", "Error", "Interrupted", "MonitorPoint")
FRAMEWORKS = {f"regjax.from_{name}": name for name in ("equinox", "haiku", "keras")}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def names_with_examples():
    """Dotted name -> the function, or the class that a user makes."""
    found, seen = {}, set()
    for face in FACES:
        for name, value in public_names(face).items():
            is_made = inspect.isclass(value) and value.__name__.endswith(MADE_BY_US)
            if callable(value) and not is_made and id(value) not in seen:
                seen.add(id(value))
                found[f"{face}.{name}"] = value
    return found


NAMES = names_with_examples()


def examples_of(name, value):
    """The doctests of `value`, and of its methods where it is a class."""
    methods = vars(value).items() if inspect.isclass(value) else ()
    ours = [(f"{name}.{method}", f) for method, f in methods if _is_ours(method, f)]
    finder = doctest.DocTestFinder(recurse=False)
    found = [finder.find(f, where, module=False, globs={}) for where, f in [(name, value), *ours]]
    return [test for tests in found for test in tests if test.examples]


def _is_ours(name, value):
    """Whether a public attribute of a class is a method, and not flax's."""
    return inspect.isfunction(value) and not name.startswith("_") and "regjax" in value.__module__


def failures_of(test):
    """What the examples of `test` print that they should not, as doctest reports it."""
    said = []
    with np.printoptions():
        exec(SESSION, test.globs)
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    return "".join(said)


def sections_of(text):
    """The titles under which the examples of a docstring stand."""
    titles = [line.strip() for line in (text or "").splitlines()]
    return [title for title in titles if title.startswith("Example") and ">>>" in text]


@pytest.mark.usefixtures("default_promotion")  # what a user has
@pytest.mark.parametrize("name", NAMES)
def test_examples_are_there_and_true(name):
    value = NAMES[name]
    tests = examples_of(name, value)
    assert tests, f"{name} has no example"
    if name in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[name])
    for test in tests:
        assert sections_of(test.docstring) == ["Example:"]
        said = failures_of(test)
        assert not said, said


def test_a_wrong_and_a_missing_example_are_found():
    def half(x):
        """Halves.

        Example:
          >>> half = jnp.float32(3.0) / 2
          >>> print(half)
          1.6
        """
        return x / 2

    (test,) = examples_of("half", half)
    assert "1.6\nGot:\n    1.5" in failures_of(test)
    assert examples_of("names_with_examples", names_with_examples) == []
    assert sections_of(half.__doc__) == ["Example:"]
    assert sections_of(half.__doc__.replace("Example:", "Examples:")) == ["Examples:"]


@pytest.mark.parametrize("face", [face for face in FACES if face.count(".") < 2])
def test_help_lists_the_public_functions(face):
    module = importlib.import_module(face)
    listed = set(re.findall(r"^    (?:class )?(\w+)", pydoc.plain(pydoc.render_doc(module)), re.M))
    public = {name for name in module.__all__ if callable(getattr(module, name))}
    assert public - listed == set()
    # Under DATA it says nothing of what is compiled.
    values = [getattr(module, name) for name in public]
    assert [v for v in values if not (inspect.isfunction(v) or inspect.isclass(v))] == []


@pytest.mark.parametrize(
    "room", ["curvature", "diagnostics", "normalization", "pruning", "transforms"]
)
def test_a_large_room_says_what_is_in_it(room):
    module = importlib.import_module(f"regjax.{room}")
    public = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    solvers = {name for name in public if name.endswith("_solver")}
    assert public - solvers - set(re.findall(r"\w+", module.__doc__)) == set()
    table = re.findall(r"^    (.*)$", module.__doc__, re.M)
    assert set(" ".join(table).split()) - public == set()


def test_help_shows_the_arguments_of_classes():
    """The metaclass of nnx would show (*args, **kwargs)."""
    kinds = [kind for kind in NAMES.values() if inspect.isclass(kind)]
    kinds = [kind for kind in kinds if not issubclass(kind, nnx.Variable)]
    without = [
        kind.__name__
        for kind in kinds
        if any(p.kind == p.VAR_POSITIONAL for p in inspect.signature(kind).parameters.values())
    ]
    assert len(kinds) > 40
    assert without == []
