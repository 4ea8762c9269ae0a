"""How a source is read: ahead, by a thread that ends, in passes that must be alike."""

import gc
import threading
import time
import weakref
from functools import partial

import jax
import numpy as np
import pytest

from regjax import curvature
from regjax.curvature._operators import _source, _stream
from tests import oracles
from tests.curvature.streams import Source, close, pair


@pytest.mark.parametrize("prefetch", [1, 3])
def test_as_many_batches_are_read_ahead_as_asked_for(prefetch):
    streamed, _, source = pair(prefetch=prefetch)
    source.batches = source.batches * 5
    reads = []
    streamed.source.source = lambda: (reads.append(1) or batch for batch in source.batches)
    passes = streamed.source.batches()
    next(passes)
    deadline = time.monotonic() + 5
    while len(reads) < prefetch + 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(reads) == prefetch + 1
    passes.close()


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_batches_are_alive_than_that(prefetch, monkeypatch):
    streamed, _, source = pair(prefetch=prefetch)
    source.batches = source.batches * 5
    alive, most, put, fused = set(), [], _source._put, _stream.StreamedOperator._fused

    def counted(batch):
        batch = put(batch)
        alive.add(number := len(most))
        weakref.finalize(batch[0], alive.discard, number)
        most.append(len(alive))
        return batch

    def slow(*arguments):
        time.sleep(0.01)
        return fused(*arguments)

    monkeypatch.setattr(_source, "_put", counted)
    monkeypatch.setattr(_stream.StreamedOperator, "_fused", slow)
    streamed.matvec(streamed.params)
    assert len(most) == 15
    assert max(most) == prefetch + 1
    gc.collect()
    assert not alive


def test_the_host_waits_for_the_batch_before_the_last(monkeypatch):
    # Dispatch returns at once on accelerators, and with it the reading of further batches.
    streamed, _, source = pair()
    source.batches = source.batches[:2] * 2
    images, events, fused = [], [], _stream.StreamedOperator._fused

    def noted(*arguments):
        events.append(f"product {len(images)}")
        images.append(fused(*arguments))
        return images[-1]

    def wait(array):
        events.extend(f"wait {i}" for i, image in enumerate(images) if image is array)

    monkeypatch.setattr(_stream.StreamedOperator, "_fused", noted)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    streamed.matvec(streamed.params)
    assert events == [
        "product 0", "product 1", "wait 0", "product 2", "wait 1", "product 3", "wait 2"
    ]  # fmt: skip


def broken(source, number, error):
    """The batches of `source`, until one fails."""

    def batches():
        for i, batch in enumerate(source.batches):
            if source.broken and i == number:
                raise error
            yield batch

    return batches


def test_the_error_of_a_source_names_the_batch():
    problem = oracles.problem()
    source = Source(problem.batch)
    source.broken = False
    streamed = curvature.stream(
        curvature.hessian, oracles.loss_fn, problem.params, broken(source, 2, OSError("gone"))
    )
    expected = streamed.matvec(problem.params)
    source.broken = True
    message = r"`source` failed at batch 2 \(counted from 0\) of pass 2: OSError: gone"
    with pytest.raises(RuntimeError, match=message) as caught:
        streamed.matvec(problem.params)
    assert isinstance(caught.value.__cause__, OSError)
    assert threads() == []
    source.broken = False
    close(streamed.matvec(problem.params), expected, rtol=0, atol=0)


def test_the_error_of_a_device_stays_what_it_is(monkeypatch):
    def full(batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    streamed, _, _ = pair()
    monkeypatch.setattr(_source, "_put", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^RESOURCE_EXHAUSTED"):
        streamed.matvec(streamed.params)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "regjax-stream"]


def test_the_thread_ends_when_the_consumer_fails(monkeypatch):
    streamed, _, source = pair()
    closed = []

    def batches():
        try:
            while True:
                yield source.batches[0]
        finally:
            closed.append(threading.current_thread().name)

    def fail(*arguments):
        raise ArithmeticError

    streamed.source.source = batches
    monkeypatch.setattr(_stream, "_add", fail)
    with pytest.raises(ArithmeticError):
        streamed.matvec(streamed.params)
    assert threads() == []
    assert closed == ["regjax-stream"]


@pytest.mark.parametrize(("number", "total"), [(2, 18), (4, 32)])
def test_a_source_that_changes_its_size(number, total):
    streamed, _, source = pair()
    streamed.matvec(streamed.params)
    source.batches = (source.batches * 2)[:number]
    message = f"the same 23 examples in every pass, got {total} examples in pass 2"
    with pytest.raises(ValueError, match=message):
        streamed.matvec(streamed.params)


def test_sources_that_give_their_batches_once():
    problem = oracles.problem()
    make = partial(curvature.stream, curvature.hessian, oracles.loss_fn, problem.params)
    batches = Source(problem.batch).batches
    with pytest.raises(TypeError, match=r"`source` must begin a new pass.* got a generator"):
        make(batch for batch in batches)
    iterator = iter(batches)
    streamed = make(lambda: iterator)
    with pytest.raises(RuntimeError, match="got a list_iterator that gives its batches once"):
        streamed.matvec(problem.params)


class Restarting:
    """Gives the same iterator for each pass, as data loaders do that keep their processes."""

    def __init__(self, batches):
        self.batches, self.iterator = batches, self.Iterator()

    class Iterator:
        def __iter__(self):
            return self

        def __next__(self):
            return next(self.rest)

    def __iter__(self):
        self.iterator.rest = iter(self.batches)
        return self.iterator


def test_a_source_that_begins_its_iterator_again():
    problem = oracles.problem()
    source = Restarting(Source(problem.batch).batches)
    streamed = curvature.stream(curvature.hessian, oracles.loss_fn, problem.params, source)
    first = streamed.matvec(problem.params)
    close(streamed.matvec(problem.params), first, rtol=0, atol=0)
    assert streamed.source.num_examples == 23


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "`source` must give at least one batch"),
        (
            [np.ones(3)],
            TypeError,
            "`source` must give tuples of arrays, or dicts .* got one ndarray",
        ),
        ([(np.ones((3, 5)), np.ones(2))], ValueError, "`batch` must have one leading axis"),
        (3, TypeError, "not iterable"),
    ],
)
def test_sources_of_something_else(source, error, message):
    with pytest.raises(error, match=message):
        curvature.stream(curvature.hessian, oracles.loss_fn, oracles.problem().params, source)
