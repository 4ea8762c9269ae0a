"""A masked loss of a scanned decoder: one matrix, however the data are gone over."""

import re

import numpy as np
import pytest

from tests import processes
from tests.curvature import decoder_runs


@pytest.fixture(scope="module")
def printed():
    (text,) = processes.run("tests.curvature.decoder_runs")
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", decoder_runs.NAMES)
def test_every_way_gives_the_spectrum_of_the_whole_batch(printed, name):
    found = re.search(rf"^{re.escape(name)}: (\S+)$", printed, re.M)
    assert found, printed[-5000:]
    assert found[1] != "failed", printed
    assert float(found[1]) < 1e-9


def test_the_masks_are_ragged_and_some_parts_count_nothing():
    """Else a mean of means would pass."""
    mask = decoder_runs.decoder.texts()[2].sum(1)
    parts = mask.reshape(4, 4).sum(1)
    assert len(set(parts)) == 4
    assert parts[-1] == 0
    assert not np.allclose(parts, parts.mean())
