"""Numbers of eigenvalues and curves against exact spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from regjax.curvature._quadrature import gauss_rule, known, mass_up_to, open_share
from tests.curvature.test_density import operator_of, solve, spectrum


def lanczos(places, masses, num_steps):
    """The recurrence of a measure, in float64."""
    row = np.sqrt(masses / masses.sum())
    rows, alphas, betas = [row], [], []
    for _ in range(num_steps):
        image = places * rows[-1]
        alphas.append(rows[-1] @ image)
        for _ in range(2):
            image = image - np.array(rows).T @ (np.array(rows) @ image)
        betas.append(np.linalg.norm(image))
        rows.append(image / betas[-1])
    return np.array(alphas), np.array(betas)


MEASURES = {
    "flat": np.linspace(-1, 5, 200),
    "crowded": np.random.default_rng(0).normal(size=200) ** 5,
    "two bands": np.concatenate([np.linspace(-2, -1, 60), np.linspace(3, 4, 140)]),
    "cluster": np.concatenate([np.linspace(-1e-3, 1e-3, 180), np.geomspace(0.01, 1, 20)]),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("num_steps", [1, 2, 9, 30])
def test_the_mass_lies_between_its_bounds_everywhere(name, num_steps):
    # Half of a unit in the last weight, or the copies behind a rule's last node, would fail.
    places = np.sort(MEASURES[name])
    masses = np.random.default_rng(1).chisquare(1, size=places.size)
    masses /= masses.sum()
    probe = known(*lanczos(places, masses, num_steps))
    for nodes, weights in probe.rules:  # all rules have the measure's moments
        assert np.sum(weights) == pytest.approx(1, abs=1e-12)
        assert weights @ nodes == pytest.approx(masses @ places, rel=1e-9, abs=1e-12)
    ends = np.ptp(places) * np.array([1e-3, 0.1, 1e3])
    middles = np.concatenate(
        [places[0] - ends[::-1], (places[1:] + places[:-1]) / 2, places[-1] + ends]
    )
    exact = np.concatenate([[0, 0, 0], np.cumsum(masses)[:-1], [1, 1, 1]])
    estimate, least, most = mass_up_to(probe, middles, 2e-16)
    assert np.all(least <= exact + 1e-10)
    assert np.all(most >= exact - 1e-10)
    assert np.all((least <= estimate) & (estimate <= most))
    # They are bounds, and not the whole range.
    if num_steps == 30:
        assert np.mean(most - least) < 0.4
        assert np.max(np.abs(estimate - exact)) < 0.6 * np.max(most - least) + 0.05


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_open_is_the_largest_mass_at_a_place(name):
    places = np.sort(MEASURES[name])
    alphas, betas = lanczos(places, np.ones(places.size), 12)
    at = np.quantile(places, [0.1, 0.37, 0.8])
    matrix = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    # The last diagonal entry that puts a node there (Golub 1973), and its weight.
    expected = []
    for place in at:
        unit = np.eye(12)[-1]
        end = place - betas[-1] ** 2 * (unit @ np.linalg.solve(place * np.eye(12) - matrix, unit))
        larger = np.zeros((13, 13))
        larger[:12, :12], larger[12, 12] = matrix, end
        larger[11, 12] = larger[12, 11] = betas[-1]
        nodes, vectors = np.linalg.eigh(larger)
        expected.append(vectors[0, np.argmin(np.abs(nodes - place))] ** 2)
    padded = [jnp.asarray(np.append(part, [0, 0, 0]), jnp.float32) for part in (alphas, betas)]
    found = open_share(*padded, jnp.int32(12), jnp.asarray(at, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    nodes, weights = gauss_rule(*padded, jnp.int32(12))
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(nodes[:12], values, atol=1e-5 * np.abs(values).max())
    np.testing.assert_allclose(weights[:12], vectors[0] ** 2, atol=1e-5)
    np.testing.assert_array_equal(nodes[12:], np.repeat(nodes[11], 3))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"num_steps": 12},
        {"num_steps": 15, "deflate": 0},
    ],
)
def test_counts_are_right_within_their_bounds_and_errors(options):
    eigenvalues = spectrum(600)
    low = np.array([-np.inf, -np.inf, -0.02, 0.02, 0.1, 5.0])
    high = np.array([-0.02, 0.0, 0.02, 0.1, np.inf, np.inf])
    exact = np.sum(
        (eigenvalues[:, None] > low) & (eigenvalues[:, None] <= high), 0, dtype=np.float32
    )
    # Steps that are chosen are many.
    for seed in range(4 if options else 2):
        density = solve(eigenvalues, seed, **options)
        count = curvature.eigenvalue_count(density, low, high)
        assert np.all(exact >= count.lower_bound - 4 * count.standard_error - 0.1)
        assert np.all(exact <= count.upper_bound + 4 * count.standard_error + 0.1)
        assert np.all((count.value >= count.lower_bound) & (count.value <= count.upper_bound))
        # Outliers that were taken out count exactly.
        if "deflate" not in options:
            assert float(count.upper_bound[-1]) == pytest.approx(3, abs=0.05)


def test_all_eigenvalues_are_between_the_infinities():
    count = curvature.eigenvalue_count(solve(spectrum(), num_steps=5))
    assert [float(field) for field in count] == [300, 0, 300, 300]


def test_what_was_taken_out_too_early_widens_the_bounds():
    # A pair with a large residual norm next to the place: nobody knows on which side it is.
    density = solve(spectrum(), num_steps=20)
    plain = curvature.eigenvalue_count(density, high=8.9)
    coupled = density._replace(residual_norms=density.residual_norms.at[2].set(0.2))
    wide = curvature.eigenvalue_count(coupled, high=8.9)
    assert float(plain.upper_bound) == pytest.approx(297, abs=0.1)
    assert float(wide.lower_bound) <= 297 <= float(wide.upper_bound) - 0.9


def same_kernel(curve, eigenvalues):
    """The exact density through the kernel of the curve."""
    grid, widths = np.asarray(curve.grid, np.float64), np.asarray(curve.kernel_width, np.float64)
    threshold = float(curve.linear_threshold)
    if np.isinf(threshold):
        place, slope = (lambda x: x), 1.0
    else:
        place, slope = (lambda x: np.arcsinh(x / threshold)), 1 / np.hypot(grid, threshold)
    own = np.interp(place(eigenvalues), place(grid), widths)
    distance = (place(grid)[:, None] - place(eigenvalues)) / own
    return slope * np.mean(np.exp(-0.5 * distance**2) / (own * np.sqrt(2 * np.pi)), 1)


@pytest.mark.parametrize("scale", ["linear", "symlog"])
@pytest.mark.parametrize("num_steps", [12, 40])
def test_the_band_holds_the_exact_curve(scale, num_steps):
    inside, widths = [], []
    for seed in range(4):
        curve = curvature.density_curve(
            solve(spectrum(600), seed, num_steps=num_steps), axis_scale=scale
        )
        exact = same_kernel(curve, spectrum(600))
        shown = exact > 1e-4 * exact.max()
        inside.append(np.mean(((curve.band_low <= exact) & (exact <= curve.band_high))[shown]))
        # A band that holds everything would be no help.
        widths.append(np.median(curve.band_high[shown] / exact[shown]))
        assert np.trapezoid(curve.density, curve.grid) == pytest.approx(1, abs=0.01)
        assert np.all(np.diff(curve.grid) > 0)
    assert np.mean(inside) > 0.93
    assert np.mean(widths) < 3


def test_curve_is_the_sum_of_gaussians_of_the_stated_width():
    eigenvalues = np.array([-4.0, 0.0, 1.0, 9.0, 20.0])
    density = solve(eigenvalues)
    grid = np.linspace(-5, 21, 50)
    curve = curvature.density_curve(density, grid=grid, kernel_width=0.3)
    expected = same_kernel(curve, eigenvalues)
    np.testing.assert_allclose(curve.density, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(curve.kernel_width, 0.3, rtol=1e-6)
    assert np.isinf(curve.linear_threshold)


def test_a_flat_spectrum_is_drawn_flat():
    # Each of the 20 nodes for itself would be dips of two decades.
    density = solve(np.linspace(-1, 5, 400), num_steps=20, deflate=0)
    curve = curvature.density_curve(density)
    middle = (curve.grid > 0) & (curve.grid < 4)
    assert np.ptp(np.log(np.asarray(curve.density)[middle])) < np.log(3)


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_nothing_is_drawn_below_the_least_eigenvalue_beyond_the_kernel(scale):
    density = solve(np.abs(spectrum(600)), num_steps=40)
    curve = curvature.density_curve(density, axis_scale=scale)
    place = np.asarray(curve.grid[0])
    if scale == "symlog":
        place = np.arcsinh(place / np.asarray(curve.linear_threshold))
    assert 0 > place >= -3.05 * float(curve.kernel_width[0])


def test_error_texts():
    density = solve(spectrum(), num_steps=4, num_probes=1, deflate=0)
    with pytest.raises(ValueError, match="`axis_scale` must be one of linear, symlog, got 'log'"):
        curvature.density_curve(density, axis_scale="log")
    with pytest.raises(ValueError, match=r"`kernel_width` must be .*, got -1\.0"):
        curvature.density_curve(density, kernel_width=-1.0)
    with pytest.raises(ValueError, match="`grid` must be ascending"):
        curvature.density_curve(density, grid=[1.0, 0.0])
    with pytest.raises(ValueError, match=r"`low` must be at most `high`, got 2\.0 and 1\.0"):
        curvature.eigenvalue_count(density, 2.0, 1.0)
    with pytest.raises(ValueError, match="`low` must be at most `high`"):
        curvature.eigenvalue_count(density, np.nan)
    with pytest.raises(ValueError, match="`density` must be concrete arrays"):
        jax.jit(curvature.eigenvalue_count)(density)
    nothing = density._replace(num_steps=jnp.zeros_like(density.num_steps))
    with pytest.raises(ValueError, match="`density` must have a finished probe"):
        curvature.density_curve(nothing)


def test_layers_need_no_options():
    operator = operator_of(np.arange(6.0))
    for layer in curvature.by_block(operator).values():
        density = curvature.spectral_density(layer, key=jax.random.key(0))
        assert float(curvature.eigenvalue_count(density, 2.5, 10).value) == pytest.approx(3)
