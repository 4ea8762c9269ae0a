"""How a model of each kind runs: (params, state, inputs) -> (outputs, new state) on plain trees."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from regjax._base import ModelFn, Params, PRNGKey, State, Tree

Run: TypeAlias = Callable[[Params, State, Tree, bool, PRNGKey | None], tuple[Tree, State]]
"""(params, state, inputs, train, key) -> (outputs, new state)."""


class ApplyFn(Protocol):
    """(params, state, inputs, *, train, key=None) -> (outputs, new state), pure."""

    def __call__(
        self,
        params: Params,
        state: State,
        inputs: Tree,
        /,
        *,
        train: bool,
        key: PRNGKey | None = None,
    ) -> tuple[Tree, State]:
        """Returns the outputs and the new state."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """What is compared and not computed with, and hashes even where a part of it does not."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and bool(self.value == other.value)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:  # a list in a static field: `==` decides alone
            return hash(type(self.value))


@dataclasses.dataclass(frozen=True)
class Apply:
    """Checks the trees: nnx would pair the leaves of another model by position, silently."""

    run: Run
    params_structure: Static
    state_structure: Static

    def __call__(
        self,
        params: Params,
        state: State,
        inputs: Tree,
        *,
        train: bool,
        key: PRNGKey | None = None,
    ) -> tuple[Tree, State]:
        self.check(params, state)
        return self.run(params, state, inputs, train, key)

    def check(self, params: Params, state: State) -> None:
        """Raises ValueError where a tree is not like the model's."""
        for name, tree, expected in (
            ("params", params, self.params_structure),
            ("state", state, self.state_structure),
        ):
            if Static(jax.tree.structure(tree)) != expected:
                raise ValueError(
                    f"`{name}` must have the tree structure of the model's, got one "
                    f"{_difference(tree, expected.value)}."
                )


@dataclasses.dataclass(frozen=True)
class CallableRunner:
    """Runs a pure function, whose state stays."""

    function: ModelFn

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        return self.function(params, inputs), state


def _difference(tree: Tree, expected: Any) -> str:
    """Says in which leaves a tree differs from a structure."""
    paths = lambda tree: {
        jax.tree_util.keystr(path): None for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    if jax.tree_util.all_leaves([tree]):
        return "that is a single array"
    wanted, found = paths(jax.tree.unflatten(expected, range(expected.num_leaves))), paths(tree)
    lacking = [path for path in wanted if path not in found]
    more = [path for path in found if path not in wanted]
    parts = [
        f"{word} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for word, names in (("without", lacking), ("with", more))
        if names
    ]
    return " and ".join(parts) or f"of {jax.tree.structure(tree)} instead of {expected}"


def owned(tree: Tree) -> Tree:
    """Copies NumPy arrays into JAX's, into which no module can write: they are the caller's."""
    return jax.tree.map(
        lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree
    )
