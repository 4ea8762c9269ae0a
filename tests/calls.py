"""A good call of each public function of pruning and diagnostics, small: what tables go over."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import regjax
from regjax import diagnostics, pruning
from tests.pruning import networks

RANDOM = np.random.default_rng(5)
KEY = jax.random.key(3)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def preactivations(params, x):
    return [x @ params[0]["w"] + params[0]["b"][None]]


def normalized(params, x, batch):
    at = lambda inputs: inputs @ params[0]["w"] + params[0]["b"][None]
    return at(x) - jnp.mean(at(batch), 0, keepdims=True)


def loss(params, x, y):
    return jnp.mean((networks.perceptron(params, x) - y) ** 2) + 1


def gate_loss(gates, x):
    return jnp.mean((x * gates["a"][None]).sum(1) ** 2) + jnp.mean((x[:, :2] @ gates["b"]) ** 2)


def dropped(params, key):
    keep = jax.random.bernoulli(key, 0.5, (6, 3)).astype(jnp.float32)
    return jnp.mean((X * keep) @ params[0]["w"] @ params[1]["w"]) ** 2


PARAMS = networks.tree_params(3, 4, 2)
OTHER = networks.tree_params(3, 4, 2, seed=1)
X, Y, LABELS = draw(6, 3), draw(6, 2), jnp.asarray([0, 1, 0, 1, 1, 0])
BATCHES = draw(3, 5, 3)
GATES = {"a": jnp.ones(3), "b": jnp.ones(2)}
SCORES = {"a": draw(3), "b": draw(2)}
MASKS = {"a": jnp.ones(3, bool), "b": jnp.ones(2, bool)}
MODEL = regjax.from_callable(networks.perceptron, PARAMS)
STRUCTURE = pruning.find_structure(networks.perceptron, PARAMS, X)
UNITS = {"0/w": jnp.ones(4)}
UNIT_MASKS = {"0/w": np.array([True, False, True, True])}
REDUNDANCY = pruning.gradient_redundancy(draw(6, 3))
BASIS = jnp.eye(3)[:, :2]
SPECTRUM = jnp.asarray([3.0, 2.0, 0.1])

call = functools.partial
PRUNING = {
    "gated_loss": call(pruning.gated_loss, STRUCTURE, loss, PARAMS),
    "apply_gates": call(pruning.apply_gates, STRUCTURE, PARAMS, UNITS),
    "gate_gradients": call(pruning.gate_gradients, STRUCTURE, PARAMS, OTHER),
    "parameter_masks": call(pruning.parameter_masks, STRUCTURE, PARAMS, UNIT_MASKS),
    "unit_gates": call(pruning.unit_gates, STRUCTURE, PARAMS),
    "filter_groups": call(pruning.filter_groups, PARAMS),
    "group_importance": call(
        pruning.group_importance, SCORES, GATES,
        groups={"a": jnp.arange(3), "b": jnp.arange(2)}, num_groups=3,
    ),
    "hierarchical_plan": call(
        pruning.hierarchical_plan, {"a": REDUNDANCY}, {"a": 1.0}, budget=2.0
    ),
    "mask_planned": call(pruning.mask_planned, {"a": 1, "b": 0}, SCORES, MASKS),
    "incoming_norm": call(pruning.incoming_norm, STRUCTURE, PARAMS),
    "outgoing_norm": call(pruning.outgoing_norm, STRUCTURE, PARAMS),
    "random_scores": call(pruning.random_scores, GATES, key=KEY),
    "scale_magnitude": call(
        pruning.scale_magnitude,
        pruning.find_structure(lambda p, x: (x @ p["w"] * p["s"][None]) @ p["o"],
                               {"w": draw(3, 4), "s": draw(4), "o": draw(4, 2)}, X),
        {"w": draw(3, 4), "s": draw(4), "o": draw(4, 2)},
    ),
    "weight_magnitude": call(pruning.weight_magnitude, PARAMS),
    "full_masks": call(pruning.full_masks, SCORES),
    "gates_from_masks": call(pruning.gates_from_masks, MASKS),
    "mask_lowest": call(pruning.mask_lowest, SCORES, MASKS, 2),
    "oracle_importance": call(pruning.oracle_importance, gate_loss, GATES, X, chunk_size=4),
    "effective_rank": call(pruning.effective_rank, SPECTRUM),
    "energy_rank": call(pruning.energy_rank, SPECTRUM, share=0.9),
    "gradient_matrix": call(pruning.gradient_matrix, gate_loss, GATES, X, chunk_size=4),
    "gradient_redundancy": call(pruning.gradient_redundancy, draw(6, 3), tol=0.01),
    "numerical_rank": call(pruning.numerical_rank, SPECTRUM, tol=0.1),
    "redundancy_saliency": call(pruning.redundancy_saliency, REDUNDANCY),
    "stable_rank": call(pruning.stable_rank, SPECTRUM),
    "count_cost": call(pruning.count_cost, networks.perceptron, PARAMS, X),
    "remove_units": call(lambda *of: pruning.remove_units(*of)[1:], STRUCTURE, MODEL, UNIT_MASKS),
    "average_scores": call(pruning.average_scores, GATES, SCORES, decay=0.5),
    "cubic_removal": call(
        pruning.cubic_removal, jnp.int32(7), num_units=10, final=0.5, every=2, num_rounds=4
    ),
    "linear_removal": call(pruning.linear_removal, jnp.int32(7), every=2, num_each=1, total=5),
    "num_missing": call(pruning.num_missing, MASKS, 3),
    "find_structure": call(pruning.find_structure, networks.perceptron, PARAMS, X),
    "taylor_importance": call(pruning.taylor_importance, SCORES),
    "taylor_scores": call(pruning.taylor_scores, gate_loss, GATES, X, batch_size=2),
    "taylor_scores_second_order": call(
        pruning.taylor_scores_second_order, gate_loss, GATES, X, batch_size=2
    ),
}  # fmt: skip
DIAGNOSTICS = {
    "batch_norm_regularization": call(
        diagnostics.batch_norm_regularization, draw(3, 2), jnp.ones(2), draw(2), draw(3),
        jnp.eye(3), draw(3, 2), epsilon=1e-5,
    ),
    "boundary_jitter": call(
        diagnostics.boundary_jitter, normalized, PARAMS, X, BATCHES, chunk_size=4
    ),
    "least_squares_offset": call(diagnostics.least_squares_offset, draw(3, 2), X),
    "margin_jitter": call(
        diagnostics.margin_jitter, lambda p, x, b: normalized(p, x, b)[:, :2], PARAMS, X, LABELS,
        BATCHES, chunk_size=4,
    ),
    "condensation": call(diagnostics.condensation, draw(3, 4), draw(4), threshold=0.5),
    "critical_sharpness": call(
        diagnostics.critical_sharpness, loss, PARAMS, OTHER, X, Y, learning_rate=0.1, chunk_size=4
    ),
    "preconditioner": call(
        diagnostics.preconditioner, optax.ScaleByRssState(jax.tree.map(jnp.square, PARAMS)), PARAMS,
        optimizer="adagrad",
    ),
    "stability_threshold": call(
        diagnostics.stability_threshold, optimizer="adam", learning_rate=jnp.float32(0.1)
    ),
    "landscape_dependent_noise": call(
        diagnostics.landscape_dependent_noise, loss,
        jax.tree.map(lambda a, b: jnp.stack([a, b]), PARAMS, OTHER), PARAMS, X, Y,
        learning_rate=0.1, chunk_size=4,
    ),
    "decision_margin": call(
        diagnostics.decision_margin, networks.perceptron, PARAMS, X, LABELS, chunk_size=4
    ),
    "dropout_noise_alignment": call(
        diagnostics.dropout_noise_alignment, loss, dropped, PARAMS, X, Y, key=KEY, num_samples=3,
        num_directions=2, num_probes=2, chunk_size=4,
    ),
    "interval_flatness": call(
        diagnostics.interval_flatness, loss, PARAMS, OTHER, X, Y, max_distance=8.0,
        num_evaluations=9, chunk_size=4,
    ),
    "internal_covariate_shift": call(
        diagnostics.internal_covariate_shift, loss, PARAMS, OTHER, X, Y, layers=("0", "1"),
        chunk_size=4,
    ),
    "line_probe": call(
        diagnostics.line_probe, loss, PARAMS, X, Y, learning_rates=jnp.asarray([0.1, 0.2]),
        chunk_size=4,
    ),
    "frozen_component": call(diagnostics.frozen_component, draw(3, 4), draw(3, 4), BASIS),
    "subspace_from_data": call(diagnostics.subspace_from_data, X, num_directions=2),
    "transversal_complexity": call(
        diagnostics.transversal_complexity, networks.perceptron, PARAMS, X, BASIS, chunk_size=4
    ),
    "transversal_variation": call(
        diagnostics.transversal_variation, networks.perceptron, PARAMS, X, BASIS, key=KEY,
        radius=0.5, num_samples=2, chunk_size=4,
    ),
    "scale_invariant_mask": call(
        diagnostics.scale_invariant_mask, networks.perceptron, PARAMS, X, key=KEY
    ),
    "recovery_baselines": call(
        diagnostics.recovery_baselines, X, draw(6), true_weights=jnp.asarray([1.0, 0.0, 2.0])
    ),
    "sparse_recovery": call(
        diagnostics.sparse_recovery, draw(3), draw(3), depth=2,
        true_weights=jnp.asarray([1.0, 0.0, 2.0]),
    ),
    "boundary_density": call(
        diagnostics.boundary_density, preactivations, PARAMS, X, radius=0.5, chunk_size=4
    ),
    "boundary_distances": call(
        diagnostics.boundary_distances, preactivations, PARAMS, X, chunk_size=4
    ),
    "region_count": call(
        diagnostics.region_count, preactivations, PARAMS, draw(3), key=KEY, radius=1.0,
        num_samples=8, chunk_size=5,
    ),
    "filter_normalized_direction": call(
        diagnostics.filter_normalized_direction, PARAMS, key=KEY
    ),
    "interpolate": call(
        diagnostics.interpolate, loss, PARAMS, OTHER, X, Y, positions=jnp.asarray([0.0, 1.0]),
        chunk_size=4,
    ),
    "loss_surface": call(
        diagnostics.loss_surface, loss, PARAMS, OTHER, OTHER, X, Y,
        positions=jnp.asarray([0.0, 1.0]), chunk_size=4,
    ),
    "lambda_max_between": call(
        diagnostics.lambda_max_between, loss, PARAMS, OTHER, X, Y, key=KEY, num_points=2,
        max_matvecs=6, chunk_size=4,
    ),
    "sharpness_reduction_flow": call(
        diagnostics.sharpness_reduction_flow, loss, PARAMS, X, Y, key=KEY, intrinsic_rate=0.01,
        num_steps=5, chunk_size=4,
    ),
    "gradient_noise": call(diagnostics.gradient_noise, loss, PARAMS, X, Y, batch_size=2),
    "noise_scale": call(
        diagnostics.noise_scale, jnp.asarray([3.0, 2.0]), jnp.asarray([1.0, 1.5]),
        small_batch_size=2, large_batch_size=8,
    ),
    "gradient_share": call(
        diagnostics.gradient_share, PARAMS, jax.tree.map(lambda leaf: leaf[None], OTHER)
    ),
    "influence": call(
        diagnostics.influence, loss, PARAMS, (X, Y), (X[:2], Y[:2]), damping=1.0, method="minres"
    ),
}  # fmt: skip
# Their tests are with the Ritz values, of operators, or of a file.
ELSEWHERE = {"edge_of_stability", "effective_learning_rate", "operator_alignment", "read_monitor",
             "spherical_edge_of_stability", "spherical_sharpness",
             "spherical_sharpness_by_group"}  # fmt: skip


def public(room):
    """The names of the functions of a room."""
    functions = inspect.getmembers(room, inspect.isfunction)
    return {name for name, _ in functions if not name.startswith("_")}
