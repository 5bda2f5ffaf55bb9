"""Pure functions on coords: where cells lie in the source image, how far apart they are, warping.

Two kinds of coords are understood, told apart by their shape:

* a homography, ``(B, 3, 3)``: ``image_from_view``, from the view's unit square to the source image's unit square;
* dense coords, ``(B, 2, H, W)``: x and y of every view pixel's centre in the source's unit square, NaN outside.

Pixel *edges* lie at 0 and 1, so the centre of cell ``(i, j)`` of an ``h x w`` map is ``((j + .5) / w, (i + .5) / h)``.
Everything runs element by element in float32 (float64 stays float64): autocast does not touch element-wise arithmetic,
and the few matrix products are taken outside of it.
"""

from densessl.geometry._points import Size, check_pair, check_precision, checked_size, is_dense, sample_dense
from densessl.geometry.alignment import align
from densessl.geometry.cells import cell_centers, cell_diagonal, in_source, inside, measured_cells, pixel_scale
from densessl.geometry.distance import UNITS, Unit, cell_distance, offset_distance, pair_distance
from densessl.geometry.homography import compose, coords_from_boxes, coords_from_kornia, inverse_homography
from densessl.geometry.warping import overlap_coords, relative_coords, warp

__all__ = [
    "UNITS",
    "Size",
    "Unit",
    "align",
    "cell_centers",
    "cell_diagonal",
    "cell_distance",
    "check_pair",
    "check_precision",
    "checked_size",
    "compose",
    "coords_from_boxes",
    "coords_from_kornia",
    "in_source",
    "inside",
    "inverse_homography",
    "is_dense",
    "measured_cells",
    "offset_distance",
    "overlap_coords",
    "pair_distance",
    "pixel_scale",
    "relative_coords",
    "sample_dense",
    "warp",
]
