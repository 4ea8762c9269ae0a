"""Examples and bad values for every parameter of a public function, by its name.

A name has one meaning (docs/vocabulary.md), so that one row here serves all functions that have it.
`test_arguments.py` puts every public function through the bad values of all of its parameters.
"""

import functools
import math

import equinox
import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from flax import linen, nnx

import regjax
from regjax import curvature, pruning, transforms

NAN, INFINITY = math.nan, math.inf


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


@functools.cache
def params():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {"hidden": {"kernel": draw(3, 4), "bias": draw(4)}, "head": draw(4, 2)}


@functools.cache
def inputs():
    return jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)


@functools.cache
def targets():
    return jnp.asarray([0, 1, 1, 0, 1, 0], jnp.int32)


def model_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]


def output_loss_fn(outputs, targets):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, targets))


def loss_fn(params, inputs, targets):
    return output_loss_fn(model_fn(params, inputs), targets)


def key():
    return jax.random.key(0)


@functools.cache
def operator():
    return curvature.hessian(loss_fn, params(), inputs(), targets())


@functools.cache
def optimizer_state():
    tx = optax.adam(0.1)
    return tx.update(params(), tx.init(params()))[1]


@functools.cache
def density():
    return curvature.spectral_density(operator(), key=key(), num_steps=4, num_probes=2, deflate=0)


@functools.cache
def model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.norm(self.hidden(x))))

    return regjax.from_nnx(Net(nnx.Rngs(0)))


@functools.cache
def structure():
    return pruning.find_structure(model_fn, params(), inputs())


@functools.cache
def keras_module():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


@functools.cache
def transformed():
    return haiku.transform(lambda x: haiku.Linear(2)(x))


def scores():
    return {"hidden": jnp.arange(4.0)}


def masks():
    return {"hidden": jnp.asarray([True, True, True, False])}


def gate_loss(gates, inputs, targets):
    hidden = jnp.tanh(inputs @ params()["hidden"]["kernel"]) * gates["hidden"]
    return output_loss_fn(hidden @ params()["head"], targets)


@functools.cache
def redundancy():
    matrix = np.random.default_rng(2).normal(size=(6, 4))
    return pruning.gradient_redundancy(jnp.asarray(matrix, jnp.float32))


def group_results():
    return {"hidden": redundancy()}


_KERNEL = lambda: params()["hidden"]["kernel"]
# name -> a function that makes a good value.
EXAMPLES = {
    "activations": lambda: inputs(),
    "alpha": lambda: 0.1,
    "arguments": lambda: (loss_fn, params()),
    "basis": lambda: jnp.eye(3, dtype=jnp.float32)[:, :2],
    "batch": lambda: (inputs(), targets()),
    "batch_means": lambda: ones(5, 4),
    "batch_model_fn": lambda: lambda p, x, batch: model_fn(p, x),
    "batch_preactivations_fn": lambda: lambda p, x, batch: model_fn(p, x),
    "batch_size": lambda: 3,
    "batch_variances": lambda: ones(5, 4),
    "batches": lambda: [inputs(), inputs()],
    "bias": lambda: ones(4),
    "budget": lambda: 1.0,
    "center": lambda: ones(3),
    "costs": lambda: {"hidden": 1.0},
    "covariance": lambda: jnp.eye(3, dtype=jnp.float32),
    "crossover": lambda: 16.0,
    "curvature_grad_fn": lambda: lambda p: jax.grad(loss_fn)(p, inputs(), targets()),
    "damping": lambda: 0.1,
    "delay": lambda: 3,
    "densities": lambda: {"one": density(), "other": density()},
    "density": density,
    "diagonal": params,
    "depth": lambda: 2,
    "direction": params,
    "dropout_loss_fn": lambda: lambda p, key: loss_fn(p, inputs(), targets()),
    "entropies": lambda: ones(2),
    "epsilon": lambda: 1e-5,
    "every": lambda: 2,
    "factor": lambda: 2.0,
    "features": lambda: ones(6, 4),
    "final": lambda: 1,
    "function": lambda: model_fn,
    "g": lambda: ones(4),
    "gamma": lambda: 0.1,
    "gamma0": lambda: 0.1,
    "gate": lambda: transforms.always_gate(),
    "gate_grads": lambda: {"hidden": ones(6, 4)},
    "gate_loss": lambda: gate_loss,
    "gates": lambda: {"hidden": ones(4)},
    "grad": lambda: ones(3, 4),
    "grad_fn": lambda: lambda p: p,
    "gradient_norm": lambda: 1.0,
    "gradient_norm_bound": lambda: 1.0,
    "grads": params,
    "grid": lambda: jnp.linspace(-1.0, 1.0, 5, dtype=jnp.float32),
    "groups": lambda: [0, 0, 1],
    "growth": lambda: 1e-3,
    "initial_kernel": _KERNEL,
    "initial_learning_rate": lambda: 0.1,
    "hyperparams": lambda: {},
    "inputs": inputs,
    "intrinsic_rate": lambda: 0.01,
    "inverse_batch": lambda: 0.1,
    "k": lambda: 2,
    "keep_probability": lambda: 0.5,
    "kernel": _KERNEL,
    "key": key,
    "largest": lambda: 2.0,
    "large_batch_size": lambda: 8,
    "large_squared_norms": lambda: ones(3),
    "layers": lambda: ["hidden"],
    "layout": lambda: regjax.Layout(),
    "learning_rate": lambda: 0.1,
    "learning_rates": lambda: jnp.asarray([0.0, 0.1], jnp.float32),
    "like": params,
    "loss_fn": lambda: loss_fn,
    "mask": lambda: jax.tree.map(lambda leaf: leaf.ndim > 1, params()),
    "masks": masks,
    "matrix": lambda: jnp.full((4, 4), 0.25, jnp.float32),
    "matvec": lambda: lambda v: v,
    "max_distance": lambda: 1.0,
    "mean": lambda: ones(4),
    "mean_grads": params,
    "min_target_entropy": lambda: 0.1,
    "mixing": lambda: transforms.ring_mixing(),
    "model": model,
    "model_fn": lambda: model_fn,
    "noise_power": lambda: 0.1,
    "norm_bias": lambda: ones(4),
    "norm_scale": lambda: ones(4),
    "num_directions": lambda: 2,
    "num_each": lambda: 1,
    "num_groups": lambda: 2,
    "num_examples": lambda: 5,
    "num_matvecs": lambda: 6,
    "num_params": lambda: 24,
    "num_probes": lambda: 2,
    "num_removed": lambda: 1,
    "num_rounds": lambda: 3,
    "num_samples": lambda: 2,
    "num_steps": lambda: 3,
    "num_to_remove": lambda: 1,
    "num_units": lambda: 4,
    "num_values": lambda: 8,
    "operator": operator,
    "other_operator": operator,
    "order": lambda: 2.0,
    "pairs": lambda: curvature.top_eigenpairs(operator(), 2, key=key()),
    "preconditioner": lambda: curvature.identity(operator().space),
    "operator_fn": lambda: curvature.hessian,
    "optimizer": lambda: "adam",
    "optimizer_state": optimizer_state,
    "options": lambda: {},
    "other_direction": params,
    "other_inputs": inputs,
    "other_matrix": lambda: jnp.eye(4, dtype=jnp.float32),
    "other_params": params,
    "output_loss_fn": lambda: output_loss_fn,
    "params": params,
    "plan": lambda: {"hidden": 1},
    "positions": lambda: jnp.asarray([0.0, 0.5, 1.0], jnp.float32),
    "power": lambda: 0.5,
    "preactivations_fn": lambda: lambda p, x: [model_fn(p, x)],
    "previous": scores,
    "radius": lambda: 0.1,
    "reference_batch_size": lambda: 32,
    "reference_learning_rate": lambda: 0.1,
    "result": redundancy,
    "results": group_results,
    "rho": lambda: 0.05,
    "scale": lambda: ones(4),
    "scores": scores,
    "singular_values": lambda: jnp.asarray([3.0, 2.0, 1.0], jnp.float32),
    "small_batch_size": lambda: 2,
    "small_squared_norms": lambda: 2 * ones(3),
    "smallest": lambda: 0.5,
    "solver": lambda: curvature.trace_solver(operator(), key=key(), num_matvecs=2),
    "space": lambda: operator().space,
    "start": params,
    "std": lambda: 0.1,
    "step": lambda: 3,
    "strength": lambda: 0.1,
    "structure": structure,
    "target_entropies": lambda: ones(2),
    "targets": targets,
    "task_loss": lambda: jnp.float32(1.0),
    "threshold": lambda: 0.1,
    "test": lambda: (inputs()[:2], targets()[:2]),
    "total": lambda: 3,
    "train": lambda: (inputs(), targets()),
    "true_weights": lambda: ones(3),
    "tx": lambda: optax.sgd(0.1),
    "u": lambda: ones(3),
    "unit_masks": masks,
    "v": lambda: ones(3),
    "updates": params,
    "value_and_grad_fn": lambda: jax.value_and_grad(loss_fn),
    "variance": lambda: ones(4),
    "vector": params,
    "vectors": lambda: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), params()),
    "velocity": params,
    "weight_decay": lambda: 0.1,
    "weight_fn": lambda: lambda inputs: len(inputs),
    "weights": lambda: {"w": 0.1},
    "wrt": lambda: jax.tree.map(lambda leaf: leaf.ndim > 1, params()),
}


def learners():
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), params())


def state_of(tx):
    return tx.init(params())


@functools.cache
def scaled_structure():
    """Of a network whose hidden units have scales."""
    tree = {**params(), "scale": ones(4)}

    def scaled(params, inputs):
        hidden = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        return jnp.tanh(hidden * params["scale"]) @ params["head"]

    return pruning.find_structure(scaled, tree, inputs())


def replaced(leaf_of):
    """The parameters with each leaf replaced."""
    return jax.tree.map(leaf_of, params())


# function -> name -> a function that makes a good value, where that of EXAMPLES will not do.
OVERRIDES = {
    "from_callable": {"function": lambda: model_fn},
    "from_equinox": {
        "module": lambda: equinox.nn.MLP(3, 2, 4, 1, key=key()),
        "state": lambda: None,
    },
    "from_haiku": {"transformed": transformed, "state": lambda: None},
    "from_keras": {"module": keras_module},
    "from_linen": {
        "module": lambda: linen.Dense(2),
        "variables": lambda: linen.Dense(2).init(key(), inputs()),
    },
    "from_nnx": {"module": lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))},
    "initializers.gradinit": {"batches": lambda: (ones(2, 3, 4, 3), jnp.zeros((2, 3, 4), int))},
    "initializers.data_dependent": {
        "params": lambda: model().params,
        "state": lambda: model().state,
    },
    "population_statistics": {"params": lambda: model().params},
    "updated_statistics": {"params": lambda: model().params},
    "curvature.apply_function": {"function": lambda: jnp.abs},
    "curvature.apply_function_solver": {"function": lambda: jnp.abs},
    "curvature.spectral_sum": {"function": lambda: jnp.abs},
    "normalization.weight_normalize": {"v": _KERNEL},
    "curvature.spectral_density": {"num_steps": lambda: 4},
    "curvature.spectral_density_solver": {"num_steps": lambda: 4},
    "curvature.stream": {"arguments": lambda: (loss_fn, params(), [(inputs(), targets())])},
    "curvature.target_alignment": {"targets": lambda: ones(4)},
    "diagnostics.batch_norm_regularization": {"mean": lambda: ones(3)},
    "diagnostics.dropout_noise_alignment": {"num_directions": lambda: 1},
    "diagnostics.edge_of_stability": {
        "learning_rate": lambda: 0.1,
        "optimizer_state": optimizer_state,
    },
    "diagnostics.landscape_dependent_noise": {
        "params": lambda: learners(),
        "mean_grads": params,
        "batch": lambda: jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), (inputs(), targets())),
    },
    "pruning.group_importance": {"groups": lambda: {"hidden": {"kernel": 0, "bias": 0}, "head": 1}},
    "pruning.scale_magnitude": {"structure": lambda: scaled_structure()},
    "regularizers.dropout_penalty": {"kernel": lambda: ones(4, 2)},
    "transforms.averaged_params": {"state": lambda: state_of(transforms.average_params())},
    "transforms.consensus_model": {
        "params": lambda: jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), model().params)
    },
    "transforms.denoise_params": {
        "state": lambda: state_of(transforms.anticorrelated_noise(0.1, key=key()))
    },
    "transforms.gradient_function": {"arguments": lambda: (params(), inputs(), targets())},
    "transforms.refresh_spectral_controller": {
        "state": lambda: state_of(
            transforms.spectral_controller(key=key(), initial_learning_rate=0.1, every=2)
        )
    },
}

_KINDS = {
    "count": (
        "batch_size", "begin", "block_size", "chunk_size", "deflate", "delay", "every", "final",
        "k", "large_batch_size", "max_basis", "max_bytes", "max_matvecs", "max_steps", "min_units",
        "prefetch", "small_batch_size",
    ),
    "number": (
        "alpha", "budget", "clip", "crossover", "damping", "decay", "epsilon", "eta",
        "first_step_learning_rate", "flat_tol", "gamma", "gamma0", "gradient_norm",
        "gradient_norm_bound", "growth", "initial_learning_rate", "intrinsic_rate",
        "inverse_batch", "keep_probability", "learning_rate", "linear_threshold", "margin",
        "max_distance", "max_momentum", "min_norm", "momentum", "noise_power", "noise_scale",
        "order", "radius", "reference_batch_size", "reference_learning_rate", "rho", "share",
        "smallest_ratio", "std", "strength", "target_norm", "threshold", "tol",
        "vanishing_threshold", "weight_decay", "weight_decay_ratio",
    ),
    "real": ("largest", "power", "smallest"),
    "like params": (
        "direction", "other_direction", "other_params", "start", "updates", "vector",
    ),
    "loss": ("dropout_loss_fn", "gate_loss", "loss_fn"),
    "function": (
        "batch_model_fn", "batch_preactivations_fn", "call", "curvature_grad_fn", "grad_fn", "law",
        "matvec", "model_fn", "operator_fn", "output_loss_fn", "preactivations_fn", "rule",
        "value_and_grad_fn", "weight_fn",
    ),
    "array": (
        "activations", "batch_means", "batch_variances", "center", "covariance",
        "features", "g", "grid", "initial_kernel", "inputs", "kernel", "large_squared_norms",
        "learning_rates", "matrix", "other_inputs", "other_matrix", "positions", "singular_values",
        "small_squared_norms", "true_weights", "u", "v",
    ),
    "choice": (
        "accumulation", "axis_scale", "first_step", "likelihood", "method", "mode", "optimizer",
        "output_axes",
        "reduction", "side", "which",
    ),
    "key": ("key",),
    "params": ("like", "mean_grads", "params"),
    "layout": ("layout",),
    "mask": ("mask", "wrt"),
    "operator": ("metric", "operator", "other_operator", "preconditioner"),
}  # fmt: skip


def kind_of(name):
    """The kind of an argument, a key of `BAD`; None where there is no bad value of its kind."""
    if name.startswith("num_"):
        return "count"
    return next((kind for kind, names in _KINDS.items() if name in names), None)


# kind -> label -> a function that makes a bad value.
BAD = {
    "count": {
        "-1": lambda: -1,
        "1.5": lambda: 1.5,
        "nan": lambda: NAN,
        "True": lambda: True,
        "text": lambda: "3",
    },
    "number": {
        "-1": lambda: -1.0,
        "array of -1": lambda: jnp.float32(-1),
        "nan": lambda: NAN,
        "infinity": lambda: INFINITY,
        "text": lambda: "1",
        "complex": lambda: 1j,
    },
    "real": {"text": lambda: "1", "complex": lambda: 1j},
    "key": {
        "0": lambda: 0,
        "legacy": lambda: jax.random.PRNGKey(0),
        "many": lambda: jax.random.split(key(), 2),
    },
    "params": {
        "complex": lambda: replaced(lambda leaf: leaf.astype(jnp.complex64)),
        "integers": lambda: replaced(lambda leaf: leaf.astype(jnp.int32)),
        "bools": lambda: replaced(lambda leaf: leaf > 0),
        "text": lambda: "params",
    },
    "like params": {
        "empty": dict,
        "other structure": lambda: {"w": ones(3)},
        "other shapes": lambda: replaced(lambda leaf: leaf[:1]),
        "complex": lambda: replaced(lambda leaf: leaf.astype(jnp.complex64)),
        "integers": lambda: replaced(lambda leaf: leaf.astype(jnp.int32)),
    },
    "loss": {
        "3": lambda: 3,
        "no result": lambda: lambda *args: None,
        "vector": lambda: lambda *args: ones(3),
        "integer": lambda: lambda *args: jnp.int32(3),
    },
    "function": {"3": lambda: 3, "text": lambda: "f"},
    "array": {
        "text": lambda: "array",
        "complex": lambda: jnp.ones((3, 4), jnp.complex64),
        "empty": lambda: ones(0, 3),
    },
    "choice": {"unknown": lambda: "nonsense"},
    "mask": {
        "other structure": lambda: {"w": True},
        "numbers": lambda: replaced(lambda leaf: 1.0),
        "text": lambda: "mask",
    },
    "layout": {
        "other structure": lambda: {"w": regjax.Layout()},
        "no such axis": lambda: regjax.Layout(stack=7),
        "number": lambda: 3,
        "text": lambda: "layout",
    },
    "operator": {"matrix": lambda: jnp.eye(3, dtype=jnp.float32), "function": lambda: loss_fn},
}

# (function, name, label) or (name, label) -> why it is taken.
EXCUSED = {
    ("gradient_norm_bound", "infinity"): "no bound",
    ("clip", "infinity"): "no bound",
    ("factor", "-1"): "weights may change their sign",
    ("factor", "array of -1"): "weights may change their sign",
    ("diagnostics.condensation", "threshold", "-1"): "a cosine",
    ("diagnostics.condensation", "threshold", "array of -1"): "a cosine",
    **{
        (name, "loss_fn", label): "it is called by others, later"
        for name in ("pruning.gated_loss", "without_aux", "assume_separable")
        for label in ("no result", "vector", "integer")
    },
    **{
        ("pruning.gradient_redundancy", "mask", label): "an array of columns"
        for label in ("other structure", "numbers", "text")
    },
}
