import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.flatten_util import ravel_pytree

from regjax import curvature
from tests import oracles
from tests.compilations import programs
from tests.curvature.streams import KEY, KINDS, Source, close, pair
from tests.experiments.test_tfds import examples, prepare


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
    "trace": (lambda o: curvature.trace(o, key=KEY, num_matvecs=7, method="hutch++"), 4),
    "diagonal": (lambda o: curvature.diagonal(o, key=KEY, num_matvecs=3), 1),
    "by_block": (
        lambda o: curvature.trace(curvature.by_block(o)["second"], key=KEY, num_matvecs=2), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_give_the_same_and_share_their_passes(name, monkeypatch):
    solve, passes = SOLVERS[name]
    streamed, whole, source = pair()
    result = solve(streamed)
    assert source.passes == (int(result.num_matvecs) if passes is None else passes)
    # In memory the probes of a density follow one another on CPU, with other draws.
    monkeypatch.setattr(curvature.Operator, "takes_blocks", True)
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
    with programs() as compiled:
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


def test_batches_may_be_dicts_of_dicts():
    problem = oracles.problem()
    inputs, targets = problem.batch
    loss = lambda params, batch: oracles.loss_fn(params, batch["x"], batch["more"]["y"])
    whole = curvature.hessian(loss, problem.params, {"x": inputs, "more": {"y": targets}})
    source = [{"x": inputs[i::2], "more": {"y": targets[i::2]}} for i in (0, 1)]
    streamed = curvature.stream(curvature.hessian, loss, problem.params, source)
    np.testing.assert_allclose(streamed.dense(), whole.dense(), atol=2e-6)


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
