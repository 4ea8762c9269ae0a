"""The table of docs/frameworks.md is true: each cell's lines are counted, run and checked.

The lines stand below it, under the framework and the word of the column. What they find is compared
with plain automatic differentiation of the framework's own functions.
"""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from regjax import model_function, pruning

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported
pytestmark = pytest.mark.usefixtures("default_promotion")
ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "frameworks.md").read_text()
PACKAGES = {"Equinox": "equinox", "Haiku": "haiku", "Keras": "keras"}
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(1, 2, size=(24, 6)).astype("float32")
Y = RANDOM.integers(3, size=24).astype("int32")
HIDDEN = jnp.asarray(RANDOM.normal(3, 2, size=(24, 8)), jnp.float32)


def table():
    """{(framework, thing): number of lines} of the table."""
    beginning = PAGE.index("| framework | curvature |")
    rows = re.findall(r"^\|(.*)\|$", PAGE[beginning:].split("\n\n")[0], re.M)
    rows = [[cell.strip() for cell in row.split("|")] for row in rows]
    things = rows[0][1:]
    return {
        (row[0], thing): int(cell)
        for row in rows[2:]
        for thing, cell in zip(things, row[1:], strict=True)
    }


def page():
    """{framework: {"": its own lines, thing: lines that are added}} of the page."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        name = section.splitlines()[0]
        blocks = re.findall(r"(?:^(\w+):\n\n)?^```python\n(.*?)^```$", section, re.S | re.M)
        found[name] = dict(blocks)
    return found


TABLE, BLOCKS = table(), page()


def cross_entropy(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


@pytest.fixture(scope="module")
def own():
    """framework -> the names of the user's own lines, run anew."""

    def run(name):
        if name in PACKAGES:
            pytest.importorskip(PACKAGES[name])
        names = {"x": X, "y": Y, "cross_entropy": cross_entropy}
        exec(compile(BLOCKS[name][""], f"docs/frameworks.md, {name}", "exec"), names)
        return names

    return run


def added(name, thing, names):
    exec(compile(BLOCKS[name][thing], f"docs/frameworks.md, {name}, {thing}", "exec"), names)


def functions(name, names, train):
    """(params -> loss in this mode, params), by the framework's own means."""
    if name == "Flax linen":
        variables, net = names["variables"], names["net"]
        options = {"mutable": ["batch_stats"]} if train else {}

        def outputs(params):
            found = net.apply({**variables, "params": params}, X, train, **options)
            return found[0] if train else found

        params = variables["params"]
    elif name == "Flax nnx":
        net = nnx.clone(names["net"])
        (net.train if train else net.eval)()
        graph, params, rest = nnx.split(net, nnx.Param, ...)
        params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        outputs = lambda params: nnx.merge(graph, nnx.State(params), nnx.State(rest))(X)
    elif name == "Equinox":
        eqx = names["eqx"]
        params, static = eqx.partition(names["net"], eqx.is_inexact_array)
        outputs = lambda params: jax.vmap(eqx.combine(params, static))(X)
    elif name == "Haiku":
        params, state, net = names["params"], names["state"], names["net"]
        outputs = lambda params: net.apply(params, state, X, is_training=train)[0]
    elif name == "Keras":
        params, state, net = names["params"], names["state"], names["net"]
        outputs = lambda params: net.stateless_call(params, state, X, training=train)[0]
    else:
        params = names["params"]
        outputs = lambda params: names["model_fn"](params, X)
    return (lambda params: cross_entropy(outputs(params), Y)), params


@pytest.mark.parametrize(("name", "thing"), TABLE)
def test_the_number_of_lines(name, thing):
    lines = [line for line in BLOCKS[name][thing].splitlines() if line.strip()]
    assert len(lines) == TABLE[name, thing] <= 5


def test_every_framework_has_every_thing():
    things = {"curvature", "SAM", "normalization", "pruning", "diagnostics"}
    assert set(BLOCKS) == {"Flax linen", "Flax nnx", "Equinox", "Haiku", "Keras", "plain JAX"}
    assert set(TABLE) == {(name, thing) for name in BLOCKS for thing in things}
    assert all(set(blocks) == {"", *things} for blocks in BLOCKS.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_curvature(name, own):
    names = own(name)
    added(name, "curvature", names)
    loss, params = functions(name, names, train=False)
    flat, unravel = ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda vector: loss(unravel(vector))))(flat)
    expected = np.linalg.eigvalsh(np.asarray(dense, np.float64))[-1]
    assert float(names["top"].values[0]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", BLOCKS)
def test_sam(name, own):
    names = own(name)
    (step,) = re.findall(r"^# (.*grads = .*)$", BLOCKS[name][""], re.M)
    loss, params = functions(name, names, train=True)
    clean = jax.grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(clean)))
    top = jax.tree.map(lambda w, g: w + 0.05 * g / norm, params, clean)
    expected = jax.tree.leaves(jax.grad(loss)(top))
    added(name, "SAM", names)
    exec(step, names)
    found = [jnp.asarray(leaf) for leaf in jax.tree.leaves(names["grads"])]
    assert float(names["loss"]) == pytest.approx(float(loss(params)), rel=1e-5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    change = [jnp.abs(a - b).max() for a, b in zip(found, jax.tree.leaves(clean), strict=True)]
    assert max(change) > 1e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_normalization(name, own):
    names = own(name)
    if name.startswith("Flax"):
        # The layer of that name is ours from here on: the same loss, the same statistics.
        loss, params = functions(name, names, train=True)
        expected = loss(params)
        added(name, "normalization", names)
        assert names["BatchNorm"].__module__.startswith("regjax.")
        class_and_on = BLOCKS[name][""][BLOCKS[name][""].index("class Net") :]
        before = names["net"]
        exec(class_and_on, names)
        if name == "Flax nnx":  # ours draws no keys, so that the layers behind it get others
            nnx.update(names["net"], nnx.state(before, nnx.Param))
        loss, params = functions(name, names, train=True)
        assert float(loss(params)) == pytest.approx(float(expected), rel=1e-5)
        return
    lines = BLOCKS[name]["normalization"]
    names |= {"hidden": HIDDEN, "is_training": True}
    if name == "Haiku":
        hk = names["hk"]

        def network_fn():
            inside = dict(names)
            exec(lines, inside)
            return inside["hidden"], inside["running"]

        network = hk.transform_with_state(network_fn)
        state = network.init(None)[1]
        (found, running), new = network.apply({}, state, None)
        jax.tree.map(np.testing.assert_array_equal, next(iter(new.values()))["running"], running)
    else:
        exec(lines, names)
        found, running = names["hidden"], names["running"]
    values = np.asarray(HIDDEN, np.float64)
    mean, variance = values.mean(0), values.var(0)
    np.testing.assert_allclose(found, (values - mean) / np.sqrt(variance + 1e-5), atol=1e-5)
    np.testing.assert_allclose(running["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * variance * 24 / 23, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_pruning(name, own):
    """The smaller model gives what the whole one gives with the units' gates at zero."""
    names = own(name)
    added(name, "pruning", names)
    model, small, masks = names["model"], names["small"], names["masks"]
    gates = {group: mask.astype(jnp.float32) for group, mask in masks.items()}
    params = pruning.apply_gates(names["structure"], model.params, gates)
    expected = model_function(model)(params, jnp.asarray(X))
    found = model_function(small)(small.params, jnp.asarray(X))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(small.params) < size(model.params)


@pytest.mark.parametrize("name", BLOCKS)
def test_diagnostics(name, own):
    names = own(name)
    added(name, "diagnostics", names)
    loss, params = functions(name, names, train=False)
    slope = jax.grad(loss)(params)
    down = lambda rate: loss(jax.tree.map(lambda w, g: w - rate * g, params, slope))
    np.testing.assert_allclose(names["probe"].losses, [down(0.1), down(0.2)], rtol=1e-4)
