"""What `--geometry` adds to a spectrum: complexity, spherical sharpness and margins."""

import jax
import jax.numpy as jnp
import numpy as np

from regjax import diagnostics, regularizers
from regjax._adapters import model_function, model_loss
from regjax.experiments._analysis import Subject, training_examples
from regjax.experiments._inputs import cross_entropy, normalize
from regjax.experiments._record import Record
from regjax.experiments._settings import SpectrumSettings


def measure_geometry(subject: Subject, settings: SpectrumSettings) -> Record:
    """Measures geometric complexity, margins, and the spherical sharpness of the loss.

    With batch statistics the sharpness is that of the training loss, of the first `chunk_size`
    examples together, at the leaves that have no scale there; else of all leaves and examples.
    """
    model, dataset, scaling = subject
    inputs, targets = training_examples(subject, settings, "curvature_examples")
    chunk_size = settings.chunk_size
    function = model_function(model)
    key = jax.random.key(settings.seed)
    unseen = normalize(jnp.asarray(dataset.test_inputs), scaling)
    return {
        "num_examples": len(targets),
        "geometric_complexity": float(
            regularizers.geometric_complexity(function, model.params, inputs, chunk_size=chunk_size)
        ),
        "margins": {
            name: _quantiles(
                diagnostics.decision_margin(
                    function, model.params, x, jnp.asarray(y), chunk_size=chunk_size
                )
            )
            for name, x, y in (("train", inputs, targets), ("test", unseen, dataset.test_targets))
        },
        "spherical_sharpness": _spherical_sharpness(subject, inputs, targets, chunk_size, key),
    }


def _spherical_sharpness(
    subject: Subject, inputs: jax.Array, targets: jax.Array, chunk_size: int, key: jax.Array
) -> Record:
    model, params = subject.model, subject.model.params
    noise_key, mask_key, start_key = jax.random.split(key, 3)
    mask, mode = None, "evaluation"
    if model.has_batch_statistics:
        mode = "train"
        inputs, targets = inputs[:chunk_size], targets[:chunk_size]
        found = diagnostics.scale_invariant_mask(
            model_function(model, mode=mode, key=noise_key), params, inputs, key=mask_key
        )
        mask = found.mask if any(jax.tree.leaves(found.mask)) else None
    loss = model_loss(model, cross_entropy, mode=mode, key=noise_key if mode == "train" else None)
    report = diagnostics.spherical_sharpness(
        loss, params, inputs, targets, key=start_key, mask=mask, chunk_size=chunk_size
    )
    leaves = jax.tree.leaves(mask) if mask is not None else [True] * len(jax.tree.leaves(params))
    return {
        "value": float(report.value),
        "residual_norm": float(report.residual_norm),
        "converged": bool(report.converged),
        "mode": mode,
        "num_examples": len(targets),
        "num_leaves": sum(leaves),
        "of_all_leaves": mask is None,
    }


def _quantiles(margins: jax.Array) -> Record:
    values = np.asarray(margins, np.float64)
    # Of some example: between two of them a margin may be infinite.
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95], method="nearest")
    return {"low": float(low), "median": float(median), "high": float(high)}
