"""Curvature of what does not fit: data streamed from disk against the same data in memory."""

import contextlib
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import curvature

_THROUGHPUT = 0.85
_VECTORS = 8


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    # Network, examples, examples a batch.
    streams: tuple[tuple[str, int, int], ...] = (("mlp", 16384, 1024), ("resnet", 512, 128))
    blocks: tuple[tuple[str, int, int], ...] = (("mlp", 4096, 1024),)
    if preset == "smoke":
        streams = blocks = (("small_mlp", 1437, 200),)
    found: dict[str, Callable[[], Case]] = {}
    for kind, build, sizes in (("stream", _stream, streams), ("stream_block", _block, blocks)):
        for name, num_examples, batch_size in sizes:
            found[f"{kind}_{name}_{num_examples}"] = functools.partial(
                build, name, num_examples, batch_size, preset != "smoke"
            )
    return found


def _stream(name: str, num_examples: int, batch_size: int, has_bars: bool) -> Case:
    """A product from disk, read anew or kept by the system, over the same chunks in memory."""
    problem = _of_bytes(name, num_examples)
    batch = problem.x, problem.y
    vector = _random_like(problem.params)
    chunked = curvature.hessian(problem.loss_fn, problem.params, *batch, chunk_size=batch_size)
    oracle = jax.jit(curvature.hvp)(problem.loss_fn, problem.params, vector, *batch)
    from_disk = {
        label: _streamed(problem, _OnDisk(problem, batch_size, forget))
        for label, forget in (("streamed", True), ("streamed, in the system's cache", False))
    }
    operators = {"in memory": chunked, **from_disk}
    bars = dict.fromkeys(from_disk, 1 / _THROUGHPUT)
    return Case(
        candidates={
            label: functools.partial(operator.matvec, vector)
            for label, operator in operators.items()
        },
        error=lambda label, answer: _error(answer, oracle),
        tolerance=1e-4,
        sizes=_sizes(problem, batch_size),
        bars=bars if has_bars else {},
    )


def _block(name: str, num_examples: int, batch_size: int, has_bars: bool) -> Case:
    """Several products from disk in one pass, over as many passes and over those in memory."""
    problem = _of_bytes(name, num_examples)
    vectors = [_random_like(problem.params, seed) for seed in range(_VECTORS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)
    chunked = curvature.hessian(
        problem.loss_fn, problem.params, problem.x, problem.y, chunk_size=batch_size
    )
    streamed = _streamed(problem, _OnDisk(problem, batch_size, True))
    product = jax.jit(curvature.hvp)
    batch = problem.x, problem.y
    oracle = [product(problem.loss_fn, problem.params, vector, *batch) for vector in vectors]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *oracle)

    def error(label: str, answer: Any) -> float:
        if label == "streamed, a pass for each":
            answer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *answer)
        return _error(answer, expected)

    return Case(
        candidates={
            "in memory": lambda: chunked.matmat(stacked),
            "streamed in one pass": lambda: streamed.matmat(stacked),
            "streamed, a pass for each": lambda: [streamed.matvec(vector) for vector in vectors],
        },
        error=error,
        tolerance=1e-4,
        sizes={**_sizes(problem, batch_size), "vectors": _VECTORS},
        bars={"streamed in one pass": 1 / _THROUGHPUT} if has_bars else {},
    )


class _OnDisk:
    """The examples of a problem as two files, memory-mapped anew for each pass.

    Where the system lets it (`forget`), a pass begins with nothing of them in its cache.
    """

    def __init__(self, problem: _problems.Problem, batch_size: int, forget: bool):
        self._folder = tempfile.TemporaryDirectory(prefix="regjax-bench-")
        self._batch_size, self._forget = batch_size, forget
        self._paths = [pathlib.Path(self._folder.name) / f"{name}.npy" for name in ("x", "y")]
        for path, array in zip(self._paths, (problem.x, problem.y), strict=True):
            with path.open("wb") as file:
                np.save(file, np.asarray(array))
                file.flush()
                os.fsync(file.fileno())

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self._forget and hasattr(os, "posix_fadvise"):
            for path in self._paths:
                with path.open("rb") as file, contextlib.suppress(OSError):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        x, y = (np.load(path, mmap_mode="r") for path in self._paths)
        for start in range(0, len(x), self._batch_size):
            part = slice(start, start + self._batch_size)
            yield x[part], y[part]


def _of_bytes(name: str, num_examples: int) -> _problems.Problem:
    """The problem with its images as they are stored; the loss makes numbers of them."""
    problem = _problems.trained(name, num_examples)
    images = jnp.round(problem.x * 255).astype(jnp.uint8)
    return problem._replace(loss_fn=Partial(_byte_loss, problem.loss_fn), x=images)


def _byte_loss(loss_fn: Any, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return loss_fn(params, images.astype(jnp.float32) / 255, labels)


def _streamed(problem: _problems.Problem, source: _OnDisk) -> curvature.Operator:
    return curvature.stream(curvature.hessian, problem.loss_fn, problem.params, source)


def _random_like(params: Any, seed: int = 0) -> Any:
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape))


def _error(answer: Any, expected: Any) -> float:
    """The largest relative error of the vectors (..., n)."""
    flat, reference = (
        np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (answer, expected)
    )
    return float(np.linalg.norm(flat - reference) / np.linalg.norm(reference))


def _sizes(problem: _problems.Problem, batch_size: int) -> dict[str, Any]:
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "examples": len(problem.x),
        "batch": batch_size,
        "MB on disk": round(problem.x.nbytes / 2**20, 1),
        "data": str(problem.x.dtype),
    }
