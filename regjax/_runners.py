"""How a model of each kind runs: (params, state, inputs) -> (outputs, new state) on plain trees."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from regjax import _differences
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
    """Checks the trees: nnx would pair the leaves of another model by position, silently.

    And it would compute with another width, where all layers have it. The state may have any
    shapes: what a layer keeps of the examples has their number.
    """

    run: Run
    params_structure: Static
    params_shapes: tuple[tuple[int, ...], ...]
    state_structure: Static

    @classmethod
    def of(cls, run: Run, params: Params, state: State) -> "Apply":
        """Knows a model's own trees."""
        return cls(run, *_types(params), _types(state)[0])

    def with_params(self, params: Params) -> "Apply":
        """The same for another tree of the same parameters."""
        structure, shapes = _types(params)
        return dataclasses.replace(self, params_structure=structure, params_shapes=shapes)

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
                    f"`{name}` must have the tree structure of the model's, got "
                    f"{_differences.of(tree, expected.value)}.{_own_form(tree)}"
                )
        for (path, leaf), shape in zip(
            jax.tree_util.tree_leaves_with_path(params), self.params_shapes, strict=True
        ):
            if np.shape(leaf) != shape:
                raise ValueError(
                    f"`params{jax.tree_util.keystr(path)}` must have the shape {shape} of the "
                    f"model's, got {np.shape(leaf)}."
                )


def _own_form(tree: Tree) -> str:
    """Where the plain parameters are in what flax calls by other names."""
    if isinstance(tree, (nnx.State, nnx.Module)):
        of = "module" if isinstance(tree, nnx.Module) else "state"
        part = "nnx.state(module, nnx.Param)" if of == "module" else "state"
        return f" The plain dicts of this {of} are `nnx.to_pure_dict({part})`."
    if isinstance(tree, Mapping) and "params" in tree:
        return " Of linen's variables they are `variables['params']`."
    return ""


def _types(tree: Tree) -> tuple[Static, tuple[tuple[int, ...], ...]]:
    leaves, structure = jax.tree.flatten(tree)
    return Static(structure), tuple(np.shape(leaf) for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class CallableRunner:
    """Runs a pure function, whose state stays."""

    function: ModelFn

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        return self.function(params, inputs), state


def owned(tree: Tree) -> Tree:
    """Copies NumPy arrays into JAX's, into which no module can write: they are the caller's."""
    return jax.tree.map(
        lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree
    )
