"""The figure of a monitor: what is drawn, and what is left out."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from regjax import plots

ROWS = [
    {"step": 0, "sharpness": 2.0, "sharpness_error_bound": 0.1, "sharpness_converged": 1.0,
     "stability_threshold": 5.0, "skipped": 0.0},
    {"step": 10, "skipped": 1.0},
    {"step": 20, "sharpness": 4.0, "sharpness_error_bound": 0.2, "sharpness_converged": 0.0,
     "stability_threshold": 5.0, "skipped": 0.0},
]  # fmt: skip


def test_lines_bands_flags_and_thresholds():
    axes = Figure().subplots()
    plots.draw_monitor(ROWS, "sharpness", axes=axes, label="run")
    line, flagged, threshold = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [20, 4]])
    np.testing.assert_array_equal(flagged.get_xydata(), [[20, 4]])
    np.testing.assert_array_equal(threshold.get_ydata(), [5, 5])
    (band,) = axes.collections
    np.testing.assert_allclose(band.get_datalim(axes.transData).intervaly, [1.9, 4.2])
    assert line.get_label() == "run"


def test_a_panel_for_each_number_and_a_legend_for_several_runs():
    rows = [{**row, "loss": 1.0, "gradient_share": 0.5} for row in ROWS]
    figure = plots.monitor_figure({"a": rows, "b": ROWS})
    shown = [axes.get_ylabel() for axes in figure.axes if axes.axison]
    assert shown == ["loss", "largest eigenvalue", "gradient in the\nleading eigenspace"]
    marks = ["one error to either side", "not converged or not resolved", "stable below"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", *marks]
    single = plots.monitor_figure({"a": rows}, figure_width=3.3)
    assert [text.get_text() for text in single.legends[0].get_texts()] == marks
    # What is not there is not explained.
    losses = [{"step": step, "loss": 1.0 + step} for step in range(3)]
    assert not plots.monitor_figure({"a": losses}).legends


def test_bad_arguments():
    axes = Figure().subplots()
    with pytest.raises(ValueError, match="`name` must be a number of the rows, got 'trace'"):
        plots.draw_monitor(ROWS, "trace", axes=axes)
    for runs in ({}, {"a": [{"step": 0.0}]}):
        with pytest.raises(ValueError, match="`runs` must hold rows with one of loss"):
            plots.monitor_figure(runs)
    with pytest.raises(ValueError, match="`figure_width` must be positive"):
        plots.monitor_figure({"a": ROWS}, figure_width=0)
