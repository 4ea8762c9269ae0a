import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature, plots

VALUE = np.array([[0, 0.5, 1], [0.5, 0, 0.25], [1, 0.25, 0]])


def result(grid):
    density = np.stack([np.exp(-0.5 * (np.linspace(-3, 3, 40) - i) ** 2) for i in range(3)])
    zeros = np.zeros((3, 3))
    return curvature.DensityDistancesResult(
        *(jnp.asarray(array, jnp.float32) for array in (VALUE, zeros, 0.5, grid, density))
    )


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_the_map_has_the_distances_and_the_curves_the_densities(scale, tmp_path):
    grid = np.linspace(-3, 3, 40)
    found = result(grid if scale == "linear" else 1e-3 * np.sinh(3 * grid))
    figure = plots.distance_figure(found, ["a", "b", "c"])
    left, right = figure.axes[:2]
    np.testing.assert_allclose(right.images[0].get_array(), VALUE)
    assert [text.get_text() for text in right.get_xticklabels()] == ["a", "b", "c"]
    assert sorted(text.get_text() for text in right.texts)[:4] == ["0.00", "0.00", "0.00", "0.25"]
    assert left.get_xscale() == scale
    for line, curve in zip(left.lines, np.asarray(found.density), strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve)
    figure.savefig(tmp_path / "blocks.png")


def test_error_texts():
    with pytest.raises(ValueError, match="`labels` must be as many as the densities, 3, got 1"):
        plots.distance_figure(result(np.arange(40.0)), ["a"])
    with pytest.raises(ValueError, match="`figure_width` must be positive, got 0"):
        plots.distance_figure(result(np.arange(40.0)), ["a", "b", "c"], figure_width=0.0)
