"""The skeleton of docs/guides/new_transformation.md runs, and keeps the contract."""

import doctest
import inspect
import pathlib
import re
import types

import jax.numpy as jnp
import optax
import pytest

from regjax.experiments import TrainSettings, _optimizer, _transformations
from tests import registry, test_transform_contract
from tests.test_architecture import missing_sections

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guides" / "new_transformation.md").read_text()
NAME = "centralize_gradient"
# Those that say the most for a few seconds of compilation.
CHECKS = (
    "any_tree",
    "unknown_extra_arguments_change_nothing",
    "static_args_are_the_arguments_that_are_no_numbers",
    "optax_masks",
    "zero_gradients_give_finite_updates",
    "neutral_setting_is_the_plain_update_bit_for_bit",
)


@pytest.fixture(scope="module")
def skeleton():
    """The names that the blocks of the page make, one block after the other."""
    names = {"__name__": "skeleton"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(code, "new_transformation.md", "exec"), names)
    return names


@pytest.mark.parametrize("check", CHECKS)
def test_the_skeleton_keeps_the_contract(check, skeleton, monkeypatch, default_promotion):
    monkeypatch.setitem(registry.ROWS, NAME, skeleton["row"])
    getattr(test_transform_contract, f"test_{check}")(NAME)


def test_the_skeleton_is_documented_as_the_others(skeleton):
    assert missing_sections(skeleton[NAME]) == []
    names = {**skeleton, "transforms": types.SimpleNamespace(**skeleton)}
    (example,) = doctest.DocTestFinder().find(skeleton[NAME], NAME, module=False, globs=names)
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example) == (0, 4)


def test_a_class_is_all_that_the_command_line_needs(skeleton):
    method = skeleton["CentralizeGradient"](strength=0.5)
    arguments = set(inspect.signature(skeleton[NAME]).parameters)
    assert set(method.arguments()) <= arguments
    links = method.chain(_optimizer._descent(TrainSettings()))
    gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 2.0]])}
    updates, _ = links[0].update(gradient, links[0].init(gradient), gradient)
    assert jnp.array_equal(updates["kernel"], jnp.array([[0.0, 1.0], [2.0, 1.0]]))
    tx = optax.chain(*links)
    tx.update(gradient, tx.init(gradient), gradient)


def test_the_page_names_files_that_exist():
    new = f"_{NAME}.py", f"test_{NAME}.py"
    paths = set(re.findall(r"`((?:regjax|tests|benchmarks|docs)/[\w/.]*)`", PAGE))
    assert len(paths) > 6
    missing = {path for path in paths if not (ROOT / path).exists()} - {"docs/papers/"}
    assert all(path.endswith(new) for path in missing), missing
    for name in ("SoftThreshold", "SpectralController"):
        assert f"`{name}`" in PAGE
        assert hasattr(_transformations, name)
