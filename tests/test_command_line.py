import collections
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import regjax
from regjax.__main__ import main
from regjax.experiments import (
    _help,
    _initializations,
    _options,
    _settings,
    _transformations,
    _words,
)

_FAST = ["--epochs", "1", "--width", "4", "--num-train", "200", "--num-test", "50"]
_FEW = ["--num-eigenvalues", "2", "--num-steps", "5", "--num-probes", "1"]


def run(capsys, *words):
    """Exit status, stdout and the lines of stderr that are no progress bar."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line.strip()]
    return status, captured.out, [line for line in lines if not re.search(r"(it/s|s/it)\]", line)]


@pytest.fixture
def trained(tmp_path, capsys):
    """The folder of a finished training run."""
    status, _, errors = run(capsys, "train", *_FAST, "--out", tmp_path / "trained")
    assert (status, errors) == (0, [])
    return tmp_path / "trained"


def test_spectrum_prints_and_writes_its_results(tmp_path, capsys):
    status, out, errors = run(capsys, "spectrum", *_FAST, *_FEW, "--out", tmp_path)
    assert (status, errors) == (0, [])
    record = json.loads((tmp_path / "spectrum.json").read_text())
    assert f"{record['generalization']['test_accuracy']:.2%}" in out
    printed, bound = map(float, re.search(r"eigenvalue 1 +(\S+) ± (\S+)", out).groups())
    entry = record["blocks"]["network"]["eigenvalues"]
    assert bound >= 0.99 * entry["residual_norms"][0]
    assert printed == pytest.approx(entry["values"][0], abs=bound)
    assert "trace" in out
    assert str(tmp_path) in out
    assert (tmp_path / "spectrum.png").exists()


def test_a_monitor_prints_draws_and_goes_on(tmp_path, capsys):
    words = ["train", *_FAST, "--monitor", "loss,sharpness", "--monitor-examples", "50"]
    status, out, errors = run(capsys, *words, "--out", tmp_path)
    assert (status, errors) == (0, [])
    assert "largest eigenvalue" in out
    assert (tmp_path / "monitor.png").exists()
    rows = (tmp_path / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 3]  # of 200 examples, 64 a step
    # Killed while it wrote the row of a step that is made again.
    (tmp_path / "monitor.jsonl").write_text("\n".join([*rows, rows[1][:9]]))
    words = ["train", "--resume", "--out", tmp_path, "--epochs", "3", "--monitor", "loss,sharpness"]
    status, out, errors = run(capsys, *words, "--monitor-examples", "50", "--monitor-every", "2")
    assert (status, errors) == (0, [])
    again = (tmp_path / "monitor.jsonl").read_text().splitlines()
    assert again[:2] == rows
    assert [json.loads(row)["step"] for row in again] == [0, 3, 6]
    record = json.loads((tmp_path / "training.json").read_text())
    assert [row["step"] for row in record["monitor"]] == [0, 3, 6]


@pytest.mark.slow
def test_monitors_of_several_seeds_are_averaged(tmp_path, capsys):
    words = ["train", *_FAST, "--monitor", "noise", "--monitor-examples", "60", "--seeds", "2"]
    status, out, errors = run(capsys, *words, "--out", tmp_path)
    assert (status, errors) == (0, [])
    assert "noise scale, monitor" in out
    assert (tmp_path / "monitor_compare.png").exists()


def test_checkpoint_brings_its_options(trained, capsys):
    words = ["spectrum", "--checkpoint", trained / "checkpoint.npz", *_FEW]
    status, out, errors = run(capsys, *words, "--width", "4", "--matrix", "gauss_newton")
    assert (status, errors) == (0, [])
    assert "330 parameters" in out
    assert "1 epoch before; read from" in " ".join(out.split())
    assert "nothing was trained" in " ".join(out.split())
    assert json.loads((trained / "spectrum.json").read_text())["settings"]["num_train"] == 200


def test_resume_brings_its_options_and_goes_on(trained, capsys):
    status, out, errors = run(capsys, "train", "--resume", "--out", trained, "--epochs", "3")
    assert (status, errors) == (0, [])
    assert "330 parameters" in out
    assert "3 epochs, resumed for" in " ".join(out.split())


@pytest.mark.parametrize("words", [["--help"], ["spectrum", "--help"], ["train", "-h"]])
def test_help_names_the_options(words, capsys):
    status, out, errors = run(capsys, *words)
    assert (status, errors) == (0, [])
    assert ("--batch-size" in out) == (len(words) == 2)
    assert "examples:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_shows_the_options_of_chosen_methods_only(capsys):
    _, plain, _ = run(capsys, "spectrum", "--help")
    _, chosen, _ = run(capsys, "spectrum", "--transformation", "sam", "--help")
    assert "--sam.rho" not in plain
    assert "--sam.rho FLOAT" in chosen
    assert "--gsam.rho" not in chosen
    assert "[sam]" in chosen


@pytest.mark.parametrize("command", _words.COMMANDS)
def test_help_lists_each_option_once_under_a_group(command, monkeypatch, capsys):
    """With all methods chosen, one after the other."""
    listed = collections.Counter()
    for settings in _with_each_method(_words.COMMANDS[command]):
        text = _help.command_help(command, settings)
        listed |= collections.Counter(re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE))
        titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
        assert titles[:3] == ["data", "model", "training"]
    names = {_options.option(name) for name in _settings.option_types(_words.COMMANDS[command])}
    found = {flag.replace(".no-", ".") for flag in listed} - {"--version"}
    assert found == names
    assert set(listed.values()) == {1}


def _with_each_method(settings_type):
    for name in _transformations.TRANSFORMATIONS:
        yield settings_type(transformation=name)
    for name in _initializations.INITIALIZATIONS:
        yield settings_type(init=name)


def test_version_names_the_packages(capsys):
    status, out, errors = run(capsys, "--version")
    assert (status, errors) == (0, [])
    assert f"regjax {regjax.__version__}" in out
    assert "jax 0." in out


def test_the_entry_point_is_main():
    pyproject = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())
    module, _, name = pyproject["project"]["scripts"]["regjax"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "must be a command, spectrum, landscape, train, got none"),
        (["spektrum"], "'spektrum' (did you mean spectrum?)"),
        (["--width", "3", "spectrum"], "must be a command"),
        (["spectrum", "--model", "transformer"], "one of mlp, convnet, resnet, got 'transformer'"),
        (["spectrum", "--model", "convnt"], "(did you mean convnet?)"),
        (["spectrum", "--widht", "3"], "no option --widht (did you mean --width?)"),
        (["spectrum", "--transform", "sam"], "(did you mean --transformation?)"),
        (["spectrum", "--lr", "1"], "(did you mean --learning-rate?)"),
        (["spectrum", "--rho", "1"], "(did you mean --sam.rho or --gsam.rho?)"),
        (["spectrum", "--fisher-samples", "1"], "--num-samples"),
        (["spectrum", "-width", "3"], "(did you mean --width?)"),
        (["spectrum", "--points", "5"], "--points is an option of landscape, not of spectrum"),
        (["train", "--tol", "0"], "--tol is an option of spectrum, not of train"),
        (["spectrum", "--width", "wide"], "--width must be an integer, got 'wide'"),
        (["spectrum", "--width=wide"], "--width must be an integer, got 'wide'"),
        (["spectrum", "--width"], "--width must be an integer, got no value"),
        (["spectrum", "--tol", "small"], "--tol must be a number, got 'small'"),
        (["spectrum", "--resume", "yes"], "'yes' must be an option or the value of one"),
        (["spectrum", "--seed", "0", "--seed=1"], "--seed must be given once, got it twice"),
        (["spectrum", "--resume", "--no-resume"], "--resume must be given once"),
        (["spectrum", "--sam.rho", "0.5"], "--sam.rho needs --transformation sam"),
        (["spectrum", "--gradinit.clip", "1"], "--gradinit.clip needs --init gradinit"),
        (
            ["spectrum", "--transformation", "sam", "--sam.eta", "1"],
            "--sam.eta needs --sam.adaptive",
        ),
        (["train", "--optimizer", "adam", "--momentum", "0.5"], "--momentum needs --optimizer sgd"),
        (["spectrum", "--num-samples", "3"], "--num-samples needs --matrix fisher"),
        (["spectrum", "--batch-norm-mode", "train"], "needs a --normalization with batch stat"),
        (["spectrum", "--data-dir", "{tmp}"], "--data-dir needs other --data than digits"),
        (["spectrum", "--compare"], "--compare must be settings such as sgd or sam,rho=0.1"),
        (["spectrum", "--compare", "--seeds", "3"], "--compare must be settings such as"),
        (["spectrum", "--compare", ""], "--compare must be settings such as"),
        (["spectrum", "--out", ""], "--out must be a path, got ''"),
        (["spectrum", "--out="], "--out must be a path, got ''"),
        (["spectrum", "--compare", "sam,gsam"], "--transformation once in 'sam,gsam', got it tw"),
        (["spectrum", "--compare", "sam,rhoo=1"], "got 'rhoo' (did you mean rho"),
        (["spectrum", "--compare", "sgd,sam.rho=1"], "--sam.rho needs --transformation sam, in"),
        (["spectrum", "--compare", "sgd", "plain"], "'plain' and 'sgd', which are the same"),
        (
            ["spectrum", "--seed", "3", "--compare", "seed=0", "seed=1"],
            "--seed 3 is overridden by every item of --compare",
        ),
        (["spectrum", "--compare", "sgd", "--sam.rho", "1"], "--sam.rho needs --transformation"),
        (["spectrum", "--seed", str(2**32)], "--seed must be at most 4294967295, got 4294967296"),
        (["spectrum", "--seed", str(2**63)], "--seed must be at most 4294967295"),
        (["spectrum", "--depth", "10000000"], "--depth must be at most 100, got 10000000"),
        (["train", "--width", "200000"], "A run must fit into memory"),
        (["train", "--width", str(10**9)], "--width must be at most"),
        (["landscape", "--span", "inf"], "--span must be at most 1000, got inf"),
        (["landscape", "--span", "1e30"], "--span must be at most 1000, got 1e+30"),
        (["landscape", "--points", "1000000001"], "--points must be at most 1001"),
        (["landscape", "--points", "50"], "--points must be odd, got 50"),
        (
            ["train", "--init", "gradinit", "--gradinit.learning-rate", "inf"],
            "--gradinit.learning-rate must be at most 1e+30, got inf",
        ),
        (
            ["train", "--transformation", "sam", "--sam.num-shards", "1000000"],
            "--sam.num-shards must be at most 4096, got 1000000",
        ),
        (
            ["train", "--init", "data_dependent", "--data-dependent.num-examples", "1"],
            "--data-dependent.num-examples must be at least 2, got 1",
        ),
        (["spectrum", "--tol", "2"], "--tol must be below 1, got 2.0"),
        (
            [
                *("spectrum", "--normalization", "batch", "--batch-norm-mode", "train"),
                *("--chunk-size", "64", "--out", "{tmp}"),
            ],
            "--chunk-size must be at least the number of examples, 1497",
        ),
        (["spectrum", "--tol", "-1"], "--tol must be at least 0, got -1.0"),
        (["spectrum", "--data", "nonsense"], "digits, fashion_mnist, mnist"),
        (["spectrum", "--data", "mnist", "--data-dir", "{tmp}"], "{tmp}"),
        (["spectrum", "--num-train", "99999"], "99999"),
        (["spectrum", "--checkpoint", "{tmp}/nothing.npz"], "{tmp}/nothing.npz"),
        (["spectrum", "--resume", "--out", "{tmp}"], "{tmp}/checkpoint.npz"),
        (["spectrum", "--compare", "sgd", "adm"], "'adm'"),
        (["spectrum", "--compare", "sgd,seed=x"], "--seed must be an integer"),
        (["train", "--compare", "sgd", "hessian"], "'hessian'"),
        (["spectrum", "--out", "{tmp}/file/folder", *_FAST], "{tmp}/file"),
        (["train", "--batch-size", "5000", "--out", "{tmp}"], "--batch-size must be at most"),
        (["spectrum", *_FAST, "--num-eigenvalues", "331", "--out", "{tmp}"], "330, got 331"),
        (["train", *_FAST, "--learning-rate", "1e30", "--out", "{tmp}"], "must stay finite"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, text, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    status, out, errors = run(capsys, *words)
    assert status == 2
    assert out == ""
    assert len(errors) == 1
    assert errors[0].startswith("regjax: ")
    assert text.replace("{tmp}", str(tmp_path)) in errors[0]
    # Only what training itself shows comes after it.
    assert (tmp_path / "checkpoint.npz").exists() == ("must stay finite" in text)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--model", "convnet", "--model must be mlp as in the checkpoint"),
        ("--width", "64", "--width must be 4 as in the checkpoint"),
        ("--seed", "1", "--seed must be 0 as in the checkpoint"),
    ],
)
def test_option_against_the_checkpoint_is_refused(option, value, text, trained, capsys):
    status, _, errors = run(capsys, "spectrum", "--checkpoint", trained, option, value)
    assert status == 2
    assert len(errors) == 1
    assert text in errors[0]


def test_damaged_checkpoint_is_refused(trained, capsys):
    path = trained / "checkpoint.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    status, _, errors = run(capsys, "spectrum", "--checkpoint", path, *_FEW)
    assert status == 2
    assert len(errors) == 1
    assert "damaged" in errors[0]


def test_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    from regjax import _files

    _files.save(tmp_path / "other.npz", {"a": 1}, metadata={})
    status, _, errors = run(capsys, "spectrum", "--checkpoint", tmp_path / "other.npz")
    assert status == 2
    assert len(errors) == 1
    assert "of a training run" in errors[0]


def test_interrupt_is_one_line_and_status_130(tmp_path, capsys, monkeypatch):
    from regjax.experiments import _training

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_training.Epochs, "run", interrupt)
    status, out, errors = run(capsys, "train", *_FAST, "--out", tmp_path)
    assert (status, out) == (130, "")
    assert errors == [f"regjax: interrupted; {tmp_path} holds what was computed, --resume goes on."]
    assert (tmp_path / "checkpoint.npz").exists()


def fail_with(monkeypatch, error):
    from regjax.experiments import _spectrum_run

    def fail(*arguments):
        raise error

    monkeypatch.setattr(_spectrum_run, "run_train", fail)


def test_a_fault_of_ours_is_one_line_that_names_its_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    status, out, errors = run(capsys, "train")
    assert (status, out) == (70, "")
    (line,) = errors
    assert line.startswith("regjax: a fault of regjax, ZeroDivisionError: division by zero; ")
    log = pathlib.Path(re.search(r"with the file (.*\.log)\.$", line)[1])
    assert "Traceback" in log.read_text()
    assert "in fail" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError("`spectral_density` must fit. Lower `num_steps`."), "Lower `num_steps`."),
        (MemoryError(), "Out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "9 bytes"),
        (OSError(28, "No space left on device"), "No space left"),
        (regjax.NotFiniteError("`operator` must give finite products"), "finite products"),
    ],
)
def test_what_does_not_fit_or_is_not_finite_is_one_line_and_status_2(
    error, text, monkeypatch, capsys
):
    fail_with(monkeypatch, error)
    status, out, errors = run(capsys, "train")
    assert (status, out) == (2, "")
    assert len(errors) == 1
    assert text in errors[0]


def test_an_argument_that_the_library_refuses_is_the_users(monkeypatch, capsys):
    from regjax.experiments import _spectrum_run

    monkeypatch.setattr(
        _spectrum_run, "run_train", lambda *arguments: regjax.transforms.sam(rho=-1.0)
    )
    status, _, errors = run(capsys, "train")
    assert status == 2
    assert errors == ["regjax: `rho` must be non-negative, got -1.0."]


def test_a_reader_that_stops_reading_is_no_error(monkeypatch):
    def stop(text):
        raise BrokenPipeError

    monkeypatch.setattr("regjax.__main__._show", stop)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which takes no more, and is replaced
    assert main(["--version"]) == 0
    sys.stdout.close()


@pytest.mark.parametrize(
    ("name", "value", "status"), [("JAX_PLATFORMS", "abacus", 2), ("MPLBACKEND", "abacus", 0)]
)
def test_environment(name, value, status, tmp_path):
    words = ["train", "--epochs", "0", "--num-train", "64", "--out", tmp_path]
    command = [sys.executable, "-m", "regjax", *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, name: value}, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("regjax: ")]
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == (status != 0)
    assert all(value in line for line in lines)


def test_a_network_that_learnt_nothing_is_no_success(tmp_path, capsys):
    dead = ["--learning-rate", "5", "--epochs", "2", "--width", "8", "--out", tmp_path]
    status, out, errors = run(capsys, "train", *dead)
    assert (status, errors) == (1, [])
    assert "TRAINING FAILED: the network predicts one class only" in out
    record = json.loads((tmp_path / "training.json").read_text())
    assert "A smaller --learning-rate than 5" in record["training"]["failure"]
