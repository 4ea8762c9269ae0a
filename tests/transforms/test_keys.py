"""Words of keys and back."""

import jax
import numpy as np
import pytest

from regjax.transforms import _keys

GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")


@pytest.mark.parametrize("generator", GENERATORS)
def test_words_go_back_to_the_same_key(generator):
    key = jax.random.key(7, impl=generator)
    words = _keys.words(key)
    assert words.dtype == np.uint32
    for back in (_keys.typed(words, key), jax.jit(lambda w: _keys.typed(w, key))(words)):
        assert back.dtype == key.dtype
        np.testing.assert_array_equal(jax.random.key_data(back), words)
    words.delete()  # states are donated
    assert not jax.random.key_data(key).is_deleted()


def test_without_an_example_the_default_generator_goes_first():
    keys = {name: jax.random.key(7, impl=name) for name in GENERATORS}
    back = lambda name: str(jax.random.key_impl(_keys.typed(_keys.words(keys[name]))))
    assert back("threefry2x32") == "threefry2x32"
    assert back("rbg") == back("unsafe_rbg") == "rbg"
    with jax.default_prng_impl("unsafe_rbg"):
        assert back("unsafe_rbg") == "unsafe_rbg"
        assert back("threefry2x32") == "threefry2x32"
    with pytest.raises(ValueError, match=r"`state.key_data` must have 2 or 4 words, got 3"):
        _keys.typed(jax.numpy.zeros(3, jax.numpy.uint32))
