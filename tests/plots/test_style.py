"""Axes that all figures share."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from regjax.plots import _style


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.9, 12, ["1", "2", "5", "10"]),
        (7, 400, ["10", "30", "100", "300"]),
        (1.1, 1.9, ["1.2", "1.4", "1.6", "1.8"]),  # no 1, 2 or 5 within
        (3e-5, 4e-4, [r"5$\times$$10^{-5}$", "$10^{-4}$", r"2$\times$$10^{-4}$"]),
        (1e-18, 1, ["$10^{-16}$", "$10^{-12}$", "$10^{-8}$", "$10^{-4}$", "$10^{0}$"]),
    ],
)
@pytest.mark.parametrize("which", ["x", "y"])
def test_logarithmic_ticks_are_few_and_say_their_values(low, high, wanted, which):
    axes = Figure().subplots()
    axes.plot([low, high], [low, high])
    _style.set_log(axes, which)
    axes.set(xlim=(low, high), ylim=(low, high))
    axis = getattr(axes, f"{which}axis")
    inside = [low <= tick <= high for tick in axis.get_majorticklocs()]
    texts = [text.get_text() for text in axis.get_ticklabels()]
    assert list(np.asarray(texts)[inside]) == wanted
    assert not len(axis.get_minorticklocs())
