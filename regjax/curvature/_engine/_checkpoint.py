"""Long runs survive: the state of a solver on disk every few products, and the way back.

A folder holds a chain of files. Each is the whole state but for rows of bases that did not change
since: for these it names the files before it. Rows are most of a state, and between two files a
basis grows by a few of them; only when it is compressed is it written anew. A file appears under
its name when all of it is on the disk, every byte is under a CRC, and the files of the last two
states are kept. So there is a whole state at any moment, and one to fall back on. Of several
processes each has a folder of its own in it, with its own shards, and they go on from the newest
state of which all have theirs; one may be a state ahead of another, so they keep three.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import secrets
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax

from regjax import _checks, _files
from regjax._base import Tree
from regjax.curvature._engine import _identity, _leaves, _own
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
    """Where a solver saves its state, so that the same call goes on after the process was killed.

    The answer is that of an undisturbed run, bit for bit, on the same device with the same
    versions. It is for solvers that are called from Python, outside of `jax.jit`.

    A run goes on from its own files alone: those of the same traced program and the same arrays,
    what functions close over included (of a source of batches all examples are read once to see
    that). If the newest file is damaged, it goes back to the one before. Files of another problem
    or another version, and files that may not be read, are an error, and stay. On several devices
    each process writes its own shards, and a run goes on with as many processes, on the same mesh,
    of parameters that are divided alike.

    Example:
      >>> import tempfile
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoint = curvature.Checkpoint(folder, every=4)
      ...     result = curvature.lanczos(hessian, jnp.ones(8), 8, checkpoint=checkpoint)
      >>> print(result.num_steps)
      8

    Attributes:
      folder: created if missing. Use it for one run at a time: old files of that run are deleted
        when they are no longer needed. It takes up to twice the memory of the basis. Delete it to
        start anew.
      every: number of steps between two files (products; rounds of them, where several probes go at
        once). As many vectors are copied on the device each time.
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
      OtherProblem: the folder is of a run with another number of processes.
      CheckpointError: the folder cannot be made, or another run uses it.
    """

    def __init__(self, checkpoint: Checkpoint, begin: Position):
        self.every = _checks.integer("every", checkpoint.every)
        self.whole_folder = Path(checkpoint.folder)
        self.folder = self.whole_folder / _own_folder()
        self.begin = begin
        self.facts: dict[str, Any] = {}
        self.stages = [(begin.solver, _leaves.shapes(begin.state))]
        self.count = 0
        self.witness: list[float] = []
        self.parts: dict[str, Part] = {}
        self.needed: list[set[str]] = []
        self.ours: set[str] = set()
        self.pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Chain":
        with contextlib.ExitStack() as stack:
            _own.together(lambda: self._enter(stack))
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
        paths = sorted(self.folder.glob(PATTERN), reverse=True)
        if jax.process_count() > 1 and max(_own.everywhere(len(paths))):
            # What they have to compute together, whatever each of them finds.
            self._witness()
            while self._follow_stage():
                pass
        position = _own.together(functools.partial(self._newest, paths))
        while min(counts := _own.everywhere(position.steps)) < max(counts):
            behind = [path for path in paths if int(path.name.split(".")[0]) > min(counts)]
            self.ours |= {path.name for path in behind}
            paths = [path for path in paths if path not in behind]
            position = _own.together(functools.partial(self._newest, paths))
        return position

    def _newest(self, paths: list[Path]) -> Position:
        """The last whole position of this process among some files."""
        position, self.count, self.parts, self.needed = self.begin, 0, {}, []
        for i, path in enumerate(paths):
            try:
                position = self._restore(path, self._read(path))
            except (_files.DamagedError, _files.MissingError) as error:
                self.ours.add(path.name)
                warnings.warn(f"{error} Going back to the state before it.", stacklevel=4)
                continue
            older = {path.name for path in paths[i + 1 :] if self._is_ours(path)}
            self.ours |= {*self.needed[0], *older}
            break
        return position

    def _enter(self, stack: contextlib.ExitStack) -> None:
        _check_processes(self.whole_folder)
        stack.enter_context(_files.locked(self.folder, name=_LOCK))

    def _witness(self) -> None:
        if not self.witness:
            solver = self.begin.solver
            vectors = solver.vectors(self.begin.state)
            self.look(vectors, multiply(solver.operator, vectors))

    def _follow_stage(self) -> bool:
        """Makes the solver after the last known one, if there is one."""
        solver, _ = self.stages[-1]
        if solver.then is None:
            return False
        # Of the state only the structure counts, and where the arrays lie.
        solver, state = solver.then(solver.init())
        self.stages.append((solver, _leaves.shapes(state)))
        return True

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
        self._witness()
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
        named = _leaves.named(state)
        for prefix, basis in _leaves.bases(state).items():
            # Of several bases at once the rows are filled together.
            stop, generation = int(basis.filled.ravel()[0]), int(basis.generation.ravel()[0])
            part = self.parts.get(prefix)
            pieces = part.pieces if part is not None and part.generation == generation else ()
            start = pieces[-1].stop if pieces else 0
            if start < stop:
                pieces = (*pieces, Piece(name, start, stop))
                rows[prefix] = _leaves.cut(_leaves.blocks(named, prefix), start, stop)
            parts[prefix] = Part(generation, pieces)
        saved = Saved(self.witness, self.count, stage, parts)
        # The next step takes the state's memory: copies go to the thread that writes.
        rest = _leaves.copies(_leaves.rest(named, parts))
        num_kept = 2 if jax.process_count() == 1 else 3
        self.needed = [{name, *saved.files()}, *self.needed][:num_kept]
        self.parts = parts
        keep = set().union(*self.needed)
        self.pending = self.writer.submit(self._write, name, rest, rows, saved, keep)

    def _write(self, name: str, rest: Tree, rows: Tree, saved: Saved, keep: set[str]) -> None:
        rest, rows = jax.tree.map(_own.pieces, (rest, rows))
        metadata = metadata_of(self.facts, saved)
        _files.save(self.folder / name, {"rest": rest, "rows": rows}, metadata=metadata)
        self.ours.add(name)
        for old in self.ours - keep:
            (self.folder / old).unlink(missing_ok=True)
            self.ours.discard(old)
        # Begun by a run that was killed: this one has the folder for itself.
        for path in self.folder.glob(f".{PATTERN}.*.tmp"):
            path.unlink(missing_ok=True)

    def _restore(self, path: Path, saved: Saved) -> Position:
        while len(self.stages) <= saved.stage:
            if not self._follow_stage():
                raise wrong(path, "stage", saved.stage)
        first = sum(solver.max_steps for solver, _ in self.stages[: saved.stage])
        solver, shapes = self.stages[saved.stage]
        named, parts = _leaves.named(shapes), saved.parts
        if set(parts) != set(_leaves.bases(shapes)):
            raise wrong(path, "parts", sorted(parts))
        for prefix, part in parts.items():
            if part.filled > _leaves.num_rows(_leaves.blocks(named, prefix)):
                raise wrong(path, "parts", part.filled)
        files = {path.name, *saved.files()}
        loaded = {name: self._load(path, name, named) for name in files}
        leaves: dict[str, Tree] = dict(loaded[path.name]["rest"])
        for prefix, part in parts.items():
            pieces = [_leaves.piece(path, loaded, piece, prefix) for piece in part.pieces]
            rows = itertools.chain.from_iterable(pieces)
            leaves |= _leaves.assemble(_leaves.blocks(named, prefix), rows)
        placed = [_own.joined(leaves[name], shape) for name, shape in named.items()]
        self.count, self.witness = saved.count, saved.product
        self.parts, self.needed = parts, [files]
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
            blocks = _leaves.blocks(named, prefix)
            if part.filled > _leaves.num_rows(blocks):
                raise wrong(other, "parts", prefix)
            for piece in part.pieces:
                if piece.file == name:
                    row = _leaves.empty_row(blocks)
                    rows[prefix] = [row] * (piece.stop - piece.start)
        rest = jax.tree.map(_own.shapes, _leaves.rest(named, parts))
        return _files.load(other, {"rest": rest, "rows": rows})


def _own_folder() -> str:
    count = jax.process_count()
    return "" if count == 1 else f"process-{jax.process_index()}-of-{count}"


def _check_processes(folder: Path) -> None:
    """Raises OtherProblem if there is a state of another number of processes."""
    counts = [1 for _ in folder.glob(PATTERN)]
    counts += [
        int(path.parent.name.split("-")[-1]) for path in folder.glob(f"process-*-of-*/{PATTERN}")
    ]
    for count in counts:
        if count != jax.process_count():
            raise _identity.OtherProblem(
                "`checkpoint` must be of the same problem: `number of processes` must be "
                f"{jax.process_count()}, got {count} in {folder}."
            )
