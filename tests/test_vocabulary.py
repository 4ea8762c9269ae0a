"""One vocabulary: docs/vocabulary.md has every public parameter and result name, and no other.

What is tested: a name of the code that is not on the page (a second word for a known thing), a name
of the page that the code does not have, a name that is positional here and by keyword there, and a
default that differs from one function to the next. What differs on purpose says why below.
"""

import collections
import dataclasses
import importlib
import inspect
import pathlib
import re
from typing import NamedTuple

import pytest
from flax import linen, nnx

from tests.faces import FACES, public_names

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "vocabulary.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.MULTILINE)
# Their layers are flax modules, with flax's arguments beside those on the page.
FLAX_FACES = re.compile(r"regjax\.(models|.*\.(linen|nnx))\.")
FLAX = set().union(
    *(
        inspect.signature(getattr(flax, layer)).parameters
        for flax, layers in ((linen, "BatchNorm GroupNorm Dense Conv"), (nnx, "BatchNorm Linear"))
        for layer in layers.split()
    ),
    {"args", "kwargs", "bias_metadata", "scale_metadata"},
)

POSITIONAL_AND_KEYWORD = {
    "noise_power": "a law is (largest, smallest, noise_power, inverse_batch) -> extremes",
    "num_steps": "third of `lanczos`, which needs it, as elsewhere; else an option",
    "optimizer_state": "what is read comes first; after *batch it can only be a keyword",
    "operator": "what is worked on comes first; where the loss has a Hessian it is an option",
    "pairs": "what a preconditioner is made of; an option where they make an estimate sharper",
    "path": "what is read comes first; where a run writes is an option",
    "positions": "data of a figure; after *batch it can only be a keyword",
    "start": "data of `lanczos`; else where to begin in place of a random vector",
    "state": "data where it is what is read, an option where the model has one",
    "std": "the number that a transformation is about comes first",
    "strength": "the number that a transformation is about comes first",
    "threshold": "the number that a gate or a transformation is about comes first",
    "tx": "what is wrapped comes first; what a monitor looks at is an option",
}
DIFFERENT_DEFAULTS = {
    "axis_scale": "of a curve for one's own plot, and of a figure that is to show small and large",
    "axis_name": "learners always have an axis, batches seldom",
    "depth": "of networks, and of the keys of a block",
    "decay": "of scores, which change, and of weights, whose plain mean is the usual one",
    "epsilon": "each paper's own",
    "figure_width": "of a page, and of a panel",
    "max_matvecs": "a single eigenvalue needs fewer than k of them",
    "learning_rate": "an optimiser's state may hold it",
    "num_evaluations": "a line needs fewer than two sides of a valley",
    "method": "of estimates and of linear systems",
    "num_points": "of a curve, and of losses that each take a gradient",
    "num_probes": "what one costs differs",
    "num_steps": "what a step costs differs",
    "threshold": "of cosines and of ratios",
    "share": "of the energy of a spectrum, and of the time of training",
    "tol": "of eigenvalues, of losses, of invariances, of ranks",
    "width": "of layers, of channels, of tokens",
}


class Use(NamedTuple):
    """A public name of a parameter or a field, where it stands."""

    where: str
    kind: str
    default: str


def uses_of(where, value):
    """(name, Use) of a public function's parameters, or of a class's fields."""
    if hasattr(value, "_fields") or dataclasses.is_dataclass(value):
        fields = getattr(value, "_fields", None)
        for name in fields or [field.name for field in dataclasses.fields(value)]:
            yield name, Use(where, "field", "")
        return
    for parameter in inspect.signature(value).parameters.values():
        kinds = {parameter.KEYWORD_ONLY: "keyword", parameter.POSITIONAL_OR_KEYWORD: "positional"}
        given = parameter.default is not parameter.empty
        default = repr(parameter.default) if given else ""
        yield parameter.name, Use(where, kinds.get(parameter.kind, "rest"), default)


def public_uses():
    """Name -> its uses, but for flax's own and for the fields of the command line's settings."""
    found, seen = collections.defaultdict(list), set()
    for face in FACES:
        for name, value in public_names(face).items():
            ours = getattr(value, "__module__", "").startswith("regjax") and callable(value)
            if not ours or id(value) in seen or name.endswith("Settings"):
                continue
            is_error = inspect.isclass(value) and issubclass(value, BaseException)
            if is_error or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            seen.add(id(value))
            for used, use in uses_of(f"{face}.{name}", value):
                if not (FLAX_FACES.match(use.where) and used in FLAX):
                    found[used].append(use)
    return found


USES = public_uses()


def page():
    return ROW.findall(PAGE.read_text())


def strangers(uses, known):
    """The names that are not on the page, with where they stand."""
    return {name: [use.where for use in found] for name, found in uses.items() if name not in known}


def test_every_name_is_on_the_page():
    assert strangers(USES, dict(page())) == {}


def test_a_second_word_for_a_known_thing_is_found():
    def planted(operator, *, tolerance=1e-3):
        return operator, tolerance

    uses = collections.defaultdict(list)
    for name, use in uses_of("planted", planted):
        uses[name].append(use)
    assert strangers(uses, dict(page())) == {"tolerance": ["planted"]}


def test_every_row_of_the_page_is_in_use_and_stands_there_once():
    names = [name for name, _ in page()]
    assert sorted(set(names) - set(USES)) == []
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


def test_meanings_differ_and_are_sentences():
    meanings = collections.defaultdict(list)
    for name, meaning in page():
        assert meaning.endswith("."), name
        meanings[meaning].append(name)
    assert [names for names in meanings.values() if len(names) > 1] == []


def of_functions(name):
    return [use for use in USES[name] if use.kind in ("positional", "keyword")]


@pytest.mark.parametrize("name", sorted(USES))
def test_a_name_is_positional_everywhere_or_by_keyword_everywhere(name):
    kinds = {use.kind for use in of_functions(name)}
    assert (len(kinds) > 1) == (name in POSITIONAL_AND_KEYWORD), of_functions(name)


@pytest.mark.parametrize("name", sorted(USES))
def test_a_name_has_one_default(name):
    defaults = {use.default for use in of_functions(name) if use.default}
    assert (len(defaults) > 1) == (name in DIFFERENT_DEFAULTS), of_functions(name)


# What one passes in, or reads a result's parts as.
NOUNS = {
    "Dataset",
    "Model",
    "WeightedMean",
    "Gate",
    "Group",
    "Slice",
    "MonitorPoint",
    "ProbePanel",
    "SpectrumPanel",
    "SurfacePanel",
}


def test_what_is_returned_is_a_result_and_what_is_carried_a_state():
    fields = {use.where for uses in USES.values() for use in uses if use.kind == "field"}
    tuples = {
        where.rsplit(".", 1)[1]
        for where in fields
        if issubclass(_class_at(where), tuple) and where.rsplit(".", 1)[1] not in NOUNS
    }
    assert sorted(name for name in tuples if not re.search(r"(Result|State)$", name)) == []


def _class_at(where):
    face, name = where.rsplit(".", 1)
    return getattr(importlib.import_module(face), name)
