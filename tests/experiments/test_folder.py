"""What is in a folder of results stays there, and is of one run alone."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from regjax import CheckpointError
from regjax.experiments import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    UsageError,
    _compare,
    _folder,
    _spectrum_run,
    run_compare,
    run_landscape,
    run_spectrum,
    run_train,
)
from tests.experiments.test_training import SMALL, make_dataset, silent

FEW = {"num_eigenvalues": 1, "num_steps": 2, "num_probes": 1}


pytestmark = pytest.mark.usefixtures("small_data", "standard_promotion")


def contents(folder):
    """All files by name, but for times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_settings_that_differ_have_folders_that_differ():
    base = SpectrumSettings()
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"seed": 1},
            {"matrix": "fisher"},
            {"learning_rate": 0.01},
            {"transformation": "sam"},
            {"normalization": "batch"},
            {"num_eigenvalues": 11},
            {"compare": ("sgd", "sam")},
            {"compare": ("sgd", "adam")},
            {"data": "mnist"},
            {"num_train": 100},
        )
    ]
    others += [LandscapeSettings(), LandscapeSettings(compare=("sgd", "sam")), TrainSettings()]
    folders = {_folder.out_dir(settings) for settings in [base, *others]}
    assert len(folders) == len(others) + 1
    assert all(folder.parts[0] == "runs" and len(folder.parts) == 2 for folder in folders)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 60},
        {"resume": True},
        {"overwrite": True},
        {"data_dir": "elsewhere"},
        {"device_bytes": 1},
        {"learning_rate": 0.05},  # what None stands for
        {"width": 64},
    ],
)
def test_what_does_not_decide_the_result_does_not_decide_the_folder(change):
    base = SpectrumSettings()
    assert _folder.out_dir(dataclasses.replace(base, **change)) == _folder.out_dir(base)


def test_names_of_folders_are_short_and_stay_below_runs():
    name = _folder.out_dir(SpectrumSettings(data="../" * 50 + "x", transformation="sam")).name
    assert len(name) < 80
    assert "/" not in name
    readable = SpectrumSettings(transformation="sam", normalization="batch", matrix="fisher")
    assert _folder.out_dir(readable).name.startswith("spectrum-digits-mlp-sam-batch-fisher-")


def test_another_run_is_refused_and_everything_stays(tmp_path):
    out = tmp_path / "run"
    settings = SpectrumSettings(**SMALL, **FEW, out=out)
    run_spectrum(settings, silent)
    before = contents(out)
    landscape = {**SMALL, "points": 3, "probe_points": 2, "out": out}
    for other, text in (
        (dataclasses.replace(settings, seed=1), "checkpoint.npz must stay, .*--seed 0, .* of 1"),
        (dataclasses.replace(settings, matrix="fisher"), "spectrum.json .*--matrix hessian"),
        (dataclasses.replace(settings, epochs=2), "--epochs 1, and this run of 2"),
        (TrainSettings(**{**SMALL, "width": 3}, out=out), "--width 2, and this run of 3"),
        (LandscapeSettings(**{**landscape, "seed": 1}), "--seed 0, and this run of 1"),
        (dataclasses.replace(settings, checkpoint=out, num_steps=3), "--num-steps 2"),
    ):
        run = {"train": run_train, "landscape": run_landscape}.get(
            _folder.command(other), run_spectrum
        )
        with pytest.raises(UsageError, match=f"{text}.*--overwrite"):
            run(other, silent)
        assert contents(out) == before
    # The same once more is the same; another analysis of the network stands beside it.
    run_spectrum(settings, silent)
    run_landscape(LandscapeSettings(**landscape), silent)
    assert contents(out)["checkpoint.npz"] == before["checkpoint.npz"]
    assert (out / "spectrum.json").exists()
    run_spectrum(dataclasses.replace(settings, tol=0.5, overwrite=True), silent)
    assert json.loads((out / "spectrum.json").read_text())["settings"]["tol"] == 0.5


def test_an_interrupted_run_is_not_begun_anew_by_mistake(tmp_path, monkeypatch):
    settings = TrainSettings(**{**SMALL, "epochs": 3}, checkpoint_seconds=0, out=tmp_path)

    def interrupt(stage, done, total):
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train(settings, interrupt)
    with pytest.raises(UsageError, match="it holds 1 of 3 epochs: --resume goes on from it, --out"):
        run_train(settings, silent)
    run_train(dataclasses.replace(settings, resume=True), silent)
    # Other data under the same name.
    other = make_dataset(seed=1)
    monkeypatch.setattr(_spectrum_run, "load", lambda name, **options: other)
    with pytest.raises(UsageError, match="trained on other data"):
        run_train(settings, silent)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("checkpoint.npz", b"mine", "another kind of file. It would be replaced"),
        ("spectrum.json", b"[1]", "got another file. It would be replaced"),
        ("spectrum.json", b"{", "got a damaged one. It would be replaced"),
        ("spectrum.json", b"[" * 10**5, "got a damaged one"),
        ("spectrum.json", b"{}", "does not say which options"),
        ("spectrum.png", b"a picture", "there is no spectrum.json"),
        ("report.html", b"<!doctype html>my thesis", "it is no page of regjax"),
    ],
)
def test_files_of_somebody_else_stay(name, content, text, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=text):
        run_spectrum(SpectrumSettings(**SMALL, **FEW, out=tmp_path), silent)
    assert contents(tmp_path) == {name: content}


def test_comparisons_keep_what_is_not_theirs(tmp_path):
    settings = SpectrumSettings(**SMALL, **FEW, compare=("sgd", "adam"), out=tmp_path)
    run_compare(settings, silent)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"spectrum_compare\.json must stay, .* compares adam as"):
        run_compare(dataclasses.replace(settings, compare=("sgd", "sam")), silent)
    # That the second item is of another matrix is known before the first is computed.
    with pytest.raises(UsageError, match=r"sgd/spectrum\.json .*--matrix hessian"):
        run_compare(dataclasses.replace(settings, matrix="fisher"), silent)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "pipe", "device"])
def test_a_folder_that_is_none_is_found_before_training(kind, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(out)
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("/dev/zero")
    monkeypatch.setattr(_spectrum_run, "load", None)  # comes after it
    for folder in (out, out / "below"):
        text = r"must be a folder, got something else there\. --out names another"
        with pytest.raises(CheckpointError, match=text):
            run_train(TrainSettings(**SMALL, out=folder), silent)


@pytest.mark.parametrize("name", ["checkpoint.npz", "training.json"])
def test_pipes_in_the_folder_stay_and_are_found_before_training(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_spectrum_run, "load", None)  # comes after it
    os.mkfifo(tmp_path / name)
    for overwrite in (False, True):
        settings = TrainSettings(**SMALL, out=tmp_path, overwrite=overwrite)
        with pytest.raises(CheckpointError, match="a file or not be there, got a named pipe"):
            run_train(settings, silent)
    assert (tmp_path / name).is_fifo()


def test_long_items_have_folders_of_their_own(tmp_path):
    numbers = ",".join(f"{name}=1" for name in ("width", "depth", "epochs", "batch-size", "seed"))
    items = tuple(f"{numbers},weight-decay=0.0000000000000000000{digit}" for digit in (1, 2))
    settings = SpectrumSettings(compare=items, out=tmp_path)
    names = [own.out.name for own in _compare.compared_settings(settings).values()]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 100


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    from regjax import _files

    with _files.locked(tmp_path), pytest.raises(CheckpointError, match="one run at a time"):
        run_train(TrainSettings(**SMALL, out=tmp_path), silent)
    assert run_train(TrainSettings(**SMALL, out=tmp_path), silent)


def test_leftovers_of_killed_runs_go_and_other_files_stay(tmp_path):
    (tmp_path / ".checkpoint.npz.0123abcd.tmp").touch()
    (tmp_path / ".checkpoint.npz.mine.tmp").touch()
    run_train(TrainSettings(**SMALL, out=tmp_path), silent)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint.npz", "training.json", "report.html", ".checkpoint.npz.mine.tmp"}


def test_runs_that_are_killed_between_two_writes_go_on_to_the_same_end(tmp_path):
    output = subprocess.run(
        [sys.executable, "-m", "tests.experiments.killed_runs", str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert output.returncode == 0, output.stderr
    (_, whole), *others = map(json.loads, output.stdout.splitlines())
    assert [num_writes for num_writes, _ in others] == [1, 2, 3, 4]
    assert whole["files"] == ["checkpoint.npz", "landscape.json"]
    for num_writes, found in others:
        assert found == whole, num_writes


def test_a_users_own_handler_of_interrupts_is_called(tmp_path):
    """One that does not raise: training goes on."""
    received = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))

    def interrupt(stage, done, total):
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    try:
        record = run_train(TrainSettings(**SMALL, out=tmp_path), interrupt)
        assert signal.getsignal(signal.SIGINT) is not previous
    finally:
        signal.signal(signal.SIGINT, previous)
    assert received == [signal.SIGINT]
    assert record["training"]["num_epochs"] == 1
