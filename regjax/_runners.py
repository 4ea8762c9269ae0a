"""How a model of each kind runs: (params, state, inputs) -> (outputs, new state) on plain trees."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.tree_util import PyTreeDef

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


@dataclasses.dataclass(frozen=True)
class Apply:
    """Checks the trees: nnx would pair the leaves of another model by position, silently."""

    run: Run
    params_structure: PyTreeDef
    state_structure: PyTreeDef

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
            if jax.tree.structure(tree) != expected:
                raise ValueError(
                    f"`{name}` must have the tree structure of the model's, {expected}, "
                    f"got {jax.tree.structure(tree)}."
                )


@dataclasses.dataclass(frozen=True)
class LinenRunner:
    """Runs a linen module."""

    module: linen.Module

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        params, own_state = owned(params), owned(state)
        variables = {"params": params, **own_state}
        options = _mode_options(type(self.module), train)
        if not train:
            return self.module.apply(variables, inputs, **options), state
        outputs, new_state = self.module.apply(
            variables,
            inputs,
            rngs=None if key is None else {"dropout": key},
            mutable=list(state),
            **options,
        )
        return outputs, {**own_state, **new_state}


def _mode_options(module_type: type, train: bool) -> dict[str, bool]:
    meanings = {
        "train": train,
        "training": train,
        "deterministic": not train,
        "use_running_average": not train,
    }
    taken = inspect.signature(module_type.__call__).parameters
    return {name: value for name, value in meanings.items() if name in taken}


@dataclasses.dataclass(frozen=True)
class NnxRunner:
    """Runs an nnx module, by its graph in either mode."""

    evaluation: nnx.GraphDef
    training: nnx.GraphDef

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        # Merged from plain dicts: Variables of an outer trace may not be changed in an inner one.
        graph = self.training if train else self.evaluation
        module = nnx.merge(graph, owned(params), owned(state))
        if train and key is not None:
            _reseed(module, key)
        outputs = module(inputs)
        if not train:
            return outputs, state
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))


def _reseed(module: nnx.Module, key: PRNGKey) -> None:
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    tags = sorted({stream.key.tag for stream in streams})
    nnx.reseed(module, **{tag: jax.random.fold_in(key, i) for i, tag in enumerate(tags)})


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
