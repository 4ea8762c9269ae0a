"""Surfaces and probes, read back from the axes."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from regjax import plots

POSITIONS = np.linspace(-1, 1, 21)
# Steeper along the second direction; 0.1 at the origin.
LOSSES = 0.1 + POSITIONS[:, None] ** 2 + 4 * POSITIONS[None, :] ** 2


def test_contours_are_where_the_losses_say():
    axes = plots.draw_surface(
        POSITIONS, LOSSES, axes=Figure().add_subplot(), levels=[0.2, 0.6, 1.1]
    )
    (contours,) = axes.collections
    ellipse = contours.get_paths()[1].vertices
    # 0.1 + a^2 + 4 b^2 = 0.6: the first direction is the horizontal one.
    np.testing.assert_allclose(np.abs(ellipse).max(0), [0.5**0.5, 0.5**0.5 / 2], rtol=0.02)


def test_numbers_at_contours_are_not_cut_off_by_the_edges():
    # Without the margin two of its numbers stand at 0.93 of 1.
    figure = plots.surface_figure([plots.SurfacePanel("a", POSITIONS, 3 * LOSSES)])
    axes = figure.axes[0]
    assert axes.texts
    for number in axes.texts:
        assert np.max(np.abs(number.get_position())) <= 0.8 + 1e-9
        assert number.get_fontsize() >= 7
    assert figure.get_supxlabel() == "numbers: loss; cross: the weights"


def test_losses_that_are_not_finite_leave_a_hole_and_levels_are_geometric():
    losses = LOSSES.copy()
    losses[0, 0], losses[-1, -1] = np.nan, np.inf
    figure = Figure()
    axes = plots.draw_surface(POSITIONS, losses, axes=figure.add_subplot())
    levels = axes.collections[0].levels
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0])
    np.testing.assert_allclose(levels[[0, -1]], [0.1, losses[np.isfinite(losses)].max()])
    solid = plots.draw_surface_3d(
        POSITIONS, losses, axes=figure.add_subplot(projection="3d"), levels=[0.1, 1, 10]
    )
    np.testing.assert_allclose(solid.get_zlim(), [-1, 1])
    negative = plots.draw_surface(POSITIONS, LOSSES - 1, axes=figure.add_subplot())
    np.testing.assert_allclose(np.ptp(np.diff(negative.collections[0].levels)), 0, atol=1e-12)


def test_panels_share_their_levels():
    panels = [plots.SurfacePanel(str(k), POSITIONS, k * LOSSES) for k in (1, 10)]
    flat, solid, second, _ = plots.surface_figure(panels, figure_width=6.8).axes
    np.testing.assert_array_equal(flat.collections[0].levels, second.collections[0].levels)
    np.testing.assert_allclose(flat.collections[0].levels[[0, -1]], [0.1, 51])
    np.testing.assert_allclose(solid.get_zlim(), np.log10([0.1, 51]))
    beside = plots.surface_figure(panels[:1], figure_width=6.8)
    assert beside.get_figwidth() > 1.8 * beside.get_figheight()


def test_probes_are_bands_and_the_largest_smoothness():
    times, losses = np.arange(3), np.asarray([[3.0, 1.0], [2.0, 0.5], [1.0, 0.9]])
    smoothness = np.asarray([[1.0, 2.0], [np.nan, 4.0], [np.nan, np.nan]])
    panels = [plots.ProbePanel(name, times, losses, losses, smoothness) for name in "ab"]
    loss, _, last = plots.probe_figure(panels).axes
    corners = loss.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.5, 3)
    np.testing.assert_array_equal(last.lines[0].get_ydata(), [2, 4, np.nan])
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [2, 1.25, 0.95])  # medians
    (legend,) = plots.probe_figure(panels).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


@pytest.mark.parametrize("width", [3.3, 6.8])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_everything_stays_inside_of_a_column_and_a_page(width, count, tmp_path):
    name = "mlp, no normalization, sgd with entropy sgd"
    surfaces = [plots.SurfacePanel(f"item {k}", POSITIONS, LOSSES) for k in range(count)]
    times, values = np.arange(4), 1 + np.random.default_rng(0).random((4, 3))
    probes = [plots.ProbePanel(f"{name} {k}", times, values, values, values) for k in range(count)]
    for figure in (
        plots.surface_figure(surfaces, figure_width=width),
        plots.probe_figure(probes, figure_width=width),
    ):
        figure.savefig(tmp_path / "figure.png")
        box = figure.get_tightbbox()
        assert box.x0 >= -0.02
        assert box.x1 <= width + 0.02
        assert box.y0 >= -0.02
        assert box.y1 <= figure.get_figheight() + 0.02
        assert figure.get_figheight() <= 11


def test_surfaces_wrap_with_their_heights_below_them():
    panels = [plots.SurfacePanel(str(k), POSITIONS, LOSSES) for k in range(3)]
    figure = plots.surface_figure(panels, figure_width=3.3)
    places = [axes.get_subplotspec().get_geometry()[:3] for axes in figure.axes]
    assert places == [(4, 2, 0), (4, 2, 2), (4, 2, 1), (4, 2, 3), (4, 2, 4), (4, 2, 6)]
    assert [axes.get_title() for axes in figure.axes[::2]] == ["0", "1", "2"]
    assert {axes.name for axes in figure.axes[1::2]} == {"3d"}


def test_a_second_band_takes_the_next_colour():
    axes = Figure().add_subplot()
    for label in "ab":
        plots.draw_probe([0, 1], [[1, 2], [2, 3]], axes=axes, label=label)
    first, second = (tuple(band.get_facecolor()[0]) for band in axes.collections)
    assert first != second
    assert axes.get_yscale() == "log"
    plots.draw_probe([0, 1], [[-1, 2], [2, 3]], axes=(flat := Figure().add_subplot()))
    assert flat.get_yscale() == "linear"


def test_bad_input():
    axes = Figure().add_subplot()
    with pytest.raises(ValueError, match=r"`losses` must have shape \(len, len\)"):
        plots.draw_surface(POSITIONS, LOSSES[:3], axes=axes)
    with pytest.raises(ValueError, match="`positions` must be two or more that ascend"):
        plots.draw_surface(POSITIONS[::-1], LOSSES, axes=axes)
    with pytest.raises(ValueError, match="`losses` must be finite at two points"):
        plots.draw_surface(POSITIONS, np.full_like(LOSSES, np.nan), axes=axes)
    with pytest.raises(ValueError, match="`axes` must be three-dimensional"):
        plots.draw_surface_3d(POSITIONS, LOSSES, axes=axes)
    with pytest.raises(ValueError, match="`panels` must have at least one SurfacePanel"):
        plots.surface_figure([])
    wrong = plots.ProbePanel("a", [0, 1], LOSSES, LOSSES, LOSSES)
    with pytest.raises(ValueError, match="`losses` must have shape"):
        plots.probe_figure([wrong])
    with pytest.raises(ValueError, match=r"`values` must have shape .* for 2 times, got \(3, 1\)"):
        plots.draw_probe([0, 1], np.ones((3, 1)), axes=axes)
