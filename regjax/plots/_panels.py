"""What a figure of spectra shows of one setting, and panels made of densities alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from regjax._printing import legible
from regjax.plots._style import check_panels

if TYPE_CHECKING:
    from regjax.curvature import DensityCurveResult, DensityResult

# Of a density's own eigenvalues as many are shown, of up to hundreds.
_NUM_LARGEST = 10


@legible
class SpectrumPanel(NamedTuple):
    """What `spectrum_figure` shows of one setting, where the density alone is not enough.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> top = curvature.top_eigenpairs(hessian, 3, key=jax.random.key(1))
      >>> curve = curvature.density_curve(density)
      >>> panel = plots.SpectrumPanel("sgd", curve, top.values, top.residual_norms)
      >>> print(panel.label, panel.curve.density.shape)
      sgd (512,)

    Attributes:
      label: name of the setting.
      curve: its spectral density, from `curvature.density_curve`.
      eigenvalues: (k,), in the order in which they are numbered, or None.
      residual_norms: (k,), error bounds of the eigenvalues, or None.
    """

    label: str
    curve: "DensityCurveResult"
    eigenvalues: ArrayLike | None = None
    residual_norms: ArrayLike | None = None


def panels_of(
    panels: "DensityResult | Mapping[str, DensityResult] | Sequence[SpectrumPanel]",
    axis_scale: str,
) -> Sequence[SpectrumPanel]:
    """Makes panels of densities: their curves, and the largest eigenvalues that they took out.

    Args:
      panels: of `spectrum_figure`.
      axis_scale: of the curves that are made here.
    """
    if hasattr(panels, "eigenvalue_weights"):
        panels = cast("Mapping[str, DensityResult]", {"": panels})
    if not isinstance(panels, Mapping):
        check_panels(panels, SpectrumPanel)
        return panels
    if not panels:
        raise ValueError("`panels` must have at least one density, got none.")
    return [_panel(label, density, axis_scale) for label, density in panels.items()]


def _panel(label: str, density: "DensityResult", axis_scale: str) -> SpectrumPanel:
    # Here, for the figures of losses and monitors do without it.
    from regjax.curvature import density_curve

    if not hasattr(density, "eigenvalue_weights"):
        raise TypeError(
            f"`panels[{label!r}]` must be from `curvature.spectral_density`, got a "
            f"{type(density).__name__}."
        )
    curve = density_curve(density, axis_scale=axis_scale)
    count = min(int(density.num_eigenvalues), _NUM_LARGEST)
    found = (np.asarray(part)[:count] for part in (density.eigenvalues, density.residual_norms))
    return SpectrumPanel(label, curve, *found) if count else SpectrumPanel(label, curve)
