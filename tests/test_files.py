import json
import os
import resource
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import _files
from regjax._files import CheckpointError, load, read_metadata, save

METADATA = {"settings": {"model": "mlp", "width": 64}, "losses": [0.1, 1e-30]}


class State(NamedTuple):
    weights: dict
    key: jax.Array
    nothing: None = None


def state():
    params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}}
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    weights = {"params": params, "optimizer": optimizer.init(params)}
    return State(weights, jax.random.key(7))


def small():
    return {"a": np.float32([1.5, -2.0]), "b": jax.random.key(1)}


def words(leaf):
    """The bits of a leaf, and its type."""
    if jnp.issubdtype(getattr(leaf, "dtype", np.object_), jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    array = np.asarray(leaf)
    return type(leaf), array.dtype, array.shape, array.tobytes()


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, reference in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert words(leaf) == words(reference)


def message(path, like=None):
    with pytest.raises(CheckpointError) as caught:
        load(path, small() if like is None else like)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.npz"


@pytest.mark.parametrize(
    "tree",
    [
        state(),
        jnp.float32(0.1),  # one leaf, without a path
        {},
        [(), {"empty": None}],
        # Signed zero, infinity, a NaN with a payload, the smallest subnormal number.
        np.uint32([0x80000000, 0x7F800000, 0x7FC12345, 1]).view(np.float32),
        jnp.asarray(np.uint16([0x8000, 0x7F81, 0x3F80, 1]).view(jnp.bfloat16)),
        {"float8": jnp.ones(3, jnp.float8_e4m3fn), "int4": jnp.arange(-8, 8, dtype=jnp.int4)},
        {"keys": jax.random.split(jax.random.key(3), (2, 5)), "rbg": jax.random.key(1, impl="rbg")},
        (True, 2**62, 0.1, -0.0, np.float64(0.1), np.int8(-3), np.arange(3.0)[::-1], jnp.bool_(1)),
        {"a/b": jnp.ones(()), "c'd\n": jnp.zeros((0, 3)), "é": jnp.full(2, 1j, jnp.complex64)},
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_a_tree_comes_back_bit_for_bit(path, tree):
    save(path, tree, metadata=METADATA)
    assert_same(load(path, tree), tree)
    assert read_metadata(path) == METADATA


def test_shapes_are_enough_to_load_and_the_loaded_key_draws_the_same(path):
    tree = state()
    save(path, tree, metadata={})
    loaded = load(path, jax.eval_shape(lambda: tree))
    assert_same(loaded, tree)
    np.testing.assert_array_equal(jax.random.normal(loaded.key), jax.random.normal(tree.key))


def test_training_goes_on_identically_from_the_file(path):
    optimizer = optax.adam(0.1)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # optax needs it
    def step(state):
        params, moments, key = state
        key, draw = jax.random.split(key)
        grads = params + jax.random.normal(draw, params.shape)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, key

    start = (jnp.ones(5), optimizer.init(jnp.ones(5)), jax.random.key(0))
    middle = step(step(start))
    save(path, middle, metadata={})
    assert_same(step(load(path, start)), step(middle))


def test_the_file_is_a_plain_npz_with_a_schema_entry(path):
    save(path, small(), metadata=METADATA)
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["tree['a']"], [1.5, -2.0])
        header = json.loads(archive["header"].tobytes())
    assert (header["schema"], header["version"]) == ("regjax.checkpoint", 1)
    assert header["leaves"][0] == {"name": "tree['a']", "dtype": "float32", "shape": [2]}


def test_a_flipped_bit_in_any_byte_is_reported_or_harmless(path):
    save(path, small(), metadata=METADATA)
    whole = path.read_bytes()
    reported = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = load(path, small())
        except CheckpointError:
            reported += 1
        else:  # a time stamp, say
            assert_same(loaded, small())
            assert read_metadata(path) == METADATA
    assert reported > 0.7 * len(whole)


def test_a_flipped_byte_of_the_data_is_reported_as_damage(path):
    save(path, small(), metadata=METADATA)
    whole = path.read_bytes()
    position = whole.index(small()["a"].tobytes())
    path.write_bytes(whole[:position] + b"\1" + whole[position + 1 :])
    assert "must be a whole checkpoint, got a damaged file" in message(path)
    assert read_metadata(path) == METADATA  # reads no array


def test_every_truncation_is_reported(path):
    save(path, small(), metadata=METADATA)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert ("damaged" in message(path)) or 0 < length < 4


def test_what_is_not_a_checkpoint_says_so(tmp_path, path):
    assert "no such file" in message(path)
    assert "a regular file, got a folder" in message(tmp_path)
    path.write_text("a text")
    assert "got another kind of file" in message(path)
    np.savez(path, weights=np.ones(3))
    assert "got another kind of file" in message(path)
    for text in (b"\xff{", b"[1]", b'{"schema": "other"}'):
        np.savez(path, header=np.frombuffer(text, np.uint8))
        assert "got another kind of file" in message(path)
    np.savez(path, header=np.array([None]))
    assert "Object arrays cannot be loaded" in message(path)


def test_a_later_version_is_named(path, monkeypatch):
    monkeypatch.setattr(_files, "_VERSION", 2)
    save(path, small(), metadata={})
    monkeypatch.undo()
    assert "must have schema version 1, the one that this regjax reads, got 2" in message(path)
    with pytest.raises(CheckpointError, match="version 1"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("like", "text"),
    [
        ({"a": jnp.ones(3), "b": jax.random.key(0)}, r"tree['a'] must have shape [3], got [2]."),
        ({"a": np.ones(2), "b": jax.random.key(0)}, "must have dtype float64, got float32."),
        ({"a": np.ones(2, np.int32), "b": jax.random.key(0)}, "dtype int32, got float32."),
        ({"a": 1.0, "b": jax.random.key(0)}, "tree['a'] must have shape [], got [2]."),
        ({**small(), "b": jax.random.key(0, impl="rbg")}, "dtype key<rbg>, got key<fry>."),
        ({**small(), "b": jnp.zeros(2, jnp.uint32)}, "tree['b'] must have shape [2], got []."),
        ({"a": small()["a"]}, "it must have no leaf tree['b'], got a file with it."),
        ({**small(), "c": 1}, "the leaf tree['c'] must be there, got a file without it."),
        (State(*small().values()), "the leaf tree.weights must be there, got a file without it."),
    ],
)
def test_a_checkpoint_of_another_model_names_leaf_rule_and_value(path, like, text):
    save(path, small(), metadata={})
    assert text in message(path, like)


def test_float64_without_x64_is_an_error_and_not_a_silent_cast(path):
    array = np.float64([0.1])
    save(path, array, metadata={})
    with pytest.raises(CheckpointError, match=r"jax_enable_x64: the leaf tree has dtype float64"):
        load(path, jax.ShapeDtypeStruct((1,), np.float64))
    with jax.enable_x64(True):
        loaded = load(path, jax.ShapeDtypeStruct((1,), np.float64))
        assert words(np.asarray(loaded)) == words(array)


@pytest.mark.parametrize("leaf", ["text", np.array(["text"]), np.array([None]), object()])
def test_leaves_that_are_not_numbers_are_refused_before_anything_is_written(path, leaf):
    with pytest.raises(TypeError, match=r"`tree\['a'\]` must be an array of numbers"):
        save(path, {"a": leaf}, metadata={})
    assert not path.exists()


def test_arguments_of_save_are_checked(path):
    with pytest.raises(TypeError, match="`metadata` must be a dict"):
        save(path, small(), metadata=[1])
    with pytest.raises(TypeError, match=r"`metadata` must be what JSON can hold, got .*PosixPath"):
        save(path, small(), metadata={"out": path})
    with pytest.raises(ValueError, match=r"`tree\['a'\]` must fit into 64 bits"):
        save(path, {"a": 2**63}, metadata={})
    with pytest.raises(CheckpointError, match="must be writable, got No such file or directory"):
        save(path / "below", small(), metadata={})


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    save(path, small(), metadata=METADATA)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="must be writable, got File too large"):
            save(path, np.ones(100_000), metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(load(path, small()), small())
    assert os.listdir(path.parent) == [path.name]


def start(script, path):
    code = f"""
import io, os, signal, sys
import numpy as np
from regjax import _archive as archive, _files as files
save, path = files.save, sys.argv[1]
{script}
"""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )


def test_a_process_killed_halfway_through_writing_leaves_the_previous_file(path):
    script = """
write = archive.write

def half(file, arrays):
    whole = io.BytesIO()
    write(whole, arrays)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

for step in range(3):
    archive.write = half if step == 2 else write
    save(path, np.full(1000, step), metadata={"step": step})
"""
    with start(script, path) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert read_metadata(path) == {"step": 1}
    np.testing.assert_array_equal(load(path, np.zeros(1000, int)), np.ones(1000))


def test_a_process_killed_at_any_time_leaves_the_last_file_it_reported(path):
    script = """
for step in range(10**9):
    save(path, np.full(500_000, step), metadata={"step": step})
    print(step, flush=True)
"""
    with start(script, path) as process:
        reported = [int(process.stdout.readline()) for _ in range(5)][-1]
        process.kill()
        reported = max([reported, *map(int, process.stdout.read().split())])
    step = read_metadata(path)["step"]
    assert step in (reported, reported + 1)
    np.testing.assert_array_equal(load(path, np.zeros(500_000, int)), np.full(500_000, step))


def test_the_file_is_what_numpy_writes(path):
    """Fortran order, no dimension, no element, and big-endian numbers."""
    tree = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.float32(3),
        "c": np.zeros((0, 2)),
        "d": np.arange(3, dtype=">i4"),
    }
    save(path, tree, metadata={})
    with np.load(path) as archive:
        for name, leaf in tree.items():
            stored = archive[f"tree['{name}']"]
            assert (stored.dtype, stored.shape) == (leaf.dtype, leaf.shape)
            np.testing.assert_array_equal(stored, leaf)
