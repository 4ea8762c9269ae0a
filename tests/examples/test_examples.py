"""The example scripts train as SAM by hand does, and measure what a dense Hessian has."""

import ast
import importlib
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from examples import images
from tests.examples import reference

SHARED = ("__init__.py", "decoder.py", "images.py")
ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name not in SHARED)
NUM_STEPS = 2
pytestmark = pytest.mark.usefixtures("default_promotion")


def script(name):
    return importlib.import_module(f"examples.{name}")


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_five_lines_are_added_at_most(path):
    """What is marked is all that knows of us."""
    lines = path.read_text().splitlines()
    marked = [line for line in lines if line.endswith("# regjax")]
    assert 1 <= len(marked) <= 5
    # Nothing else is ours: no other import, and no statement goes on in an unmarked line.
    tree = ast.parse("\n".join(lines))
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "regjax"
        for alias in node.names
    }
    used = {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in ours
        for number in range(node.lineno, node.end_lineno + 1)
    }
    assert ours
    assert all(lines[number - 1] in marked for number in used)


def test_flax_train_state():
    reference.check_decoder(*script("flax_train_state").main(NUM_STEPS), NUM_STEPS)


def test_gradient_accumulation():
    """Micro-batches of unequal weight, the last of none, are the whole batch."""
    reference.check_decoder(*script("gradient_accumulation").main(NUM_STEPS), NUM_STEPS)


def test_nnx_optimizer():
    module = script("nnx_optimizer")
    net, eigenvalue = module.main(NUM_STEPS)
    x, y = images.images()
    graph, params, rest = nnx.split(module.Net(nnx.Rngs(0)), nnx.Param, ...)
    pure = lambda tree: nnx.State(nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree)
    params, rest = (nnx.to_pure_dict(tree) for tree in (params, rest))

    def loss(params, rest):
        own = nnx.merge(graph, pure(params), pure(rest))
        value = cross_entropy(own(x), y)
        return value, nnx.to_pure_dict(nnx.state(own, nnx.Not(nnx.Param)))

    params, rest = reference.trained(loss, params, rest, NUM_STEPS)
    own = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    reference.close(own, params)
    statistics = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    reference.close(statistics["norm"], {k: rest["norm"][k] for k in ("mean", "var")})
    net.eval()
    graph, _, rest = nnx.split(net, nnx.Param, ...)
    rest = nnx.to_pure_dict(rest)
    evaluated = lambda params: cross_entropy(nnx.merge(graph, pure(params), pure(rest))(x), y)
    assert eigenvalue == pytest.approx(reference.largest_eigenvalue(evaluated, own), rel=1e-3)


def test_equinox_loop():
    eqx = pytest.importorskip("equinox")
    net, eigenvalue = script("equinox_loop").main(NUM_STEPS)
    x, y = images.images()
    x = x.reshape(len(x), -1)
    start = eqx.nn.MLP(x.shape[1], 3, 8, 2, activation=jax.nn.tanh, key=jax.random.key(0))
    params, static = eqx.partition(start, eqx.is_inexact_array)
    loss = lambda params: cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)
    expected, _ = reference.trained(lambda p, aux: (loss(p), aux), params, (), NUM_STEPS)
    found = eqx.filter(net, eqx.is_inexact_array)
    reference.close(found, expected)
    assert eigenvalue == pytest.approx(reference.largest_eigenvalue(loss, found), rel=1e-3)


def test_haiku_loop():
    hk = pytest.importorskip("haiku")
    module = script("haiku_loop")
    params, state, eigenvalue = module.main(NUM_STEPS)
    x, y = images.images()
    network = hk.without_apply_rng(hk.transform_with_state(module.network_fn))
    first = network.init(jax.random.key(0), x, is_training=True)

    def loss(params, state):
        logits, state = network.apply(params, state, x, is_training=True)
        return cross_entropy(logits, y), state

    reference.close((params, state), reference.trained(loss, *first, NUM_STEPS))
    evaluated = lambda p, state, x: cross_entropy(
        network.apply(p, state, x, is_training=False)[0], y
    )
    expected = reference.largest_eigenvalue(evaluated, params, state, x)
    assert eigenvalue == pytest.approx(expected, rel=1e-3)


_KERAS = """
import jax, numpy as np
from examples import images, keras_train_step
from tests.examples import reference
num_steps = 2
net, eigenvalue = keras_train_step.main(num_steps)
other = keras_train_step.make()
x, y = images.images()
values = lambda variables: [variable.value for variable in variables]

def loss(trainable, rest):
    logits, rest = other.stateless_call(trainable, rest, x, training=True)
    return keras_train_step.cross_entropy(logits, y), rest

start = values(other.trainable_variables), values(other.non_trainable_variables)
expected = reference.trained(loss, *start, num_steps)
found = values(net.trainable_variables), values(net.non_trainable_variables)
reference.close(found, expected)

def evaluated(trainable):
    logits, _ = net.stateless_call(trainable, found[1], x, training=False)
    return keras_train_step.cross_entropy(logits, y)

flat, unravel = jax.flatten_util.ravel_pytree(found[0])
dense = jax.hessian(lambda v: evaluated(unravel(v)))(flat)
np.testing.assert_allclose(eigenvalue, np.linalg.eigvalsh(dense)[-1], rtol=1e-3)
print("same")
"""
_FSDP = """
import pickle, sys
import jax
from examples import fsdp
params, eigenvalue = fsdp.main(2)
divided = [leaf for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated]
assert len(divided) > 6
with open(sys.argv[1], "wb") as file:
    pickle.dump((jax.device_get(params), eigenvalue), file)
print("same")
"""


def alone(code, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.stdout.strip().endswith("same"), result.stderr[-3000:]


def test_keras_train_step():
    """The backend is chosen when Keras is imported."""
    alone(_KERAS, KERAS_BACKEND="jax")


def test_fsdp(tmp_path):
    alone(_FSDP, tmp_path / "found", NPROC="16", JAX_NUM_CPU_DEVICES="4")
    reference.check_decoder(*pickle.loads((tmp_path / "found").read_bytes()), NUM_STEPS)


def test_statistics_of_a_clean_pass_only():
    """The references tick once a step; a second tick would be seen: 0.9 squared is not 0.9."""
    net, _ = script("nnx_optimizer").main(1)
    fresh = script("nnx_optimizer").Net(nnx.Rngs(0))
    x, _ = images.images()
    fresh.train()
    fresh(x)
    reference.close(
        nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)),
        nnx.to_pure_dict(nnx.state(fresh, nnx.BatchStat)),
    )
    assert jnp.any(net.norm.mean[...] != 0)
