"""Which leaves are meant: masks, paths, types of nnx variables."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from regjax._selection import mask_leaves

TREE = {"layers": [{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, {"w": jnp.ones((2, 3))}], "n": 3}
# In the order of `jax.tree.leaves`: 0/b, 0/w, 1/w, n.
PLAIN = {
    "all": (None, [True] * 4),
    "an upper part": ({"layers": True, "n": False}, [True, True, True, False]),
    "bools of NumPy": ({"layers": [np.True_, np.False_], "n": np.True_}, [True, True, False, True]),
    "a path": (lambda path, leaf: path[-1] == "w", [False, True, True, False]),
    "a number in a path": (
        lambda path, leaf: path[:2] == ("layers", 1),
        [False, False, True, False],
    ),
    "a leaf": (lambda path, leaf: jnp.ndim(leaf) == 1, [True, False, False, False]),
    "any arguments": (lambda *both: "b" in both[0], [True, False, False, False]),
    "a partial": (
        functools.partial(lambda name, path, leaf: name in path, "n"),
        [False, False, False, True],
    ),
    "a Partial": (Partial(lambda path, leaf: "n" in path), [False, False, False, True]),
    "a function of the tree": (
        lambda tree: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, tree),
        [False, True, True, False],
    ),
    "a function of the tree with an option": (
        lambda tree, ndim=1: jax.tree.map(lambda leaf: jnp.ndim(leaf) == ndim, tree),
        [True, False, False, False],
    ),
    "nnx: part of a path": (nnx.PathContains("w"), [False, True, True, False]),
    "nnx: not": (nnx.Not(nnx.PathContains("n")), [True, True, True, False]),
    "nnx: several": ([nnx.PathContains("b"), nnx.PathContains("n")], [True, False, False, True]),
    "nnx: everything": (..., [True] * 4),
    "a type of Python": (int, [False, False, False, True]),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_selection_of_a_plain_tree(case):
    mask, expected = PLAIN[case]
    assert mask_leaves(mask, TREE) == expected


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(5, 3, rngs=rngs)
        self.layers = nnx.List([nnx.LoRALinear(3, 3, lora_rank=1, rngs=rngs) for _ in range(2)])
        self.head = self.table


@pytest.mark.parametrize("form", ["state", "module"])
def test_types_of_nnx_variables(form):
    module = Tied(nnx.Rngs(0))
    tree = nnx.state(module) if form == "state" else module
    leaves = jax.tree.leaves_with_path(tree)
    chosen = mask_leaves(nnx.LoRAParam, tree)
    assert len(chosen) == len(leaves)
    assert chosen == ["lora_" in jax.tree_util.keystr(path) for path, _ in leaves]
    both = mask_leaves((nnx.LoRAParam, nnx.PathContains("table")), tree)
    named = ["lora_" in s or "table" in s for s in (jax.tree_util.keystr(p) for p, _ in leaves)]
    assert both == named
    paths = []
    mask_leaves(lambda path, leaf: paths.append((path, type(leaf))) or True, tree)
    assert (("layers", 1, "lora", "lora_a"), nnx.LoRAParam) in paths


def test_a_shared_variable_of_a_state_is_one_leaf():
    state = nnx.state(Tied(nnx.Rngs(0)))
    assert sum(mask_leaves(lambda path, leaf: leaf.get_value().shape == (5, 3), state)) == 1


def test_a_variable_may_hold_several_arrays_or_none():
    state = nnx.State({"a": nnx.Param({"q": jnp.ones(2), "s": jnp.ones(1)}), "b": nnx.Param(None),
                       "c": nnx.BatchStat(jnp.ones(3))})  # fmt: skip
    assert mask_leaves(nnx.Param, state) == [True, True, False]
    assert mask_leaves(nnx.BatchStat, state) == [False, False, True]


def test_a_tree_of_bools_that_can_be_called_is_a_tree_of_bools():
    module = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    mask = jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, module)
    assert mask_leaves(mask, module) == [True, False]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (lambda path, leaf: False, ValueError, r"`wrt` must match .* layers/0/b, .*, n, got"),
        (nnx.LoRAParam, ValueError, r"got <class .*LoRAParam'>, and the tree has no nnx variables"),
        ("lora", ValueError, "got 'lora', and the tree has no nnx variables"),
        ([], ValueError, "`wrt` must have the tree structure"),
        ({"layers": True}, ValueError, "`wrt` must have the tree structure"),
        ({"layers": 1, "n": 0}, TypeError, "`wrt` must hold Python bools"),
        ({"layers": nnx.Param, "n": True}, TypeError, "`wrt` must hold Python bools"),
        (lambda params: {"layers": True}, ValueError, "`wrt` must have the tree structure"),
    ],
)
def test_what_is_no_selection_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        mask_leaves(mask, TREE, "wrt")


def test_a_filter_that_matches_nothing_of_a_state_is_refused():
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"leaves bias, kernel, got <class '[^']*LoRAParam'>\.$"):
        mask_leaves(nnx.LoRAParam, state)
