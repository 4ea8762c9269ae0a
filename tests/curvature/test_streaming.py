import gc
import threading
import time
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.flatten_util import ravel_pytree

from regjax import curvature
from regjax.curvature import _source, _streaming
from regjax.curvature._operators import Operator
from tests import oracles
from tests.curvature.test_operators import count_compilations
from tests.experiments.test_tfds import examples, prepare

KEY = jax.random.key(5)
# Name -> operator, its functions, what it takes of a batch, its options.
KINDS = {
    "hessian": (curvature.hessian, (oracles.loss_fn,), 2, {}),
    "gauss_newton": (curvature.gauss_newton, (oracles.model_fn, oracles.cross_entropy), 2, {}),
    "empirical_fisher": (
        curvature.empirical_fisher, (oracles.model_fn, oracles.cross_entropy), 2, {}
    ),
    "fisher": (curvature.fisher, (oracles.model_fn,), 1, {"key": KEY, "num_samples": 3}),
    "exact_fisher": (curvature.fisher, (oracles.model_fn,), 1, {"key": None, "num_samples": None}),
}  # fmt: skip


class Source:
    """Batches of a problem in NumPy; counts its passes, that of `stream` itself as well."""

    def __init__(self, batch, sizes=(9, 9, 5)):
        cuts = np.cumsum(sizes)[:-1]
        self.batches = list(zip(*(np.split(np.asarray(a), cuts) for a in batch), strict=True))
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def pair(name="hessian", problem=None, **options):
    """A streamed operator, the same in memory, and the source, its passes counted from now on."""
    problem = oracles.problem() if problem is None else problem
    operator_fn, functions, num_arrays, own = KINDS[name]
    batch = problem.batch[:num_arrays]
    source = Source(batch)
    streamed = curvature.stream(operator_fn, *functions, problem.params, source, **own, **options)
    source.passes = 0
    return streamed, operator_fn(*functions, problem.params, *batch, **own), source


def close(one, other, rtol=1e-4, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_in_memory_and_a_block_takes_one_pass(name):
    streamed, whole, source = pair(name)
    expected = whole.dense()
    close(streamed.dense(), expected)
    assert source.passes == 1
    image = ravel_pytree(streamed.matvec(streamed.params))[0]
    close(image, expected @ ravel_pytree(streamed.params)[0], rtol=1e-4, atol=1e-5)
    assert source.passes == 2
    assert (streamed.shape, streamed.dtype) == ((57, 57), jnp.float32)
    assert streamed.source.num_examples == 23


SOLVERS = {
    "lanczos": (lambda o: curvature.lanczos(o, o.params, 6), 6),
    "top_eigenpairs": (lambda o: curvature.top_eigenpairs(o, 2, key=KEY, search=False), None),
    # Probes share their passes; Hutch++ takes three, and one more for the probe that is left over.
    "spectral_density": (
        lambda o: curvature.spectral_density(o, key=KEY, num_steps=4, deflate=5), 9
    ),
    "trace": (lambda o: curvature.trace(o, key=KEY, num_probes=7, method="hutch++"), 4),
    "diagonal": (lambda o: curvature.diagonal(o, key=KEY, num_probes=3), 1),
    "by_block": (
        lambda o: curvature.trace(curvature.by_block(o)["second"], key=KEY, num_probes=2), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_give_the_same_and_share_their_passes(name, monkeypatch):
    solve, passes = SOLVERS[name]
    streamed, whole, source = pair()
    result = solve(streamed)
    assert source.passes == (int(result.num_matvecs) if passes is None else passes)
    # In memory the probes of a density follow one another on CPU, with other draws.
    monkeypatch.setattr(Operator, "takes_blocks", True)
    close(result, solve(whole), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_the_host_makes_the_products(transform):
    streamed, _, _ = pair()
    vectors = jax.tree.map(lambda leaf: leaf[None], streamed.params)
    message = "`operator` must be used outside of jax.jit, jax.vmap.*`matmat`"
    with pytest.raises(ValueError, match=message):
        transform(streamed.matvec)(vectors if transform is jax.vmap else streamed.params)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda operator, v: operator.matvec(v))(streamed, streamed.params)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda key: curvature.top_eigenpairs(streamed, 1, key=key))(KEY)


def test_a_second_operator_compiles_nothing():
    problem = oracles.problem()
    streamed, _, _ = pair(problem=problem)
    streamed.matvec(problem.params)
    shifted = jax.tree.map(lambda leaf: leaf + 0.1, problem.params)
    with count_compilations() as compiled:
        second, _, _ = pair(problem=problem._replace(params=shifted))
        second.matvec(shifted)
    assert compiled == []


def test_float64_goes_through_the_thread():
    with jax.enable_x64(True):
        problem = oracles.problem(dtype=np.float64)
        streamed, whole, _ = pair(problem=problem)
        assert streamed.dense().dtype == jnp.float64
        close(streamed.dense(), whole.dense(), rtol=1e-11, atol=1e-13)


def test_a_source_may_use_its_arrays_again():
    # Aligned as JAX likes it, which then takes the memory of the array for its own.
    problem = oracles.problem()
    raw = np.zeros(4096, np.uint8)
    inputs = raw[-raw.ctypes.data % 64 :][: 9 * 5 * 4].view(np.float32).reshape(9, 5)

    def source():
        for x, y in Source(problem.batch, (9, 9, 5)).batches:
            inputs[: len(x)] = x
            yield inputs[: len(x)], y

    streamed = curvature.stream(curvature.hessian, oracles.loss_fn, problem.params, source)
    close(streamed.dense(), pair()[1].dense())


def test_arrays_on_the_device_and_lists_of_batches():
    problem = oracles.problem()
    batches = [[jnp.asarray(a) for a in batch] for batch in Source(problem.batch).batches]
    streamed = curvature.stream(curvature.hessian, oracles.loss_fn, problem.params, batches)
    close(streamed.dense(), pair()[1].dense())


def read(dataset, size):
    """Batches of a random-access data set on disk."""
    for start in range(0, len(dataset), size):
        rows = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        images = np.stack([row["image"].reshape(-1)[:5] for row in rows])
        yield images, np.stack([row["label"] for row in rows])


def byte_loss(params, images, labels):
    return oracles.loss_fn(params, images.astype(jnp.float32) / 255, labels.astype(jnp.int32))


def test_array_record_files(tmp_path):
    folder = prepare(tmp_path, train=examples(23), test=examples(2))
    dataset = tfds.builder_from_directory(folder).as_data_source("train")
    params = oracles.problem().params
    streamed = curvature.stream(curvature.hessian, byte_loss, params, lambda: read(dataset, 9))
    ((images, labels),) = read(dataset, 23)
    whole = curvature.hessian(byte_loss, params, jnp.asarray(images), jnp.asarray(labels))
    close(streamed.dense(), whole.dense())


def test_memory_mapped_arrays(tmp_path):
    problem = oracles.problem()
    np.save(tmp_path / "x.npy", problem.inputs)
    x, y = np.load(tmp_path / "x.npy", mmap_mode="r"), np.asarray(problem.targets)
    source = lambda: ((x[i : i + 9], y[i : i + 9]) for i in (0, 9, 18))
    streamed = curvature.stream(curvature.hessian, oracles.loss_fn, problem.params, source)
    close(streamed.dense(), pair()[1].dense())


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
    alive, most, put, fused = set(), [], _source._put, _streaming._fused

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
    monkeypatch.setattr(_streaming, "_fused", slow)
    streamed.matvec(streamed.params)
    assert len(most) == 15
    assert max(most) == prefetch + 1
    gc.collect()
    assert not alive


def test_the_host_waits_for_the_batch_before_the_last(monkeypatch):
    # Dispatch returns at once on accelerators, and with it the reading of further batches.
    streamed, _, source = pair()
    source.batches = source.batches[:2] * 2
    images, events, fused = [], [], _streaming._fused

    def noted(*arguments):
        events.append(f"product {len(images)}")
        images.append(fused(*arguments))
        return images[-1]

    def wait(array):
        events.extend(f"wait {i}" for i, image in enumerate(images) if image is array)

    monkeypatch.setattr(_streaming, "_fused", noted)
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
    monkeypatch.setattr(_streaming, "_add", fail)
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
        ([{"x": np.ones(3)}], TypeError, "`source` must give tuples of arrays, got a dict"),
        ([(np.ones((3, 5)), np.ones(2))], ValueError, "`batch` must have one leading axis"),
        (3, TypeError, "not iterable"),
    ],
)
def test_sources_of_something_else(source, error, message):
    with pytest.raises(error, match=message):
        curvature.stream(curvature.hessian, oracles.loss_fn, oracles.problem().params, source)


def test_error_texts():
    problem = oracles.problem()
    source = Source(problem.batch)
    functions = curvature.hessian, oracles.loss_fn
    with pytest.raises(ValueError, match="`operator_fn` must be one of hessian, gauss_newton"):
        curvature.stream(curvature.from_matvec, None, problem.params, source)
    with pytest.raises(TypeError, match="`arguments` must be loss_fn, params, source for hessian"):
        curvature.stream(*functions, problem.params, *problem.batch)
    with pytest.raises(TypeError, match="`chunk_size` must be left out"):
        curvature.stream(*functions, problem.params, source, chunk_size=3)
    with pytest.raises(ValueError, match="`prefetch` must be at least 1, got 0"):
        curvature.stream(*functions, problem.params, source, prefetch=0)

    def coupled(params, *batch):
        return oracles.loss_fn(params, *batch)

    coupled.couples_examples = True
    with pytest.raises(ValueError, match="`loss_fn` must not couple the examples of a batch"):
        curvature.stream(curvature.hessian, coupled, problem.params, source)
