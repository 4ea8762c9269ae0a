"""Whether a picture that is drawn now still is the one that was committed.

Numbers differ in their last digits from one processor to another, and so do pixels. So pictures are
compared as seen from afar: by the mean colour of squares of some pixels, of which few may differ.
What the drawing code changes (a size, a label, a legend, a colour, a scale) changes many.
"""

import io

import numpy as np
from matplotlib.image import imread

_SQUARE = 8
# Of 1, by which a square's colour may differ, and the share of the squares that may by more.
# Numbers that are off by a thousandth change none; another word on an axis, or another size of it,
# three in a thousand.
_COLOUR, _SHARE = 0.03, 0.002


def difference(committed, drawn, tolerance=0.0):
    """What differs between two PNGs (bytes) in words; nothing if they are the same from afar.

    `tolerance` is the relative one of what is drawn: with 3 % 3 % of the squares change.
    """
    one, other = (imread(io.BytesIO(png), format="png")[..., :3] for png in (committed, drawn))
    if one.shape != other.shape:
        return f"the size, {one.shape[:2]} and {other.shape[:2]}"
    off = np.abs(_squares(one) - _squares(other)).max(-1) > _COLOUR
    if off.mean() <= _SHARE + tolerance:
        return ""
    where = np.argwhere(off).mean(0) * _SQUARE
    return f"{off.mean():.1%} of the picture, around row {where[0]:.0f} and column {where[1]:.0f}"


def _squares(pixels):
    height, width = (size // _SQUARE for size in pixels.shape[:2])
    cut = pixels[: height * _SQUARE, : width * _SQUARE]
    return cut.reshape(height, _SQUARE, width, _SQUARE, -1).mean((1, 3))
