"""Long runs survive: the state of a solver on disk every few products, and the way back.

A folder holds a chain of files. Each is the whole state but for rows of bases that did not change
since: for these it names the files before it. Rows are most of a state, and between two files a
basis grows by a few of them; only when it is compressed is it written anew. A file appears under
its name when all of it is on the disk, every byte is under a CRC, and the files of the last two
states are kept. So there is a whole state at any moment, and one to fall back on.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _checks, _files
from regjax._base import Tree
from regjax.curvature._engine import _identity
from regjax.curvature._engine._basis import Basis
from regjax.curvature._engine._solver import Solver, multiply

_PATTERN = "*.products.npz"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a solver keeps its state, so that the same call goes on after the process was killed.

    The answer is that of an undisturbed run, bit for bit, on the same device with the same
    versions. For one process that drives the solver from Python, outside of `jax.jit`.

    Attributes:
      folder: made where it is not there; of one run alone, which deletes what it no longer needs.
        It takes up to twice the memory of the basis. Delete it to start anew.
      every: number of steps (products; rounds of them, where several probes go at once) between
        two files. As many vectors are copied on the device each time.
    """

    folder: str | os.PathLike[str]
    every: int = 10


class Position(NamedTuple):
    """Where a run is.

    Attributes:
      solver: that of the stage.
      state: after so many steps.
      stage: how often a solver has handed over to the next one.
      first: number of steps before this stage.
      steps: number of steps in all.
    """

    solver: Solver[Any, Any]
    state: Tree
    stage: int
    first: int
    steps: int


class Chain:
    """The files of a run; a context that waits for the last of them.

    Args:
      checkpoint: where.
      begin: the run before its first step.

    Raises:
      ValueError: several processes drive the solver.
      CheckpointError: the folder cannot be made.
    """

    def __init__(self, checkpoint: Checkpoint, begin: Position):
        if jax.process_count() > 1:
            raise ValueError(
                "`checkpoint` must be None with several processes: it is written by one."
            )
        self.every = _checks.integer("every", checkpoint.every)
        self.folder = Path(checkpoint.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _files.CheckpointError(
                f"`folder` must be one that can be made, got {self.folder}: {error.strerror}."
            ) from error
        self.begin = begin
        self.facts = _identity.facts(begin.solver)
        self.shapes = _shapes(begin.state)
        self.count = 0
        self.witness: list[float] = []
        self.parts: dict[str, Tree] = {}
        self.needed: set[str] = set()
        self.writer = concurrent.futures.ThreadPoolExecutor(1)
        self.pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Chain":
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.shutdown()

    def newest(self) -> Position:
        """The last whole position, or the beginning."""
        for path in sorted(self.folder.glob(_PATTERN), reverse=True):
            try:
                metadata = _files.read_metadata(path)
                self._check(path, metadata)
                return self._restore(path, metadata)
            except _identity.OtherProblem:
                raise
            except _files.CheckpointError as error:
                warnings.warn(f"{error} Going back to the state before it.", stacklevel=4)
        return self.begin

    def look(self, vectors: jax.Array, images: jax.Array) -> None:
        """Remembers the first product, by which the problem is known."""
        if not self.witness:
            space = self.begin.solver.operator.space
            self.witness = _identity.first_product(space, vectors, images)

    def follow(self, stage: int, state: Tree) -> None:
        """Counts a step, and writes the state if it is time."""
        self.count += 1
        if self.count % self.every == 0:
            self._save(stage, state)

    def wait(self) -> None:
        """Until the last file is whole."""
        if self.pending is not None:
            self.pending.result()

    def _check(self, path: Path, metadata: dict[str, Tree]) -> None:
        """Raises OtherProblem if the file is of another one."""
        if self.witness:
            return
        _identity.check_facts(path, metadata.get("facts", {}), self.facts)
        solver = self.begin.solver
        vectors = solver.vectors(self.begin.state)
        images = multiply(solver.operator, vectors)
        self.look(vectors, images)
        space = solver.operator.space
        _identity.check_product(path, metadata["product"], self.witness, space)

    def _save(self, stage: int, state: Tree) -> None:
        # Sorted by name they are sorted by age; names are never used twice, so that no file can
        # take the place of one that others refer to.
        name = f"{self.count:08d}.{secrets.token_hex(4)}{_PATTERN[1:]}"
        self.wait()
        rows, parts = {}, {}
        named = _named(state)
        for prefix, basis in _bases(state).items():
            # Of several bases at once the rows are filled together.
            stop, generation = int(basis.filled.ravel()[0]), int(basis.generation.ravel()[0])
            part = self.parts.get(prefix, {"generation": None})
            pieces = part["pieces"] if part["generation"] == generation else []
            start = pieces[-1][2] if pieces else 0
            if start < stop:
                pieces = [*pieces, [name, start, stop]]
                rows[prefix] = _cut(_blocks(named, prefix), start, stop)
            parts[prefix] = {"generation": generation, "pieces": pieces}
        metadata = {
            "facts": self.facts,
            "product": self.witness,
            "count": self.count,
            "stage": stage,
            "parts": parts,
        }
        # The next step takes the state's memory: copies go to the thread that writes.
        rest = _copies(_rest(named, parts))
        keep, self.needed = self.needed, {name, *_files_of(parts)}
        self.parts = parts
        self.pending = self.writer.submit(self._write, name, rest, rows, metadata, keep)

    def _write(self, name: str, rest: Tree, rows: Tree, metadata: Tree, keep: set[str]) -> None:
        _files.save(self.folder / name, {"rest": rest, "rows": rows}, metadata=metadata)
        keep = {name, *_files_of(metadata["parts"]), *keep}
        for path in [*self.folder.glob(_PATTERN), *self.folder.glob(f".{_PATTERN}.*.tmp")]:
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _restore(self, path: Path, metadata: dict[str, Tree]) -> Position:
        solver, shapes, first = self.begin.solver, self.shapes, 0
        for _ in range(metadata["stage"]):
            # Of the state only the structure counts, and where the arrays lie.
            first, (solver, state) = first + solver.max_steps, _next(solver)
            shapes = _shapes(state)
        named, parts = _named(shapes), metadata["parts"]
        loaded = {name: self._read(name, named) for name in {path.name, *_files_of(parts)}}
        leaves: dict[str, Tree] = dict(loaded[path.name]["rest"])
        for prefix, part in parts.items():
            pieces = [loaded[name]["rows"][prefix] for name, _, _ in part["pieces"]]
            rows = itertools.chain.from_iterable(pieces)
            leaves |= _assemble(_blocks(named, prefix), rows)
        placed = [_place(leaves[name], shape) for name, shape in named.items()]
        self.count, self.witness = metadata["count"], metadata["product"]
        self.parts, self.needed = parts, set(loaded)
        state = jax.tree.unflatten(jax.tree.structure(shapes), placed)
        return Position(solver, state, metadata["stage"], first, self.count)

    def _read(self, name: str, named: dict[str, Tree]) -> Tree:
        """The leaves in a file, and the rows that are new in it."""
        parts = _files.read_metadata(self.folder / name)["parts"]
        rows = {}
        for prefix, part in parts.items():
            for file, start, stop in part["pieces"]:
                if file == name:
                    first = next(iter(_blocks(named, prefix).values()))
                    shape = (*first.shape[:-2], first.shape[-1])
                    rows[prefix] = [np.empty(shape, first.dtype)] * (stop - start)
        return _files.load(self.folder / name, {"rest": _rest(named, parts), "rows": rows})


def _shapes(state: Tree) -> Tree:
    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(shape, state)


def _named(tree: Tree) -> dict[str, Tree]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _next(solver: Solver[Any, Any]) -> tuple[Solver[Any, Any], Tree]:
    return (solver, solver.init()) if solver.then is None else solver.then(solver.init())


def _bases(state: Tree) -> dict[str, Basis]:
    """The bases in a state by the paths of their rows."""
    is_basis = lambda node: isinstance(node, Basis)
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_basis)
    return {f"{jax.tree_util.keystr(path)}.blocks": n for path, n in nodes if is_basis(n)}


def _blocks(named: dict[str, Tree], prefix: str) -> dict[str, Tree]:
    """The arrays (..., rows, n) of a basis, in the order of their rows."""
    return {name: leaf for name, leaf in named.items() if name.startswith(prefix)}


def _rest(named: dict[str, Tree], prefixes: Iterable[str]) -> dict[str, Tree]:
    return {name: leaf for name, leaf in named.items() if not name.startswith(tuple(prefixes))}


def _files_of(parts: dict[str, Tree]) -> set[str]:
    return {name for part in parts.values() for name, _, _ in part["pieces"]}


def _cut(blocks: dict[str, Tree], start: int, stop: int) -> list[jax.Array]:
    """Copies of rows; one at a time is one program, however many there are."""
    rows = []
    for block in blocks.values():
        size = block.shape[-2]
        rows += [_row(block, jnp.int32(i)) for i in range(max(start, 0), min(stop, size))]
        start, stop = start - size, stop - size
    return rows


def _assemble(blocks: dict[str, Tree], rows: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    """The blocks from their filled rows; the others are zero."""
    arrays = {name: np.zeros(shape.shape, shape.dtype) for name, shape in blocks.items()}
    for array in arrays.values():
        # The basis comes to an end before its room does.
        for i, row in zip(range(array.shape[-2]), rows, strict=False):
            array[..., i, :] = row
    return arrays


def _place(leaf: Tree, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """On the devices where the leaf was; a copy, which the solver may overwrite."""
    leaf = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
    is_spread = shape.sharding is not None and len(shape.sharding.device_set) > 1
    return jax.device_put(leaf, shape.sharding) if is_spread else leaf


@jax.jit
def _row(block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(block, i, axis=-2, keepdims=False)


@jax.jit
def _copies(leaves: dict[str, Tree]) -> dict[str, Tree]:
    return jax.tree.map(jnp.copy, leaves)
