"""What is drawn, read back from the axes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from regjax import curvature, plots

GRID = np.linspace(-1.0, 5.0, 61)


def curve(centre=0.0, height=2.0, threshold=np.inf, grid=GRID):
    density = height * np.exp(-((grid - centre) ** 2) / 0.1)
    density[-5:] = 0.0
    width = np.full(grid.shape, 0.1)
    return curvature.DensityCurveResult(
        grid, density, 0.8 * density, 1.1 * density, width, np.asarray(threshold)
    )


def axes_of(figure=None):
    return (Figure() if figure is None else figure).add_subplot()


def test_density_band_and_eigenvalues_are_where_the_numbers_say():
    ours = curve()
    axes = plots.draw_spectrum(ours, [4.0, 3.0], [0.5, 0.1], axes=axes_of())
    line, ticks = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), GRID)
    expected = np.where(ours.density > 0, ours.density, np.nan)
    np.testing.assert_array_equal(line.get_ydata(), expected)  # zeros leave a gap
    np.testing.assert_array_equal(ticks.get_xdata(), [4, 3])
    band, bars = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].max() == pytest.approx(1.1 * ours.density.max())
    spans = [(segment[0][0], segment[1][0]) for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, [(3.5, 4.5), (2.9, 3.1)])
    assert axes.get_yscale() == "log"
    assert axes.get_xscale() == "linear"


def test_the_axis_ends_below_the_lowest_bump_and_not_in_its_tails():
    density = curve().density + 1e-6 * curve(3.0).density
    ours = curve()._replace(density=density, band_low=density, band_high=density)
    axes = plots.draw_spectrum(ours, axes=axes_of())
    floor, top = axes.get_ylim()
    assert 1e-8 < floor < 2e-6
    assert top > 2


def test_a_second_curve_takes_the_next_colour_and_widens_the_axis():
    axes = plots.draw_spectrum(curve(), [4.0], axes=axes_of(), label="one")
    floor = axes.get_ylim()[0]
    plots.draw_spectrum(curve(2.0, 20.0), [4.5], axes=axes, label="two")
    lines = [line for line in axes.lines if line.get_gid() == "density"]
    assert not same_color(lines[0].get_color(), lines[1].get_color())
    assert axes.get_ylim()[0] <= floor
    assert axes.get_ylim()[1] > 20
    # What band and ticks are is said once.
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(texts) == ["eigenvalues", "error band", "one", "two"]
    heights = [line.get_ydata()[0] for line in axes.lines if line.get_gid() != "density"]
    assert heights[0] != heights[1]  # the eigenvalues of both can be told apart


def test_figure_has_a_density_for_each_setting_and_the_eigenvalues_of_all():
    panels = [
        plots.SpectrumPanel("plain", curve(threshold=0.004), [4.0, 0.01], [0.5, 0.001]),
        plots.SpectrumPanel("sam", curve(1.0, threshold=0.002), [3.0, 0.02], [0.1, 0.001]),
    ]
    figure = plots.spectrum_figure(panels, matrix_name="Gauss-Newton matrix", figure_width=6.8)
    first, second, last = figure.axes
    assert [axes.get_title("left") for axes in (first, second)] == ["plain", "sam"]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim()
    assert second.get_xlabel() == "eigenvalue of the Gauss-Newton matrix"
    assert first.get_xscale() == second.get_xscale() == "symlog"
    # A power of ten above both, for all axes.
    assert first.xaxis.get_transform().linthresh == pytest.approx(0.01)
    assert last.get_yscale() == "symlog"  # they span more than two decades
    values = [container.lines[0].get_ydata() for container in last.containers]
    np.testing.assert_array_equal(values, [[4, 0.01], [3, 0.02]])
    shifted = [container.lines[0].get_xdata() for container in last.containers]
    assert np.all(shifted[0] < shifted[1])
    assert [text.get_text() for text in last.get_legend().get_texts()] == ["plain", "sam"]
    assert last.get_xlabel() == "index (settings side by side)"
    assert figure.get_size_inches()[0] == pytest.approx(6.8)


@pytest.mark.parametrize("width", [3.3, 6.8])
def test_text_stays_inside_of_a_column_and_a_page(width, tmp_path):
    panel = plots.SpectrumPanel("network", curve(), [4.0, 3.0], [0.5, 0.1])
    figure = plots.spectrum_figure([panel], figure_width=width)
    figure.savefig(tmp_path / "figure.png")
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y0 >= -0.01
    assert box.y1 <= figure.get_size_inches()[1] + 0.01


def test_without_eigenvalues_there_is_no_panel_of_them():
    figure = plots.spectrum_figure([plots.SpectrumPanel("network", curve())])
    assert len(figure.axes) == 1


@pytest.mark.parametrize("width", [3.3, 6.8])
@pytest.mark.parametrize("num_panels", [1, 3])
def test_the_lowest_density_has_the_axis_of_the_eigenvalue(width, num_panels, tmp_path):
    panels = [
        plots.SpectrumPanel(f"setting {i}", curve(), [4.0, 3.0], [0.5, 0.1])
        for i in range(num_panels)
    ]
    figure = plots.spectrum_figure(panels, figure_width=width)
    figure.savefig(tmp_path / "figure.png")
    *rows, last = figure.axes
    assert rows[-1].get_xlabel() == "eigenvalue of the Hessian"
    assert any(label.get_text() for label in rows[-1].get_xticklabels() if label.get_visible())
    assert [axes.get_xlabel() for axes in rows[:-1]] == [""] * (num_panels - 1)
    assert last.get_xlabel().startswith("index")
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for one, other in itertools.pairwise(boxes):
        assert not one.overlaps(other)


def test_panels_have_limits_that_hold_all_of_them():
    # The widest comes first: the last one's limits would cut it on all sides.
    wide = np.linspace(-5.0, 9.0, 141)
    panels = [
        plots.SpectrumPanel("wide", curve(height=1e4, grid=wide)),
        plots.SpectrumPanel("narrow", curve(height=1.0)),
    ]
    first, second = plots.spectrum_figure(panels).axes
    for axes in (first, second):
        assert axes.get_ylim()[1] > 1.1e4
        assert axes.get_ylim()[0] < 1
        assert axes.get_xlim()[0] <= -5
        assert axes.get_xlim()[1] >= 9


def test_a_density_alone_is_a_figure():
    law = jax.random.normal(jax.random.key(0), (100,)) ** 5
    hessian = curvature.hessian(lambda w: jnp.sum(law * w**2) / 2, jnp.zeros(100))
    density = curvature.spectral_density(hessian, key=jax.random.key(1), num_steps=10)
    (axes, by_index) = plots.spectrum_figure(density).axes
    expected = curvature.density_curve(density, axis_scale="symlog")
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), expected.grid)
    assert axes.get_xscale() == "symlog"
    assert axes.get_title(loc="left") == ""
    count = int(density.num_eigenvalues)
    assert count > 10
    np.testing.assert_array_equal(by_index.lines[0].get_ydata(), density.eigenvalues[:10])
    few = density._replace(num_eigenvalues=jnp.int32(3))
    both = plots.spectrum_figure({"sgd": density, "sam": few}, axis_scale="linear").axes
    assert [axes.get_title(loc="left") for axes in both[:2]] == ["sgd", "sam"]
    assert both[0].get_xscale() == "linear"
    np.testing.assert_array_equal(both[2].lines[1].get_ydata(), density.eigenvalues[:3])
    without = density._replace(num_eigenvalues=jnp.int32(0))
    assert len(plots.spectrum_figure(without).axes) == 1
    with pytest.raises(
        TypeError, match=r"`panels\['a'\]` must be from `curvature.spectral_density`"
    ):
        plots.spectrum_figure({"a": curve()})
    with pytest.raises(
        TypeError, match="`panels` must be a list of SpectrumPanel, got a Curvature"
    ):
        plots.spectrum_figure(hessian)
    with pytest.raises(ValueError, match="`panels` must have at least one density"):
        plots.spectrum_figure({})


def test_error_texts():
    with pytest.raises(ValueError, match="`panels` must have at least one SpectrumPanel, got none"):
        plots.spectrum_figure([])
    with pytest.raises(TypeError, match="`panels` must be a list of SpectrumPanel, got Density"):
        plots.spectrum_figure([curve()])
    with pytest.raises(TypeError, match="got one SpectrumPanel: pass \\[panel\\]"):
        plots.spectrum_figure(plots.SpectrumPanel("a", curve()))
    with pytest.raises(TypeError, match=r"got one DensityCurveResult: pass \[SpectrumPanel\(label"):
        plots.spectrum_figure(curve())
    with pytest.raises(ValueError, match=r"`curve.density` must be finite, got NaN: the products"):
        plots.draw_spectrum(curve(height=np.nan), axes=axes_of())
    with pytest.raises(ValueError, match="`figure_width` must be positive, got -1"):
        plots.spectrum_figure([plots.SpectrumPanel("a", curve())], figure_width=-1)
    mixed = [plots.SpectrumPanel("a", curve()), plots.SpectrumPanel("b", curve(threshold=1.0))]
    with pytest.raises(ValueError, match="`panels` must have curves of one scale"):
        plots.spectrum_figure(mixed)
    with pytest.raises(ValueError, match=r"`curve` must be from `curvature.density_curve`"):
        plots.draw_spectrum(np.ones(3), axes=axes_of())
    with pytest.raises(ValueError, match=r"`residual_norms` must have the shape .* \(2,\), got"):
        plots.draw_spectrum(curve(), [1.0, 2.0], [1.0], axes=axes_of())
    with pytest.raises(ValueError, match=r"`curve.density` must have the shape .* got \(3,\)"):
        plots.draw_spectrum(curve()._replace(density=np.ones(3)), axes=axes_of())
    with pytest.raises(ValueError, match=r"`curve.density` must be positive somewhere"):
        plots.draw_spectrum(curve(height=0.0), axes=axes_of())


@pytest.mark.parametrize(("width", "least"), [(3.3, 4), (5.0, 3), (6.8, 5)])
def test_labels_of_a_spectrum_over_many_decades_do_not_overlap(width, least):
    grid = np.concatenate([-np.logspace(-0.5, -5, 90), np.logspace(-5, 0.3, 90)])
    ours = curve(threshold=1e-3, grid=grid)
    figure = plots.spectrum_figure([plots.SpectrumPanel("a", ours, [1.0])], figure_width=width)
    figure.draw_without_rendering()
    boxes = [
        label.get_window_extent()
        for label in figure.axes[0].get_xticklabels()
        if label.get_text() and figure.axes[0].bbox.x0 <= label.get_window_extent().x1
    ]
    assert len(boxes) >= least
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
