"""Runs of a landscape that are killed before each of their writes, and gone on with.

`python -m tests.experiments.killed_runs FOLDER`, without JAX's threads until there is a child. What
it prints is JSON, a line for each run that was gone on with: the number of files it had written
before it was killed, and the numbers in its record. The first line is of an undisturbed run.
"""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys

from regjax.experiments import (
    LandscapeSettings,
    _figure,
    _landscape_run,
    _spectrum_run,
    run_landscape,
)
from tests.experiments.test_training import make_dataset


def settings_of(folder):
    return LandscapeSettings(
        width=2, depth=1, batch_size=5, epochs=2, points=3, probe_points=2,
        checkpoint_seconds=0, out=folder,
    )  # fmt: skip


def in_child(run):
    """How the process ended that did this."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_killed(settings, num_writes):
    replace, done = os.replace, []

    def counted(*arguments):
        if len(done) == num_writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
        done.append(1)

    os.replace = counted
    run_landscape(settings, lambda *stage: None)


def run_all(whole, others):
    """Tells of the undisturbed run, and of those that are gone on with where they stopped."""
    for num_writes, settings in [(0, whole), *others.items()]:
        resume = (settings.out / "checkpoint.npz").exists()
        record = run_landscape(dataclasses.replace(settings, resume=resume), lambda *stage: None)
        numbers = {
            "losses": record["training"]["losses"],
            "probes": record["probes"],
            "files": sorted(os.listdir(settings.out)),
        }
        print(json.dumps([num_writes, numbers]), flush=True)


def main(folder):
    _spectrum_run.load = lambda name, **options: make_dataset()
    # What comes after training takes most of the time, and is not gone on with.
    _landscape_run._surface = lambda *arguments: None
    _figure.draw_surface = _figure.draw_probes = lambda *arguments: None
    _landscape_run.write_page = lambda *arguments: None
    # Probe, checkpoint, probe, checkpoint, probe.
    others = {num_writes: settings_of(folder / str(num_writes)) for num_writes in (1, 2, 3, 4)}
    for num_writes, settings in others.items():
        killed = functools.partial(run_killed, settings, num_writes)
        assert in_child(killed) == -signal.SIGKILL
    assert in_child(functools.partial(run_all, settings_of(folder / "whole"), others)) == 0


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
