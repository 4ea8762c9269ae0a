"""States go through every way in which trainers write them, and the run continues identically."""

import io
import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from regjax import transforms
from tests.registry import ROWS
from tests.test_transform_contract import NAMES, WITH_KEY, assert_same, chain, parameters, run


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The chains around ours are optax's, which promote."""


def through_flax(state, like, path):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def through_flax_state_dict(state, like, path):
    return flax.serialization.from_state_dict(like, flax.serialization.to_state_dict(state))


def through_numpy(state, like, path):
    leaves = jax.tree.leaves(state)
    np.savez(path / "state.npz", *leaves)
    with np.load(path / "state.npz", allow_pickle=False) as file:
        loaded = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def through_equinox(state, like, path):
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, state)
    buffer.seek(0)
    return eqx.tree_deserialise_leaves(buffer, like)


def through_orbax(state, like, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", like)


def through_pickle(state, like, path):
    return pickle.loads(pickle.dumps(state))


WAYS = (
    through_flax,
    through_flax_state_dict,
    through_numpy,
    through_equinox,
    through_orbax,
    through_pickle,
)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_comes_back_and_continues_bit_for_bit(name, tmp_path):
    row, params = ROWS[name], parameters()
    tx = chain(row, row.make())
    middle, state = run(tx, params, 2)
    expected = run(tx, middle, 2, state)
    for way in WAYS:
        loaded = way(state, tx.init(params), tmp_path)
        loaded = jax.tree.map(jnp.asarray, loaded)
        assert_same(loaded, state)
        assert_same(run(tx, middle, 2, loaded), expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_state_holds_a_typed_key(name):
    for leaf in jax.tree.leaves(ROWS[name].make().init(parameters())):
        assert np.asarray(leaf).dtype.isbuiltin


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("name", WITH_KEY)
def test_the_generator_of_the_key_is_kept(name, implementation, monkeypatch):
    seen = []
    for draw in ("split", "fold_in"):
        original = getattr(jax.random, draw)

        def recorded(key, *args, original=original, **options):
            seen.append(str(jax.random.key_impl(key)))
            return original(key, *args, **options)

        monkeypatch.setattr(jax.random, draw, recorded)
    row, params = ROWS[name], parameters()
    if name == "gossip_in_pairs":
        pytest.skip("its key is no part of its state")
    tx = row.make(jax.random.key(7, impl=implementation))
    run(chain(row, tx, optax.sgd(0.1)), params, 2)
    # Lanczos draws its own vectors where a space ends.
    assert set(seen) == {implementation} or (name, seen[0]) == (
        "spectral_controller",
        implementation,
    )


def test_a_controller_is_refreshed_by_hand_with_any_generator():
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.random.key(0, impl=implementation)
        tx = transforms.spectral_controller(key=key, initial_learning_rate=0.1, every=None)
        params = jnp.ones(3)
        curvature = lambda w: jnp.asarray([1.0, 2.0, 5.0]) * w
        state = transforms.refresh_spectral_controller(tx.init(params), curvature, params)
        np.testing.assert_allclose(state.largest, 5.0, rtol=1e-5)
        assert state.key_data.shape == jax.random.key_data(key).shape
