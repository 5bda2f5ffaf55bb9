"""Readers of the data sets that dense evaluations are quoted on, each in the layout in which it is given out.

Labelled sets give (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs with 255 where a pixel is ignored, as the
protocols take them. Nothing is downloaded; what is missing is refused by name.
"""

from densessl.evaluation.data.folders import camvid, own_masks
from densessl.evaluation.data.labelled import LabelledImages, resized
from densessl.evaluation.data.pairs import KeypointPairs, spair
from densessl.evaluation.data.photos import Photos, photos
from densessl.evaluation.data.scenes import ade20k, cityscapes, coco_stuff
from densessl.evaluation.data.videos import Videos, davis
from densessl.evaluation.data.voc import voc

__all__ = [
    "KeypointPairs",
    "LabelledImages",
    "Photos",
    "Videos",
    "ade20k",
    "camvid",
    "cityscapes",
    "coco_stuff",
    "davis",
    "own_masks",
    "photos",
    "resized",
    "spair",
    "voc",
]
