"""Parameters divided over devices: the numbers of one device, each device its own shards."""

import functools

import pytest

from tests import processes
from tests.curvature import divided

run = functools.partial(processes.run, "tests.curvature.divided")


@pytest.fixture(scope="module")
def on_eight_devices(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGJAX_TEST_FOLDER", str(tmp_path_factory.mktemp("checkpoints")))
        (printed,) = run(",".join(processes.selected(request, "name")), 8)
    return printed


@pytest.mark.parametrize("name", divided.QUICK + divided.OPTIMIZED)
def test_on_eight_devices(on_eight_devices, name):
    assert f"{name} passed" in on_eight_devices, on_eight_devices[-5000:]


@pytest.mark.parametrize(
    ("num_processes", "names"),
    [(2, "checkpoints"), pytest.param(4, "processes", marks=pytest.mark.slow)],
)
def test_across_processes(num_processes, names, tmp_path, monkeypatch):
    monkeypatch.setenv("REGJAX_TEST_FOLDER", str(tmp_path))
    for printed in run(names, 4 // num_processes, num_processes=num_processes):
        assert f"{names} passed" in printed, printed[-5000:]
