"""The report beside a spectrum against the functions it calls and a dense matrix."""

import jax
import numpy as np
import pytest

import regjax
from regjax.experiments import _report, _table, run_spectrum
from tests import oracles
from tests.experiments.test_spectrum_run import make_settings, problem_of
from tests.experiments.test_training import silent

pytestmark = pytest.mark.usefixtures("small_data")


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_report_holds_what_the_functions_say(norm, tmp_path, default_promotion):
    settings = make_settings(tmp_path, geometry=True, normalization=norm, num_steps=3)
    record = run_spectrum(settings, silent)
    model, inputs, targets = problem_of(settings)
    outputs, geometry = regjax.model_function(model), record["geometry"]
    exact = regjax.regularizers.geometric_complexity(outputs, model.params, inputs)
    assert geometry["geometric_complexity"] == pytest.approx(float(exact), rel=1e-5)
    margins = regjax.diagnostics.decision_margin(outputs, model.params, inputs, targets)
    median = np.quantile(margins, 0.5, method="nearest")
    assert geometry["margins"]["train"]["median"] == pytest.approx(float(median), rel=1e-4)
    assert geometry["margins"]["test"]["low"] <= geometry["margins"]["test"]["high"]
    sharpness = geometry["spherical_sharpness"]
    mode = "train" if norm == "batch" else "evaluation"
    loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
    matrix = np.asarray(regjax.curvature.hessian(loss, model.params, inputs, targets).dense())
    if norm == "none":
        chosen = np.ones(len(matrix), bool)
    else:
        # Of "head" (2 x 3 + 3), "layer_0" kernel (16 x 2), then scale and shift of the norm.
        sizes = {
            path: leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
        }
        is_kernel = ["kernel" in str(path) and "layer_0" in str(path) for path in sizes]
        chosen = np.repeat(is_kernel, list(sizes.values()))
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(model.params)]
    weights = np.concatenate(leaves)[chosen]
    largest = np.linalg.eigvalsh(matrix[np.ix_(chosen, chosen)])[-1] * np.sum(weights**2)
    assert sharpness["value"] == pytest.approx(largest, rel=1e-3)
    assert sharpness["num_leaves"] == (1 if norm == "batch" else 4)
    text = _table.text(_report.spectrum_contents(record))
    assert "spherical sharpness" in text
    assert "margin in training" in text
    assert "geometric complexity" in _table.text(
        _report.comparison_contents({"a": record, "b": record})
    )
