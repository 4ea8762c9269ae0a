"""The folder of compiled programs: found again, and whatever is in it, no run breaks."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from regjax.experiments import _compiled
from regjax.experiments._options import UsageError

_TRAIN = [
    "--epochs",
    "1",
    "--width",
    "4",
    "--num-train",
    "64",
    "--num-test",
    "50",
    "--checkpoint-seconds",
    "100",
]
_COUNTED = """
import sys, jax
from regjax.__main__ import main
counts = {}
def count(event, **_):
    counts[event] = counts.get(event, 0) + 1
jax.monitoring.register_event_listener(count)
status = main(sys.argv[1:])
print(status, counts.get("/jax/compilation_cache/cache_hits", 0))
"""


def train(tmp_path, out, folder):
    """Exit status and number of programs that were found, of a process of its own."""
    words = ["train", *_TRAIN, "--out", str(tmp_path / out), "--cache-dir", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED, *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "persistent compilation cache" not in done.stderr
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def test_programs_are_found_again_and_damaged_ones_compiled_anew(tmp_path):
    folder = tmp_path / "compiled"
    assert train(tmp_path, "first", folder)[0] == 0
    status, hits = train(tmp_path, "second", folder)
    assert status == 0
    assert hits > 10
    for i, file in enumerate(sorted(folder.iterdir())):
        content = file.read_bytes()
        file.write_bytes([b"", b"no program", content[: len(content) // 2]][i % 3])
    assert train(tmp_path, "third", folder) == [0, 0]
    records = [(tmp_path / name / "checkpoint.npz").stat().st_size for name in ("first", "third")]
    assert records[0] == records[1]


def test_a_folder_that_cannot_be_written_is_an_error_only_if_it_is_given(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="--cache-dir must be a folder that can be written"):
        _compiled.use_cache(str(file))
    before = jax.config.jax_compilation_cache_dir
    assert before is not None  # that of the tests, which stays
    _compiled.use_cache(None)
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.setattr(_compiled, "_usual", lambda: file)
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        _compiled.use_cache(None)
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_usual_folder_is_among_the_caches_of_the_user(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _compiled._usual() == pathlib.Path("/somewhere/regjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _compiled._usual() == pathlib.Path.home() / ".cache" / "regjax"
