"""Long runs survive: the state of a solver on disk every few products, and the way back.

A folder holds a chain of files. Each is the whole state but for rows of bases that did not change
since: for these it names the files before it. Rows are most of a state, and between two files a
basis grows by a few of them; only when it is compressed is it written anew. A file appears under
its name when all of it is on the disk, every byte is under a CRC, and the files of the last two
states are kept. So there is a whole state at any moment, and one to fall back on.
"""

import concurrent.futures
import contextlib
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
from regjax.curvature._engine._saved import (
    PATTERN,
    Part,
    Piece,
    Saved,
    facts_of,
    metadata_of,
    saved_of,
    wrong,
)
from regjax.curvature._engine._solver import Solver, multiply

_LOCK = ".products.lock"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a solver keeps its state, so that the same call goes on after the process was killed.

    A run goes on from its own files alone: of the same traced program and the same arrays, those
    that functions close over included; of a source all examples are read once to see that. What is
    damaged is gone back from; files of another problem or another version, and those that may not
    be read, are an error, and stay.

    The answer is that of an undisturbed run, bit for bit, on the same device with the same
    versions. For one process that drives the solver from Python, outside of `jax.jit`.

    Attributes:
      folder: made where it is not there; of one run at a time, which deletes those of its own files
        that it no longer needs. It takes up to twice the memory of the basis. Delete it to start
        anew.
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
    """The files of a run; a context that has the folder for itself and waits for the last file.

    Args:
      checkpoint: where.
      begin: the run before its first step.

    Raises:
      ValueError: several processes drive the solver.
      CheckpointError: the folder cannot be made, or another run uses it.
    """

    def __init__(self, checkpoint: Checkpoint, begin: Position):
        if jax.process_count() > 1:
            raise ValueError(
                "`checkpoint` must be None with several processes: it is written by one."
            )
        self.every = _checks.integer("every", checkpoint.every)
        self.folder = Path(checkpoint.folder)
        self.begin = begin
        self.facts: dict[str, Any] = {}
        self.shapes = _shapes(begin.state)
        self.count = 0
        self.witness: list[float] = []
        self.parts: dict[str, Part] = {}
        self.needed: set[str] = set()
        self.ours: set[str] = set()
        self.pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Chain":
        with contextlib.ExitStack() as stack:
            stack.enter_context(_files.locked(self.folder, name=_LOCK))
            self.facts = _identity.facts(self.begin.solver)
            self.writer = concurrent.futures.ThreadPoolExecutor(1)
            stack.callback(self.writer.shutdown)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def newest(self) -> Position:
        """The last whole position, or the beginning.

        Files that are damaged, or refer to one that is, are gone back from. All else that is wrong
        with a file is raised: it was not understood, and what follows would delete it.
        """
        paths, position = sorted(self.folder.glob(PATTERN), reverse=True), self.begin
        for i, path in enumerate(paths):
            try:
                position = self._restore(path, self._read(path))
            except (_files.DamagedError, _files.MissingError) as error:
                self.ours.add(path.name)
                warnings.warn(f"{error} Going back to the state before it.", stacklevel=4)
                continue
            older = {path.name for path in paths[i + 1 :] if self._is_ours(path)}
            self.ours |= {*self.needed, *older}
            break
        return position

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

    def _read(self, path: Path) -> Saved:
        """What a file says of itself, once it is known to be of this problem.

        Raises:
          OtherProblem: it is of another one.
          CheckpointError: it says something else, or nothing.
        """
        metadata = _files.read_metadata(path)
        _identity.check_facts(path, facts_of(path, metadata), self.facts)
        saved = saved_of(path, metadata)
        if not self.witness:
            solver = self.begin.solver
            vectors = solver.vectors(self.begin.state)
            self.look(vectors, multiply(solver.operator, vectors))
        space = self.begin.solver.operator.space
        _identity.check_product(path, saved.product, self.witness, space)
        return saved

    def _is_ours(self, path: Path) -> bool:
        """Whether a file that is no longer needed was written by this run."""
        try:
            return facts_of(path, _files.read_metadata(path)) == self.facts
        except _files.DamagedError:
            return True
        except _files.CheckpointError:
            return False

    def _save(self, stage: int, state: Tree) -> None:
        # Sorted by name they are sorted by age; names are never used twice, so that no file can
        # take the place of one that others refer to.
        name = f"{self.count:08d}.{secrets.token_hex(4)}{PATTERN[1:]}"
        self.wait()
        rows, parts = {}, {}
        named = _named(state)
        for prefix, basis in _bases(state).items():
            # Of several bases at once the rows are filled together.
            stop, generation = int(basis.filled.ravel()[0]), int(basis.generation.ravel()[0])
            part = self.parts.get(prefix)
            pieces = part.pieces if part is not None and part.generation == generation else ()
            start = pieces[-1].stop if pieces else 0
            if start < stop:
                pieces = (*pieces, Piece(name, start, stop))
                rows[prefix] = _cut(_blocks(named, prefix), start, stop)
            parts[prefix] = Part(generation, pieces)
        saved = Saved(self.witness, self.count, stage, parts)
        # The next step takes the state's memory: copies go to the thread that writes.
        rest = _copies(_rest(named, parts))
        keep, self.needed = self.needed, {name, *saved.files()}
        self.parts = parts
        self.pending = self.writer.submit(self._write, name, rest, rows, saved, keep)

    def _write(self, name: str, rest: Tree, rows: Tree, saved: Saved, keep: set[str]) -> None:
        metadata = metadata_of(self.facts, saved)
        _files.save(self.folder / name, {"rest": rest, "rows": rows}, metadata=metadata)
        self.ours.add(name)
        for old in self.ours - {name, *saved.files(), *keep}:
            (self.folder / old).unlink(missing_ok=True)
            self.ours.discard(old)
        # Begun by a run that was killed: this one has the folder for itself.
        for path in self.folder.glob(f".{PATTERN}.*.tmp"):
            path.unlink(missing_ok=True)

    def _restore(self, path: Path, saved: Saved) -> Position:
        solver, shapes, first = self.begin.solver, self.shapes, 0
        for _ in range(saved.stage):
            if solver.then is None:
                raise wrong(path, "stage", saved.stage)
            # Of the state only the structure counts, and where the arrays lie.
            first, (solver, state) = first + solver.max_steps, solver.then(solver.init())
            shapes = _shapes(state)
        named, parts = _named(shapes), saved.parts
        if set(parts) != set(_bases(shapes)):
            raise wrong(path, "parts", sorted(parts))
        for prefix, part in parts.items():
            if part.filled > _num_rows(_blocks(named, prefix)):
                raise wrong(path, "parts", part.filled)
        files = {path.name, *saved.files()}
        loaded = {name: self._load(path, name, named) for name in files}
        leaves: dict[str, Tree] = dict(loaded[path.name]["rest"])
        for prefix, part in parts.items():
            pieces = [_piece(path, loaded, piece, prefix) for piece in part.pieces]
            rows = itertools.chain.from_iterable(pieces)
            leaves |= _assemble(_blocks(named, prefix), rows)
        placed = [_place(leaves[name], shape) for name, shape in named.items()]
        self.count, self.witness = saved.count, saved.product
        self.parts, self.needed = parts, files
        state = jax.tree.unflatten(jax.tree.structure(shapes), placed)
        return Position(solver, state, saved.stage, first, self.count)

    def _load(self, path: Path, name: str, named: dict[str, Tree]) -> Tree:
        """The leaves in a file, and the rows that are new in it."""
        other = self.folder / name
        metadata = _files.read_metadata(other)
        if facts_of(other, metadata) != self.facts:
            raise wrong(path, "parts", name)
        parts = saved_of(other, metadata).parts
        rows = {}
        for prefix, part in parts.items():
            blocks = _blocks(named, prefix)
            if part.filled > _num_rows(blocks):
                raise wrong(other, "parts", prefix)
            for piece in part.pieces:
                if piece.file == name:
                    first = next(iter(blocks.values()))
                    shape = (*first.shape[:-2], first.shape[-1])
                    rows[prefix] = [np.empty(shape, first.dtype)] * (piece.stop - piece.start)
        return _files.load(other, {"rest": _rest(named, parts), "rows": rows})


def _shapes(state: Tree) -> Tree:
    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(shape, state)


def _named(tree: Tree) -> dict[str, Tree]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


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


def _num_rows(blocks: dict[str, Tree]) -> int:
    return sum(block.shape[-2] for block in blocks.values())


def _piece(path: Path, loaded: dict[str, Tree], piece: Piece, prefix: str) -> list[np.ndarray]:
    rows = loaded[piece.file]["rows"].get(prefix, [])
    if len(rows) != piece.stop - piece.start:
        raise wrong(path, "parts", list(piece))
    return rows


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
