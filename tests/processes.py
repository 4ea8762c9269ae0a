"""Starts processes of a module that find each other, as a cluster does."""

import os
import socket
import subprocess
import sys


def run(module, *arguments, num_processes=1):
    """What each of them prints, errors included.

    Each gets the arguments, then the number of processes, its own number and a free port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # NPROC: fake CPU devices deadlock with fewer threads.
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, (*arguments, num_processes, index, port))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(num_processes)
    ]
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def selected(request, argument):
    """What the tests that are to run are given as this argument; for a process that serves all."""
    items = [item for item in request.session.items if item.path == request.path]
    given = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return [params[argument] for params in given if argument in params]


def start(code, *arguments):
    """A process that runs some lines of Python, its output a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
