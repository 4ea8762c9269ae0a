import json
import re

import pytest

from regjax.__main__ import main

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
    printed = float(re.search(r"eigenvalue 1 +(\S+) ± ", out)[1])
    entry = record["blocks"]["network"]["eigenvalues"]
    assert printed == pytest.approx(entry["values"][0], abs=entry["residual_norms"][0])
    assert "trace" in out
    assert str(tmp_path) in out
    assert (tmp_path / "spectrum.png").exists()


def test_checkpoint_brings_its_options(trained, capsys):
    words = ["spectrum", "--checkpoint", trained / "checkpoint.npz", *_FEW]
    status, out, errors = run(capsys, *words, "--width", "4", "--matrix", "gauss_newton")
    assert (status, errors) == (0, [])
    assert "330 parameters" in out
    assert json.loads((trained / "spectrum.json").read_text())["settings"]["num_train"] == 200


def test_resume_brings_its_options_and_goes_on(trained, capsys):
    status, out, errors = run(capsys, "train", "--resume", "--out", trained, "--epochs", "3")
    assert (status, errors) == (0, [])
    assert "330 parameters" in out
    assert "3 epochs" in out


@pytest.mark.parametrize("words", [["--help"], ["spectrum", "--help"], ["train", "-h"]])
def test_help_names_the_options(words, capsys):
    status, out, errors = run(capsys, *words)
    assert (status, errors) == (0, [])
    assert ("--batch-size" in out) == (len(words) == 2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Expected one of {spectrum, landscape, train}"),
        (["spektrum"], "spektrum"),
        (["spectrum", "--model", "transformer"], "'mlp', 'convnet', 'resnet'"),
        (["spectrum", "--widht", "3"], "--widht"),
        (["spectrum", "--width", "wide"], "--width"),
        (["spectrum", "--tol", "-1"], "--tol must be at least 0, got -1.0"),
        (["spectrum", "--data", "nonsense"], "digits, fashion_mnist, mnist"),
        (["spectrum", "--data", "mnist", "--data-dir", "{tmp}"], "{tmp}"),
        (["spectrum", "--num-train", "99999"], "99999"),
        (["spectrum", "--checkpoint", "{tmp}/nothing.npz"], "{tmp}/nothing.npz"),
        (["spectrum", "--resume", "--out", "{tmp}"], "{tmp}/checkpoint.npz"),
        (["spectrum", "--compare", "sgd", "adm"], "'adm'"),
        (["spectrum", "--compare", "sgd,seed=x"], "--seed must be an integer"),
        (["train", "--compare", "sgd"], "--compare"),
        (["spectrum", "--out", "{tmp}/file/folder", *_FAST], "{tmp}/file"),
        (["train", "--batch-size", "5000"], "--batch-size must be at most"),
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


def test_mistakes_of_ours_keep_their_traceback(monkeypatch, tmp_path):
    from regjax.experiments import _spectrum_run

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(_spectrum_run, "run_train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])
