"""Seven runs at once, each with its checkpoint, which `test_checkpoint.py` starts and kills.

Prints "started" when every run has saved its state, then for each run the product with which it
began, a digest of its answer, and that of an undisturbed run. Takes the folder of the checkpoints.
"""

import concurrent.futures
import hashlib
import pathlib
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from regjax import curvature

DIAGONAL = jnp.linspace(0.1, 1, 200) ** 6 * 10
OPERATOR = curvature.from_matvec(Partial(jnp.multiply, DIAGONAL), DIAGONAL)
SECONDS = 0.01
EVERY = 3


def top(key, **options):
    return curvature.top_eigenpairs(OPERATOR, 4, key=key, max_basis=12, tol=1e-6, **options)


def tridiagonal(key, **options):
    start = jax.random.normal(key, DIAGONAL.shape)
    return curvature.lanczos(OPERATOR, start, 70, **options)


def density(key, **options):
    return curvature.spectral_density(
        OPERATOR, key=key, num_steps=15, num_probes=3, deflate=25, **options
    )


SOLVERS = {"top": top, "tridiagonal": tridiagonal, "density": density}
RUNS = {f"{name}-{seed}": (solve, seed) for name, solve in SOLVERS.items() for seed in range(2)}
RUNS["top-2"] = top, 2


def digest(result):
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def main(folder):
    began, saved = {}, set()
    all_saved = threading.Event()

    def run(name):
        solve, seed = RUNS[name]

        def callback(count, total, progress):
            if count > began.setdefault(name, count) + EVERY:
                saved.add(name)
            if len(saved) == len(RUNS):
                all_saved.set()
            time.sleep(SECONDS)

        checkpoint = curvature.Checkpoint(pathlib.Path(folder) / name, every=EVERY)
        result = solve(jax.random.key(seed), callback=callback, checkpoint=checkpoint)
        began.setdefault(name, -1)  # it had finished before
        saved.add(name)
        return digest(result)

    with concurrent.futures.ThreadPoolExecutor(len(RUNS)) as pool:
        answers = {name: pool.submit(run, name) for name in RUNS}
        while not all_saved.wait(0.05) and not all(a.done() for a in answers.values()):
            pass
        print("started", flush=True)
        for name, answer in answers.items():
            solve, seed = RUNS[name]
            undisturbed = solve(jax.random.key(seed))
            print(name, began[name], answer.result(), digest(undisturbed), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
