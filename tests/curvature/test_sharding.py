"""Curvature of data divided over devices: the numbers of one device, at a share of the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from regjax import _sharding
from regjax._space import Space
from regjax.experiments import SpectrumSettings, UsageError
from regjax.experiments._validation import validate
from tests import processes
from tests.curvature import sharded

run = functools.partial(processes.run, "tests.curvature.sharded")


@pytest.fixture(scope="module")
def on_eight_devices(request):
    (printed,) = run(",".join(processes.selected(request, "name")), 8)
    return printed


@pytest.mark.parametrize("name", sharded.QUICK + sharded.OPTIMIZED)
def test_on_eight_devices(on_eight_devices, name):
    assert f"{name} passed" in on_eight_devices, on_eight_devices[-5000:]


def test_across_processes():
    for printed in run("processes", 1, num_processes=2):
        assert "processes passed" in printed, printed[-5000:]


def test_one_device_has_no_placement():
    assert _sharding.find((jnp.ones(3),), {"w": jnp.ones(2)}) is None
    space, rows = Space.of(jnp.ones(5)), jnp.ones((2, 5))
    assert space.length == 5
    for function in (space.shard, space.gather, space.constrain):
        assert function(rows) is rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "data"}, "--mesh must be data=N"),
        ({"mesh": "data=0"}, "--mesh must be data=N"),
        ({"mesh": "model=2"}, "--mesh must be data=N"),
        ({"mesh": "data=4096"}, "as many devices as there are, .*JAX_NUM_CPU_DEVICES=4096"),
    ],
)
def test_errors_of_the_command_line(options, words):
    with pytest.raises(UsageError, match=words):
        validate(SpectrumSettings(**options))


def test_examples_that_do_not_divide_evenly_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [None] * 8)
    validate(SpectrumSettings(mesh="data=8", curvature_examples=24))
    with pytest.raises(UsageError, match=r"--curvature-examples must be a multiple .* 8, got 20"):
        validate(SpectrumSettings(mesh="data=8", curvature_examples=20))


def test_constants_of_a_program_are_put_nowhere():
    """The devices of its mesh may be those of a machine that is not here."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    place = lambda leaf: _sharding.place(leaf, mesh, PartitionSpec())
    zeros, kinds = np.zeros(3), []
    jax.make_jaxpr(lambda: kinds.append(type(place(zeros))))()
    assert kinds == [np.ndarray]
    assert place(zeros).sharding.mesh == mesh  # elsewhere it is an array there
