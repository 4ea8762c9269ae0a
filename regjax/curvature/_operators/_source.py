"""A source of batches that is read again for each pass, a few batches ahead of the device."""

import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from regjax import _checks, _digest, _meshes
from regjax._base import Batch, Tree

_END = object()


class _Failure(NamedTuple):
    """What the reading thread raised, and at which batch."""

    error: BaseException
    number: int


@dataclasses.dataclass(eq=False)
class Source:
    """A source with what is known of its passes; compared by identity.

    Attributes:
      source: the caller's.
      prefetch: number of batches on the device besides the one that is computed.
      draw: (first, count) -> what is added to a batch that begins with example `first`; or None.
      check: batch -> batch, checked and converted; or None.
      num_examples: of every pass, known after the first one.
      num_passes: passes begun.
      iterator: that of the last pass.
    """

    source: Tree
    prefetch: int
    draw: Callable[[int, int], jax.Array] | None = None
    check: Callable[[Batch], Batch] | None = None
    num_examples: int | None = None
    num_passes: int = 0
    iterator: Tree = None

    def begin(self) -> Iterator[Tree]:
        """The iterator of a new pass."""
        is_factory = callable(self.source) and not hasattr(self.source, "__iter__")
        iterator = iter(self.source() if is_factory else self.source)
        # A data loader may well keep its iterator and begin it again.
        if iterator is self.source or (is_factory and iterator is self.iterator):
            raise TypeError(
                "`source` must begin a new pass with each `iter(source)`, or be a function without "
                f"arguments that returns a new iterator, got a {type(iterator).__name__} that "
                "gives its batches once."
            )
        self.iterator = iterator
        return iterator

    def first(self) -> Batch:
        """The first batch, as it comes."""
        iterator = self.begin()
        try:
            for batch in iterator:
                return self.checked(batch)
        finally:
            _close(iterator)
        raise ValueError("`source` must give at least one batch, got none.")

    def checked(self, batch: Tree) -> Batch:
        """A batch as the functions take it."""
        found = _meshes.automatic(_checked(batch))
        return found if self.check is None else self.check(found)

    def drawn(self, first: int, batch: Batch) -> Batch:
        """A batch that begins with example `first`, with its draws."""
        extra = () if self.draw is None else (self.draw(first, _checks.num_examples(batch)),)
        return batch + extra

    def digest(self) -> str:
        """Of all examples with their draws, in any order and in batches of any size; a pass."""
        total = np.zeros(2, np.uint32)
        with contextlib.closing(self.batches()) as batches:
            for _, batch in batches:
                total += np.asarray(_digest.of_examples(batch))
        return total.tobytes().hex()

    def batches(self) -> Generator[tuple[int, Batch], None, None]:
        """The batches of a pass on the device, each with its number of examples.

        By the time of asking for another one, the batch before the last must be done with.
        """
        self.num_passes += 1
        first = 0
        with _reading(self) as (arrived, permits):
            for number in itertools.count():
                item = arrived.get()
                if item is _END:
                    break
                if isinstance(item, _Failure):
                    if isinstance(item.error, jax.errors.JaxRuntimeError):
                        raise item.error  # of the device, not of the source
                    raise RuntimeError(
                        f"`source` failed at batch {item.number} (counted from 0) of pass "
                        f"{self.num_passes}: {type(item.error).__name__}: {item.error}"
                    ) from item.error
                count = _checks.num_examples(item)
                item = self.drawn(first, item)
                first += count
                yield count, item
                del item
                if number > 0:
                    permits.release()
        expected = self.num_examples
        if first == 0 or (expected is not None and first != expected):
            what = "at least one batch" if expected is None else f"the same {expected} examples"
            raise ValueError(
                f"`source` must give {what} in every pass, got {first} examples in pass "
                f"{self.num_passes}."
            )
        self.num_examples = first


@contextlib.contextmanager
def _reading(passes: Source) -> Iterator[tuple[queue.SimpleQueue[Tree], threading.Semaphore]]:
    """A thread that reads a pass: its queue, and the permits that it takes one of for each batch.

    At the end, normal or not, the thread is stopped and waited for.
    """
    arrived: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    permits, stopped = threading.Semaphore(passes.prefetch + 1), threading.Event()
    # These settings belong to the thread in which they are made.
    x64, device = (getattr(jax.config, f"jax_{name}") for name in ("enable_x64", "default_device"))

    def read() -> None:
        number, iterator = 0, None
        try:
            with jax.enable_x64(x64), jax.default_device(device):
                iterator = passes.begin()
                while not (permits.acquire() and stopped.is_set()):
                    batch = next(iterator, _END)
                    if batch is _END:
                        break
                    arrived.put(_put(passes.checked(batch)))
                    del batch
                    number += 1
            arrived.put(_END)
        except BaseException as error:
            arrived.put(_Failure(error, number))
        finally:
            _close(iterator)

    thread = threading.Thread(target=read, name="regjax-stream", daemon=True)
    thread.start()
    try:
        yield arrived, permits
    finally:
        stopped.set()
        permits.release()
        thread.join()


def _put(batch: Batch) -> Batch:
    """The batch on the device. JAX may share memory with a NumPy array: it gets one of its own."""
    own = lambda leaf: leaf if isinstance(leaf, jax.Array) else np.array(leaf)
    return jax.device_put(jax.tree.map(own, batch))


def _checked(batch: Tree) -> Batch:
    """The arguments after the parameters: a dict is one of them, as losses take it."""
    if isinstance(batch, Mapping):
        batch = (batch,)
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            "`source` must give tuples of arrays, or dicts for functions that take one, got one "
            f"{type(batch).__name__}."
        )
    _checks.num_examples(tuple(batch))
    return tuple(batch)


def _close(iterator: Tree) -> None:
    """Ends a generator that was not read to its end."""
    if isinstance(iterator, Generator):
        iterator.close()
