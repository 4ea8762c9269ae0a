"""The benchmarks: what they refuse, what they write, and that they compare the same problem."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks import __main__ as command
from benchmarks import _timing, speed
from benchmarks.speed import _competitors, _problems
from regjax import curvature


def _case(**changes):
    case = _timing.Case(
        candidates={"one": lambda: jnp.float32(1), "two": lambda: jnp.float32(2)},
        error=lambda label, answer: abs(float(answer) - {"one": 1, "two": 2}[label]),
        tolerance=1e-3,
        sizes={"parameters": 7},
        facts=lambda answers, seconds: {"sum": answers["one"] + answers["two"]},
        bars={"two": 1e9, "sum": 2.5},
    )
    return case._replace(**changes)


@pytest.mark.parametrize("wrong", [2.1, np.nan])
def test_refuses_to_time_a_wrong_answer(wrong):
    calls = []

    def two():
        calls.append("two")
        return jnp.float32(wrong)

    with pytest.raises(_timing.WrongAnswer, match=r"name: two is off by .*, allowed 0.001"):
        _timing.measure("name", _case(candidates={"one": lambda: jnp.float32(1), "two": two}))
    assert calls == ["two"]  # checked, not timed


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(_timing, "_MIN_SAMPLE_S", 0.0)
    calls = []

    def run(label):
        calls.append(label)
        return 0.0

    candidates = {"a": lambda: run("a"), "b": lambda: run("b")}
    case = _case(candidates=candidates, error=lambda label, answer: answer, facts=None)
    result = _timing.measure("name", case, budget=0.0, min_rounds=3)
    assert calls == ["a", "b"] * 5  # the check, the warm-up, three rounds
    assert result.rounds == 3


def test_ratios_are_formed_within_the_rounds(monkeypatch):
    # A machine that slows down from round to round: each b takes twice the a beside it.
    check_and_warm_up, rounds = [1, 2, 1, 2], [1, 2, 10, 20, 100, 200]
    durations = iter([*check_and_warm_up, *rounds])
    monkeypatch.setattr(_timing, "_timed", lambda run: (float(next(durations)), run()))
    result = _timing.measure("name", _case(), budget=0.0, min_rounds=3)
    assert result.ratios["two"] == (2.0, 2.0, 2.0)
    assert result.seconds["two"].median == 20.0
    assert result.seconds["two"].high > 100


def test_json_line_says_what_was_measured_and_where():
    result = _timing.measure("name", _case(), budget=0.0, min_rounds=2)
    line = _timing.json_line(result)
    assert "\n" not in line
    record = json.loads(line)
    assert record["case"] == "name"
    assert record["sizes"] == {"parameters": 7}
    assert set(record["seconds"]) == set(record["ratios"]) == set(record["first_call"])
    assert set(record["seconds"]["two"]) == {"median", "low", "high"}
    assert record["ratios"]["one"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert record["facts"] == {"sum": 3.0}
    assert record["backend"] == "cpu"
    assert record["versions"]["jax"] == jax.__version__
    assert {"device", "cores", "date", "errors", "bars", "rounds"} <= set(record)
    summary = _timing.summary(result)
    assert "(<= 1e+09)" in summary  # the ratio of two
    assert "sum: 3 (MISSES 2.5)" in summary


_BENCH = """
import jax.numpy as jnp
from benchmarks._timing import Case

def _case(answer):
    return Case({"only": lambda: jnp.float32(answer)}, lambda _, a: abs(float(a) - 1), 1e-3)

def cases(preset):
    return {"right": lambda: _case(1), "wrong": lambda: _case(2)}
"""


@pytest.fixture
def fake_bench(tmp_path, monkeypatch):
    (tmp_path / "bench_fake.py").write_text(_BENCH)
    monkeypatch.setattr(speed, "__path__", [str(tmp_path)])
    importlib.invalidate_caches()


def test_command_writes_one_line_a_case_and_reports_refusals(fake_bench, tmp_path, capsys):
    arguments = ["speed", "--preset", "smoke", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    assert command.main([*arguments, "--only", "right"]) == 0
    lines = (tmp_path / "out" / "speed_smoke.jsonl").read_text().splitlines()
    assert [json.loads(line)["case"] for line in lines] == ["fake/right"]  # replaced, not doubled
    printed = capsys.readouterr()
    assert printed.out.startswith("fake/right")
    assert printed.err == "REFUSED fake/wrong: only is off by 1, allowed 0.001.\n"


def test_smoke_writes_nowhere_by_itself(fake_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_RESULTS", tmp_path / "results")
    assert command.main(["speed", "--only", "right"]) == 0
    assert not (tmp_path / "results").exists()


def test_command_line_errors_end_with_status_two(fake_bench, capsys):
    assert command.main(["speed", "--only", "absent"]) == 2
    assert "must be part of one of ['fake/right', 'fake/wrong']" in capsys.readouterr().err
    assert command.main(["speed", "--preset", "gpu"]) == 2
    assert "must be smoke or cpu without an accelerator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "count"), [("mlp", 269_322), ("resnet", 150_810), ("small_mlp", 3_466)]
)
def test_networks_have_the_sizes_that_the_figures_are_quoted_for(name, count):
    model, _ = _problems.network(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == count


def _trained(folder):
    """Training steps are optax's, which promotes dtypes."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(_problems, "_CACHE", folder)
        return _problems.trained("small_mlp", 256, num_steps=100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def problem(cache):
    return _trained(cache)


@pytest.fixture(scope="module")
def reference(problem):
    """The two largest eigenvalues, by residual norms right to 1e-5 of the largest."""
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    pairs = curvature.top_eigenpairs(operator, 2, key=jax.random.key(3), tol=1e-5)
    assert pairs.complete
    return np.asarray(pairs.values, np.float64)


def test_training_is_deterministic_and_remembered(problem, cache, tmp_path):
    expected = ravel_pytree(problem.params)[0]
    assert len(list(cache.iterdir())) == 1
    for other in (_trained(cache), _trained(tmp_path)):
        np.testing.assert_array_equal(ravel_pytree(other.params)[0], expected)
    model, _ = _problems.network("small_mlp")
    logits, _ = model.apply(problem.params, model.state, problem.x, train=False)
    assert jnp.mean(logits.argmax(1) == problem.y) > 0.5  # chance is 0.1


def test_weights_in_the_cache_are_the_ones_that_are_used(problem, cache, tmp_path):
    (file,) = cache.iterdir()
    leaves = [np.full(leaf.shape, 7, leaf.dtype) for leaf in jax.tree.leaves(problem.params)]
    np.savez(tmp_path / file.name, *leaves)
    assert bool(jnp.all(ravel_pytree(_trained(tmp_path).params)[0] == 7))


def test_fewest_steps_is_the_smallest_number_that_works(problem, reference, monkeypatch):
    monkeypatch.setattr(_competitors, "_NUM_STARTS", 1)
    monkeypatch.setattr(_competitors, "_MAX_STEPS", 20)
    batch = problem.x, problem.y
    fewest = _competitors.fewest_steps(problem, batch, reference)

    operator = curvature.hessian(problem.loss_fn, problem.params, *batch)
    flat, unravel = ravel_pytree(problem.params)
    start = unravel(jax.random.normal(jax.random.key(0), flat.shape))
    for steps, good in ((fewest, True), (fewest - 1, False)):
        result = curvature.lanczos(operator, start, steps)
        off = np.diag(np.asarray(result.betas), 1)
        values = np.linalg.eigvalsh(np.diag(np.asarray(result.alphas)) + off + off.T)[-2:]
        assert (_competitors.relative_error(values, reference) <= 1e-3) == good


def test_missing_tools_are_named_and_skipped(monkeypatch, capsys):
    monkeypatch.setattr(_competitors.importlib.util, "find_spec", lambda name: None)
    assert _competitors.candidates(None, None, 10, np.ones(10)) == {}
    printed = capsys.readouterr().out
    assert "matfree: skipped, matfree not installed" in printed
    assert "PyHessian: skipped, torch and pyhessian not installed" in printed


def test_relative_error_is_of_each_eigenvalue():
    reference = np.array([100.0, 1.0])
    assert _competitors.relative_error([1.01, 100.0], reference) == pytest.approx(0.01)


def test_torch_copy_has_the_same_loss(problem):
    pytest.importorskip("torch")
    batch = problem.x, problem.y
    model, *_ = _competitors.torch_copy(problem, batch)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_466
    other = problem._replace(params=jax.tree.map(lambda leaf: 1.1 * leaf, problem.params))
    mismatched = other._replace(loss_fn=lambda params, x, y: problem.loss_fn(problem.params, x, y))
    with pytest.raises(_timing.WrongAnswer, match="the loss in PyTorch"):
        _competitors.torch_copy(mismatched, batch)


@pytest.mark.filterwarnings("default")  # other people's code
@pytest.mark.usefixtures("default_promotion")
def test_every_installed_tool_finds_the_same_eigenvalues(problem, reference):
    tools = _competitors.candidates(problem, (problem.x, problem.y), 2, reference)
    if not tools:
        pytest.skip("no other tool is installed")
    errors = {
        name: _competitors.relative_error(solve(), reference) for name, solve in tools.items()
    }
    # The settings were chosen on the large network; here they must only be the same problem.
    assert max(errors.values()) < 1e-2, errors
