"""What each number means and what its error covers, said once for the tables' legends and the page.

A row is found by its printed name, with # in place of numbers.
"""

import re
from typing import NamedTuple

BOUND = "± bounds the distance to a true eigenvalue"
DRAW = "± is one standard error from the random probes"
PROBES = f"{DRAW}; what the quadrature leaves open is not included"
OPEN = "[a, b] is what the Lanczos steps leave open"
BRACKET = f"{OPEN}: it is rigorous for the probes that were drawn, and ± comes in addition"
LIMITS = "0.1 and 0.001 times the largest eigenvalue"
DEVIATION = "± is the standard deviation over {count} seeds, {first} to {last}"
PAIRED = "Differences are taken seed by seed, and ± is their standard error"
NO_SEEDS = (
    "All of this is one seed. Other seeds give other numbers, and no ± here says how far apart; "
    "--seeds 5 trains each network five times."
)

SPECTRUM_LEGEND = f"For eigenvalues and sharpness, {BOUND}. Elsewhere {PROBES}."
COUNT_LEGEND = (
    f"The counts divide the axis at {LIMITS}. {BRACKET}. Steps are added until the bracket "
    "is about as narrow as ±, or 320 are made, unless --num-steps is given."
)
DRAWN_LEGEND = (
    "The Fisher matrix is that of {number} drawn label(s) per example: every ± and bracket is "
    "about that matrix, and leaves out how far it is from the exact one (without --num-samples)."
)
GEOMETRY_LEGEND = (
    "Geometric complexity is the mean squared norm of the Jacobian of the outputs with respect to "
    "the inputs. Margins are distances of inputs from the decision boundary of their class, in the "
    "units of the normalized inputs. Compare both at the same scaling of the inputs only."
)
LANDSCAPE_LEGEND = (
    "Directions are random and filter-normalized; width 1 equals the norm of the filters (or "
    "layers). A probe goes 1/2 to 4 learning rates along the gradient."
)
MONITOR_LEGEND = f"{BOUND}; elsewhere it is one standard error. ~ marks what is not to be relied on"


class Meaning(NamedTuple):
    """What a number means.

    Attributes:
      text: one sentence.
      error: what the ± or the bracket beside it covers, without a full stop; "" if it has none.
    """

    text: str
    error: str = ""


_STEP = "along the gradient step of the last probe"
_COUNTED = f"{DRAW}; {OPEN}"
_TOP = "It is the curvature in the steepest direction: small values mean a flat minimum."
_MEANINGS = {
    "loss": Meaning("Mean cross-entropy per example, in nats."),
    "accuracy": Meaning("Share of the examples whose class is predicted correctly."),
    "eigenvalue #": Meaning(
        "The largest eigenvalues of the matrix, in order: the curvature of the loss along their "
        "eigenvectors.", BOUND,
    ),
    "smallest eigenvalue": Meaning(
        "The least value that the Lanczos steps met: the smallest eigenvalue is at most this."
    ),
    "trace": Meaning("Sum of all eigenvalues: the total curvature.", DRAW),
    "mean eigenvalue": Meaning("Trace divided by the number of parameters.", DRAW),
    "effective dimension": Meaning(
        "Number of directions whose curvature is large beside the damping c: the sum of "
        "max(l, 0) / (max(l, 0) + c) over the eigenvalues l.", PROBES,
    ),
    "eigenvalues above #": Meaning(
        "Number of outliers: eigenvalues above a tenth of the largest.", _COUNTED
    ),
    "eigenvalues from # to #": Meaning(
        "Number of eigenvalues in the bulk, from a thousandth to a tenth of the largest.", _COUNTED
    ),
    "eigenvalues within ±#": Meaning(
        "Number of eigenvalues near zero, below a thousandth of the largest: flat directions.",
        _COUNTED,
    ),
    "eigenvalues below -#": Meaning(
        "Number of negative eigenvalues, beyond a thousandth of the largest: along their "
        "eigenvectors the loss curves downwards.",
        _COUNTED,
    ),
    "geometric complexity": Meaning(
        "Mean squared Frobenius norm of the Jacobian of the outputs with respect to the inputs: "
        "compare values only at the same scaling of the inputs."
    ),
    "spherical sharpness": Meaning(
        "Largest Hessian eigenvalue times the squared norm of the weights: rescaling weights that "
        "have no scale, because a normalization divides it out, does not change it.", BOUND,
    ),
    "margin in training": Meaning(
        "Distance of a training input from the decision boundary of its class, in the units of the "
        "normalized inputs; negative if another class wins. 5 % quantile, median, 95 % quantile."
    ),
    "margin in the test": Meaning("The same for the test inputs."),
    "median margin in training": Meaning(
        "Median distance of the training inputs from the decision boundary of their class."
    ),
    "median margin in the test": Meaning("The same for the test inputs."),
    "loss at the minimum": Meaning("Training loss in the middle of the surface, at the network."),
    "largest loss on the surface": Meaning("The largest loss that the surface reaches."),
    "width of {loss < e x minimum}, direction #": Meaning(
        "How far one can go along a random direction, both ways together, before the loss is e "
        "times that of the network; 1 is the norm of the filters. Wide means flat."
    ),
    "gradient norm": Meaning("Euclidean norm of the gradient at the last probe."),
    "loss range along the gradient step": Meaning(
        f"Largest less smallest loss {_STEP}: how well the gradient predicts the loss."
    ),
    "largest change of the gradient": Meaning(
        f"Largest Euclidean distance of a gradient {_STEP} from the one at its start."
    ),
    "effective smoothness": Meaning(
        f"Largest change of the gradient over the length of the step, {_STEP}."
    ),
    "parameters": Meaning("Number of trained weights."),
    "train loss": Meaning("Mean cross-entropy per training example, in nats."),
    "test loss": Meaning("Mean cross-entropy per test example, in nats."),
    "loss gap": Meaning("Test loss less training loss: what did not generalise."),
    "train accuracy": Meaning("Share of the training examples that are classified correctly."),
    "test accuracy": Meaning("Share of the test examples that are classified correctly."),
    "accuracy gap": Meaning("Training accuracy less test accuracy."),
    "largest eigenvalue": Meaning(_TOP, BOUND),
    "batch norm": Meaning("Where the statistics of batch norm come from in the analysis."),
    "examples in the matrix": Meaning("Training examples that the matrix is the mean of."),
    "learned": Meaning("Whether the network is better than a constant guess."),
    "stable up to": Meaning(
        "Largest eigenvalue at which the optimiser still converges on a quadratic loss."
    ),
    "preconditioned eigenvalue": Meaning(
        "Largest eigenvalue of the Hessian as Adam scales it by its second moments.", BOUND
    ),
    "critical sharpness": Meaning(
        "2 over the learning rate beyond which the next step would raise the loss.",
        "[a, b] bounds it",
    ),
    "noise scale": Meaning(
        "Batch size, in examples, at which the noise of the gradient is as large as the gradient.",
        "± is one standard error from the examples",
    ),
    "gradient in top eigenspace": Meaning(
        "Share of the gradient's squared norm that lies along the leading eigenvectors."
    ),
    "largest eigenvalue, monitor": Meaning(f"{_TOP} Measured last while the network trained."),
    "noise scale, monitor": Meaning("The last noise scale: a batch size, in examples."),
    "gradient in top eigenspace, monitor": Meaning("The last share of the gradient."),
}  # fmt: skip

CAPTIONS = {
    "spectrum": (
        "Left: density of the eigenvalues, on logarithmic axes; the band holds the exact curve, "
        "seen through the same kernel, at 95 % of the places. Ticks mark the largest eigenvalues. "
        "Right: the largest eigenvalues in order, with bars for their error bounds."
    ),
    "surface": (
        "Training loss around the network (cross) over two random, filter-normalized directions: "
        "contours, and the same as a surface whose height is the logarithm of the loss."
    ),
    "probes": (
        "Probes along the gradient at each epoch, from 1/2 to 4 learning rates: range and median "
        "of the loss, of the change of the gradient, and the effective smoothness."
    ),
    "monitor": (
        "What was measured while the network trained. Bands are one error to either side; open "
        "circles are not to be relied on."
    ),
}


def meaning(name: str) -> Meaning:
    """Returns what the row of that name means.

    Raises:
      KeyError: nobody has said it.
    """
    key = re.sub(r"(?<![a-z])(\d[\d.e+-]*|nan|inf)", "#", name.strip().removesuffix(", %"))
    for start in ("margin in training", "effective dimension"):  # more is said behind them
        key = start if key.startswith(start) else key
    return _MEANINGS[key]
