import dataclasses
import json
import signal
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax.experiments import (
    SpectrumSettings,
    UsageError,
    _analysis,
    _compare,
    _inputs,
    _network,
    _numbers,
    _report,
    _table,
    _training,
    run_compare,
    run_spectrum,
    run_train,
)
from tests import oracles
from tests.experiments.test_training import make_dataset, silent

pytestmark = pytest.mark.usefixtures("small_data")


def make_settings(tmp_path, **options):
    """3 classes from 4 x 4 pixels with 2 hidden units: 43 parameters."""
    small = {"width": 2, "depth": 1, "batch_size": 5, "epochs": 2, "num_steps": 10}
    few = {"num_eigenvalues": 3, "tol": 1e-6, "out": tmp_path / "run"}
    return SpectrumSettings(**{**small, **few, **options})


def problem_of(settings):
    """Model, inputs and targets of a finished run."""
    dataset = make_dataset()
    model = _network.build_model(settings, dataset)
    state, _ = _training.restore(settings.out / "checkpoint.npz", settings, dataset, model)
    images = dataset.train_inputs / 255
    inputs = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
    statistics = jax.tree.map(jnp.asarray, state.weights.model_state)
    model = model._replace(params=state.weights.params, state=statistics)
    return model, inputs, jnp.asarray(dataset.train_targets)


def dense_matrix(settings):
    """The matrix of the options by plain autodiff."""
    model, inputs, targets = problem_of(settings)
    function = regjax.model_function(model)

    def loss_fn(params, inputs, targets):
        return oracles.cross_entropy(function(params, inputs), targets)

    if settings.matrix == "hessian":
        return oracles.dense_hessian(loss_fn, model.params, inputs, targets)
    jacobian = oracles.dense_jacobian(function, model.params, inputs)
    probabilities = np.asarray(jax.nn.softmax(function(model.params, inputs)))
    if settings.matrix == "empirical_fisher":
        errors = probabilities - np.eye(3)[np.asarray(targets)]
        middle = np.einsum("ni,nj->nij", errors, errors)
    else:
        diagonal = np.einsum("ni,ij->nij", probabilities, np.eye(3))
        middle = diagonal - np.einsum("ni,nj->nij", probabilities, probabilities)
    return np.einsum("nia,nij,njb->ab", jacobian, middle, jacobian) / len(inputs)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("chunk_size", [7, 2048])
def test_numbers_match_the_dense_matrix(matrix, chunk_size, tmp_path):
    settings = make_settings(tmp_path, matrix=matrix, chunk_size=chunk_size)
    record = run_spectrum(settings, silent)
    exact = np.linalg.eigvalsh(dense_matrix(settings))[::-1]
    block = record["blocks"]["network"]
    values, bounds = (np.array(block["eigenvalues"][n]) for n in ("values", "residual_norms"))
    assert all(block["eigenvalues"]["converged"])
    assert np.all(np.abs(values - exact[:3]) <= bounds + 1e-5 * exact[0])
    density, size = block["density"], record["num_parameters"]
    assert size == len(exact) == 43
    assert _within(density["trace"], exact.sum(), 1e-5 * exact[0])
    dimension = np.sum(np.maximum(exact, 0) / (np.maximum(exact, 0) + 0.01))
    assert _within(density["effective_dimension"], dimension, 0.02)
    counts = density["counts"]
    assert counts["outlier_threshold"] == pytest.approx(0.1 * exact[0], rel=1e-4)
    names = ("outliers", "bulk", "near_zero", "negative")
    assert sum(counts[name]["value"] for name in names) == pytest.approx(size, rel=1e-4)
    assert exact[-1] <= density["smallest_ritz_value"] + 1e-5 * exact[0]


def _within(estimate, exact, slack):
    return abs(estimate["value"] - exact) <= 5 * estimate["standard_error"] + slack


def test_double_precision_reaches_the_curvature(tmp_path, default_promotion):
    settings = make_settings(tmp_path, dtype="float64", tol=1e-12)
    bounds = run_spectrum(settings, silent)["blocks"]["network"]["eigenvalues"]["residual_norms"]
    assert max(bounds) < 1e-10
    assert not jax.config.jax_enable_x64


def test_drawn_fisher_differs_from_the_exact_one(tmp_path):
    exact = run_spectrum(make_settings(tmp_path / "exact", matrix="fisher"), silent)
    drawn = run_spectrum(make_settings(tmp_path / "drawn", matrix="fisher", num_samples=1), silent)
    first, second = (r["blocks"]["network"]["eigenvalues"]["values"][0] for r in (exact, drawn))
    assert 0.01 < abs(first - second) / first < 0.9


def test_layers_are_principal_submatrices(tmp_path):
    settings = make_settings(tmp_path, blocks="layers")
    blocks = run_spectrum(settings, silent)["blocks"]
    matrix = dense_matrix(settings)
    # The leaves of "head" (2 x 3 + 3) come before those of "layer_0" (16 x 2 + 2).
    for name, part in {"head": slice(0, 9), "layer_0": slice(9, 43)}.items():
        exact = np.linalg.eigvalsh(matrix[part, part])[::-1]
        np.testing.assert_allclose(
            blocks[name]["eigenvalues"]["values"], exact[:3], atol=1e-5 * exact[0]
        )
    assert list(blocks) == ["network", "layer_0", "head"]


def test_layers_stand_in_the_order_of_the_network():
    names = ["stem", *(f"block_{i}" for i in range(12)), "head"]
    assert sorted(sorted(names), key=_analysis._place) == names


def test_record_is_on_disk_with_all_that_identifies_it(tmp_path):
    settings = make_settings(tmp_path)
    record = run_spectrum(settings, silent)
    stored = json.loads((settings.out / "spectrum.json").read_text())
    assert stored["blocks"] == record["blocks"]
    assert stored["data"]["sha256"] == make_dataset().sha256
    assert stored["versions"]["jax"] == jax.__version__
    assert stored["settings"]["learning_rate"] == 0.05
    assert stored["generalization"]["loss_gap"] == pytest.approx(
        stored["generalization"]["test_loss"] - stored["generalization"]["train_loss"]
    )
    assert (settings.out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in settings.out.iterdir()} == {
        "checkpoint.npz",
        "spectrum.json",
        "spectrum.png",
        "report.html",
    }


def test_checkpoint_gives_the_spectrum_of_the_run(tmp_path):
    settings = make_settings(tmp_path)
    first = run_spectrum(settings, silent)
    run_train(dataclasses.replace(settings, out=tmp_path / "trained"), silent)
    again = dataclasses.replace(settings, checkpoint=tmp_path / "trained", out=None)
    second = run_spectrum(again, silent)
    for name in ("values", "residual_norms"):
        assert (
            second["blocks"]["network"]["eigenvalues"][name]
            == (first["blocks"]["network"]["eigenvalues"][name])
        )
    assert second["training"]["losses"] == first["training"]["losses"]
    assert (tmp_path / "trained" / "spectrum.json").exists()


@pytest.mark.parametrize(("stage", "count"), [("eigenvalues", 2), ("density", 14)])
def test_interrupted_stage_leaves_what_was_computed(stage, count, tmp_path):
    def interrupt(now, done, total):
        del total
        if (now, done) == (stage, count):
            signal.raise_signal(signal.SIGINT)

    settings = make_settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_spectrum(settings, interrupt)
    block = json.loads((settings.out / "spectrum.json").read_text())["blocks"]["network"]
    assert block[stage]["interrupted"]
    assert block[stage]["num_matvecs"] == count
    assert ("density" in block) == (stage == "density")
    if stage == "density":
        assert all(block["eigenvalues"]["converged"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_eigenvalues": 44}, "--num-eigenvalues must be at most .* parameters, 43, got 44"),
        ({"num_steps": 44}, "--num-steps must be at most .* parameters, 43, got 44"),
        ({"curvature_examples": 24}, "--curvature-examples must be at most .* 23, got 24"),
        ({"tol": float("nan")}, "--tol must be at least 0 and below 1, got nan"),
        ({"momentum": 1.0}, "--momentum must be below 1, got 1.0"),
        (
            {"depth": 0, "model": "convnet"},
            "--depth must be at least 1 with --model convnet, got 0",
        ),
        (
            {"normalization": "batch", "batch_norm_mode": "train", "chunk_size": 22},
            "--chunk-size must be at least the number of examples, 23",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text, tmp_path):
    with pytest.raises(UsageError, match=text):
        run_spectrum(make_settings(tmp_path, **options), silent)


def test_modes_of_batch_norm_give_different_matrices(tmp_path):
    largest = {}
    for mode, size in {"evaluation": 7, "train": 23, "train_per_chunk": 7}.items():
        settings = make_settings(
            tmp_path / mode, normalization="batch", batch_norm_mode=mode, chunk_size=size
        )
        record = run_spectrum(settings, silent)
        largest[mode] = record["blocks"]["network"]["eigenvalues"]["values"][0]
    assert len({round(value, 3) for value in largest.values()}) == 3


def test_loss_that_couples_examples_is_refused(tmp_path, monkeypatch):
    def summed(outputs, targets):
        return _inputs.cross_entropy(outputs, targets) * len(targets)

    monkeypatch.setattr(_analysis, "cross_entropy", summed)
    with pytest.raises(UsageError, match="mean over the examples"):
        run_spectrum(make_settings(tmp_path), silent)
    # What came before is on disk.
    assert (tmp_path / "run" / "checkpoint.npz").exists()
    assert json.loads((tmp_path / "run" / "spectrum.json").read_text())["generalization"]


def test_a_network_that_fits_its_data_is_not_refused_for_the_rounding_of_its_loss(monkeypatch):
    """Rounding depends on the number of examples; at a loss of 1e-5 it is a thousandth of it."""

    def rounded(outputs, targets):
        return _inputs.cross_entropy(outputs, targets) + 1e-7 * (len(targets) % 7)

    dataset, settings = make_dataset(num_train=64), SpectrumSettings(depth=0)
    targets = jnp.asarray(dataset.train_targets)
    inputs = jnp.zeros((64, 4, 4, 1)).at[jnp.arange(64), 0, targets, 0].set(1)
    head = {"kernel": 11 * jnp.eye(16, 3), "bias": jnp.zeros(3)}
    model = _network.build_model(settings, dataset)._replace(params={"head": head})
    loss = regjax.model_loss(model, rounded)
    assert 1e-5 < loss(model.params, inputs, targets) < 1e-4
    monkeypatch.setattr(_analysis, "cross_entropy", rounded)
    _analysis.check_examples(model, settings, inputs, targets)


def test_comparison_runs_each_item_in_its_folder(tmp_path):
    settings = make_settings(tmp_path, compare=("sgd", "normalization=batch,epochs=1"))
    results = run_compare(settings, silent)
    records = _compare.first_seeds(results)
    assert list(records) == list(results) == list(settings.compare)
    assert [r["training"]["num_epochs"] for r in records.values()] == [2, 1]
    assert [r["settings"]["normalization"] for r in records.values()] == ["none", "batch"]
    assert (settings.out / "sgd" / "spectrum.json").exists()
    assert set(json.loads((settings.out / "spectrum_compare.json").read_text())) == set(records)
    assert (settings.out / "spectrum_compare.png").read_bytes().startswith(b"\x89PNG")
    text = _table.text(_report.comparison_contents(records))
    assert "All of this is one seed" in text
    assert "normalization=batch,epochs=1" in text.splitlines()[0]
    assert f"{records['sgd']['generalization']['test_loss']:.4f}" in text


def test_items_trained_alike_are_trained_once(tmp_path):
    items = _compare.compared_settings(
        make_settings(tmp_path, compare=("hessian", "gauss_newton", "adam"))
    )
    assert items["hessian"].checkpoint is None
    assert items["gauss_newton"].checkpoint == tmp_path / "run" / "hessian" / "checkpoint.npz"
    assert items["adam"].checkpoint is None


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("adam", {"optimizer": "adam"}),
        ("batch", {"normalization": "batch"}),
        ("convnet,layer", {"model": "convnet", "normalization": "layer"}),
        ("layers", {"blocks": "layers"}),
        ("plain", {"transformation": "plain"}),
        ("learning_rate=0.5", {"learning_rate": 0.5}),
        ("learning-rate=1e-3, seed=3", {"learning_rate": 1e-3, "seed": 3}),
        ("width=None", {"width": None}),
        ("normalization=none", {"normalization": "none"}),
        ("data=mnist", {"data": "mnist"}),
    ],
)
def test_items_set_the_options_they_name(item, expected, tmp_path):
    settings = make_settings(tmp_path, compare=(item,), normalization="group")
    (own,) = _compare.compared_settings(settings).values()
    expected = {**expected, "compare": (), "out": own.out}
    assert own == dataclasses.replace(settings, **expected)
    assert own.out.parent == settings.out


@pytest.mark.parametrize(
    ("items", "text"),
    [
        (["sdg"], r"OPTION=VALUE or a word that is the value of one, got 'sdg' \(did you mean sgd"),
        (["train"], "--batch-norm-mode needs a --normalization with batch statistics, .*'train'"),
        (["colour=red"], "must name options, got 'colour'"),
        (["out=elsewhere"], "must name options, got 'out'"),
        (["seeds=2"], "must name options, got 'seeds'"),
        (["overwrite=True"], "must name options, got 'overwrite'"),
        (["optimizer=adm"], "--optimizer must be one of sgd, adam, got 'adm' in --compare"),
        (["seed=x"], "--seed must be an integer, got 'x'"),
        (["learning_rate=x"], "--learning-rate must be a number, got 'x'"),
        (["learning_rate=-1"], "--learning-rate must be above 0, got -1.0"),
        (["sgd", "sgd"], "different settings, got 'sgd' twice"),
        (["sgd", "sgd,"], "got ''"),
    ],
)
def test_items_that_cannot_be_read_are_refused(items, text, tmp_path):
    settings = make_settings(tmp_path, compare=tuple(items))
    with pytest.raises(UsageError, match=text):
        _compare.compared_settings(settings)


def test_word_of_two_options_is_refused(tmp_path, monkeypatch):
    types = {"normalization": Literal["none"], "transformation": Literal["plain", "none"]}
    monkeypatch.setattr(_compare, "option_types", lambda kind: types)
    with pytest.raises(UsageError, match="normalization=none or transformation=none, got 'none'"):
        _compare.compared_settings(make_settings(tmp_path, compare=("none",)))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.34900774, 3.3e-7, "0.34901 ± 2.6e-06"),  # what five digits leave out
        (float("nan"), 0.1, "nan ± 0.1"),
        (2.0, float("inf"), "2 ± inf"),
        (2.61234, 0.046, "2.612 ± 0.046"),
        (428.4, 19.2, "428 ± 19"),
        (11.0, 0.0, "11 ± 0"),
        (0.0, 0.5, "0 ± 0.5"),
        (0.002, 0.5, "0.002 ± 0.5"),
        (8e-23, 0.79, "0 ± 0.79"),
        (None, None, "not known"),
    ],
)
def test_numbers_are_printed_to_their_error(value, error, text):
    assert _numbers.with_error(value, error) == text
