"""Metadata that somebody made up: one clear error, and nothing in them is followed."""

import jax
import pytest

from regjax import CheckpointError, _files
from regjax.__main__ import main
from regjax.experiments import TrainSettings, _checkpoint, _settings, _training

SETTINGS = _settings.training_options(TrainSettings(transformation="sam"))
METADATA = {
    "settings": SETTINGS,
    "losses": [0.5],
    "data_sha256": "0" * 64,
    "weights_sha256": {"0": "1" * 64, "1": "2" * 64},
    "input_shape": [8, 8, 1],
    "num_classes": 10,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.npz"


def write(path, metadata):
    _files.save(path, {"a": 1}, metadata=metadata)


def test_what_is_right_is_read(path):
    write(path, METADATA)
    assert _training.read_run(path) == (SETTINGS, [0.5], "0" * 64)
    assert _checkpoint.read_shape(path) == ((8, 8, 1), 10)
    assert _training.read_marks(path) == {0: "1" * 64, 1: "2" * 64}


@pytest.mark.parametrize("name", list(METADATA))
@pytest.mark.parametrize("value", [None, -1, "text", [], {"a": []}, [[0.5]], {"x": "0" * 64}, [1]])
def test_entries_are_there_and_of_their_kind(name, value, path):
    write(path, {**METADATA, name: value})
    if (name, value) == ("losses", []):
        assert _training.read_run(path)[1] == []
        return
    with pytest.raises(CheckpointError, match="of a training run"):
        _training.read_run(path)
    write(path, {key: entry for key, entry in METADATA.items() if key != name})
    with pytest.raises(CheckpointError, match=f"got one without '{name}'"):
        _training.read_run(path)


@pytest.mark.parametrize("losses", [[float("nan")], [float("inf")], [True], ["0.5"]])
def test_losses_are_finite_numbers(losses, path):
    write(path, {**METADATA, "losses": losses})
    with pytest.raises(CheckpointError, match="something else for 'losses'"):
        _training.read_run(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"out": "/tmp/elsewhere"}, "'out' is no option of training"),
        ({"data_dir": "/etc"}, "'data_dir' is no option"),
        ({"checkpoint": "/dev/zero"}, "'checkpoint' is no option"),
        ({"resume": True}, "'resume' is no option"),
        ({"overwrite": True}, "'overwrite' is no option"),
        ({"__class__": "x"}, "'__class__' is no option"),
        ({"sam": {}}, "'sam' is no option"),
        ({"sam.__class__": 1}, "'sam.__class__' is no option"),
        ({"new\n option" * 99: 1}, "is no option"),
        ({"width": "64"}, "--width cannot be 64"),
        ({"width": True}, "--width cannot be True"),
        ({"width": [1] * 10**4}, r"--width cannot be \[1, 1,"),
        ({"model": "transformer"}, "--model cannot be transformer"),
        ({"model": ["mlp"]}, "--model cannot be"),
        ({"learning_rate": "fast"}, "--learning-rate cannot be fast"),
        ({"gsam.rho": 0.1}, "--gsam.rho does not belong to the others"),
        ({"transformation": "plain"}, "--sam.rho does not belong to the others"),
        ({"init": "gradinit"}, "--gradinit.* is missing"),
    ],
)
def test_only_options_of_training_are_taken_from_a_file(options, text, path):
    write(path, {**METADATA, "settings": {**SETTINGS, **options}})
    with pytest.raises(CheckpointError, match=text) as caught:
        _training.read_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["data", "width", "sam.rho", "epochs"])
def test_options_that_are_missing_are_named(name, path):
    write(path, {**METADATA, "settings": {n: v for n, v in SETTINGS.items() if n != name}})
    with pytest.raises(CheckpointError, match=f"--{name} is missing"):
        _training.read_run(path)


def test_the_command_line_follows_nothing_of_it(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(path, {**METADATA, "settings": {**SETTINGS, "out": str(tmp_path / "elsewhere")}})
    with jax.numpy_dtype_promotion("standard"):
        assert main(["spectrum", "--checkpoint", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'out' is no option of training" in line
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.npz"]


@pytest.mark.parametrize("words", [["spectrum", "--checkpoint"], ["landscape", "--checkpoint"]])
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/tty", "{tmp}/pipe", "{tmp}/none/below"])
def test_endless_files_are_one_line(words, name, tmp_path, capsys):
    import os

    os.mkfifo(tmp_path / "pipe")
    assert main([*words, name.replace("{tmp}", str(tmp_path))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("there is none at" if name.endswith("below") else "must be a checkpoint") in line
