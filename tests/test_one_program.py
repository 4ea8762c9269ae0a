"""Functions that are one program outside of a jit, and compiled quickly where arrays are small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import _one_program
from regjax._one_program import one_program
from regjax._space import Space
from tests.compilations import programs


@pytest.fixture
def compiled(monkeypatch):
    """The options of each program that is compiled."""
    seen, jit = [], jax.jit

    def noting(function, **options):
        seen.append(options.get("compiler_options"))
        return jit(function, **options)

    monkeypatch.setattr(_one_program.jax, "jit", noting)
    return seen


def halved(x, times=1):
    return jnp.sum(jnp.sin(x)) * 0.5**times


@pytest.mark.optimized
def test_small_arrays_are_compiled_quickly_once(compiled):
    function = one_program(static="times")(halved)
    x = jnp.arange(101.0)
    with programs() as names:
        found = [function(x, times=2), function(x, times=2)]
    assert names.count("halved") == 1
    np.testing.assert_allclose(found, np.sin(np.arange(101.0)).sum() / 4, rtol=1e-4)
    assert compiled[0] is None
    assert compiled[1]["xla_backend_optimization_level"] == 0
    assert len(compiled) == 2
    assert function._cache_size() == 1
    function.clear_cache()
    assert function._cache_size() == 0


def test_large_arrays_and_parts_of_programs_are_compiled_for_speed(compiled, monkeypatch):
    function = one_program()(halved)
    in_program = jax.vmap(function)(jnp.ones((3, 5))), jax.grad(function)(jnp.ones(5))
    assert in_program[0].shape == (3,)
    jax.make_jaxpr(function)(jnp.ones(5))
    monkeypatch.setattr(_one_program, "_SMALL", 100)
    assert function(jnp.ones(101)).shape == ()
    assert compiled == [None]
    function(jnp.ones(100))
    assert len(compiled) == 2


@pytest.mark.optimized
def test_the_effort_is_that_of_the_compiler(compiled):
    one_program(effort=1)(halved)(jnp.ones(7))
    assert compiled[1]["xla_backend_optimization_level"] == 1


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(_one_program, "_QUICK", {"xla_of_another_version": 1})
    donated = one_program(donate="x")(lambda x: x + 1)
    np.testing.assert_array_equal(donated(jnp.zeros(3)), np.ones(3))
    assert _one_program._QUICK == {}
    np.testing.assert_array_equal(donated(jnp.ones(3)), np.full(3, 2))


def test_an_error_of_the_program_itself_is_no_option():
    def refuse(x):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    known = dict(_one_program._QUICK)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        one_program()(refuse)(jnp.ones(3))
    assert known == _one_program._QUICK


@pytest.mark.optimized
def test_normal_numbers_round_alike_in_small_and_large_programs():
    space, key = Space.of(jnp.zeros(3000)), jax.random.key(3)
    np.testing.assert_array_equal(space.normal(key), jax.jit(space.normal)(key))
