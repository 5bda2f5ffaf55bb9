"""What can be wrong with a file in COCO's layout, found before the first step and named by file and id."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Boxes and polygons may reach so many pixels beyond the image: annotators and converters round.
BEYOND = 1.0

Size = tuple[int, int]


def check_structure(content: Any) -> None:
    """Checks that a file holds lists of images, annotations and categories, whose ids can be compared.

    Raises:
        ValueError: If it does not, naming the entry by its place.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected COCO's json, got {type(content).__name__}")
    for what, keys in (
        ("images", ("id",)),
        ("annotations", ("id", "image_id", "category_id")),
        ("categories", ("id",)),
    ):
        entries = content.get(what)
        if not isinstance(entries, list):
            raise ValueError(f"expected COCO's json, got no list of {what}")
        if what == "categories" and not entries:
            raise ValueError("expected COCO's json, got an empty list of categories")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"expected COCO's json, got {type(entry).__name__} as number {number} of {what}")
            for key in keys:
                if not _is_id(entry.get(key)):
                    raise ValueError(
                        f"expected COCO's json, with whole numbers or texts as ids, got {key} {entry.get(key)!r} in "
                        f"number {number} of {what}"
                    )
        if len({type(entry["id"]) for entry in entries}) > 1:
            raise ValueError(f"expected COCO's json, with ids of one type, got numbers and texts among {what}")
        check_ids(entries, what)
    seen: set[Any] = set()
    for entry in content["images"]:
        name = entry.get("file_name")
        if isinstance(name, str) and name in seen:
            raise ValueError(f"two images have the file {name!r}: each would lack the other's objects")
        seen.add(name if isinstance(name, str) else None)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def check_ids(entries: Sequence[Mapping[str, Any]], what: str) -> None:
    """Checks that no two entries have one id: they would exchange their images or objects.

    Raises:
        ValueError: If two have.
    """
    seen: set[Any] = set()
    for entry in entries:
        if entry["id"] in seen:
            raise ValueError(f"two {what} have the id {entry['id']}")
        seen.add(entry["id"])


def said_size(image: Mapping[str, Any]) -> Size | None:
    """Height and width that the file says of an image; None where it says neither.

    Raises:
        ValueError: If it says one alone, or no whole numbers.
    """
    said = image.get("height"), image.get("width")
    if said == (None, None):
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in said):
        raise ValueError(f"height and width: expected whole numbers of pixels, got {said[0]} and {said[1]}")
    return said


def check_annotation(entry: Mapping[str, Any], size: Size, masks: bool) -> None:
    """Checks one object's box, area and, on demand, its mask.

    Args:
        entry: The annotation.
        size: Height and width of its image.
        masks: Whether its segmentation is needed.

    Raises:
        ValueError: If something is missing, no finite number, outside of the image, or in another unit.
    """
    _check_box(entry, size)
    area = entry.get("area", 0)
    if not _is_finite(area) or area < 0:
        raise ValueError(f"area: expected a number of square pixels, got {area}")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"iscrowd: expected 0 or 1, got {entry['iscrowd']}")
    if masks:
        if not entry.get("segmentation"):
            raise ValueError("no segmentation, which a detector with masks needs")
        _check_segmentation(entry["segmentation"], size)


def has_no_area(box: Sequence[float]) -> bool:
    """Whether a box x, y, width, height has no area in float32, as detectors hold it."""
    x, y, w, h = box
    return bool(np.float32(x) + np.float32(w) <= np.float32(x) or np.float32(y) + np.float32(h) <= np.float32(y))


def _check_box(entry: Mapping[str, Any], size: Size) -> None:
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"bbox: expected x, y, width, height, got {box}")
    if not all(_is_finite(value) for value in box):
        raise ValueError(f"bbox: expected finite numbers, got {box}")
    height, width = size
    if 0 < max(box) <= 1 and min(size) > 2:
        raise ValueError(f"bbox: expected pixels, got {box}, which looks like shares of the image")
    x, y, w, h = box
    corners = f"bbox: expected x, y, width, height, got {box}, which looks like x0, y0, x1, y1"
    inside = min(x, y) >= -BEYOND and x + w <= width + BEYOND and y + h <= height + BEYOND
    if not inside:
        # Of the corners of a box all would lie inside.
        if 0 <= x < w <= width + BEYOND and 0 <= y < h <= height + BEYOND:
            raise ValueError(f"{corners}, in an image of {width}x{height}")
        raise ValueError(f"bbox: expected a box inside of the image, {width}x{height} pixels, got {box}")
    if _are_corners(entry):
        raise ValueError(corners)
    if not has_no_area(box) and _drawn_elsewhere(entry):
        raise ValueError(
            f"bbox: expected x, y, width, height around the polygons, got {box}, with most of them outside"
        )


def _are_corners(entry: Mapping[str, Any]) -> bool:
    """Whether polygons, or else the area, agree with the box as two corners and not as corner, width and height."""
    x, y, w, h = entry["bbox"]
    if w <= x or h <= y or max(x, y) < 1:  # no corners, or the same both ways
        return False
    drawn = entry.get("segmentation")
    if isinstance(drawn, list) and drawn and all(_is_polygon(polygon) for polygon in drawn):
        right, low = (max(max(polygon[axis::2]) for polygon in drawn) for axis in (0, 1))
        # With x and y near 0 the two readings agree, so a pixel or two decides nothing.
        return max(abs(right - w), abs(low - h)) <= 1.5 < max(abs(right - x - w), abs(low - y - h)) - 1.5
    area = entry.get("area", 0)
    if drawn or not _is_finite(area) or area <= 0:
        return False
    return math.isclose(area, (w - x) * (h - y), rel_tol=0.01) and not math.isclose(area, w * h, rel_tol=0.1)


def _drawn_elsewhere(entry: Mapping[str, Any]) -> bool:
    """Whether less than half of what the polygons span lies in the box, as where x and y are those of its centre."""
    drawn = entry.get("segmentation")
    if not (isinstance(drawn, list) and drawn and all(_is_polygon(polygon) for polygon in drawn)):
        return False
    spans, common = [], []
    for axis in (0, 1):
        values = [value for polygon in drawn for value in polygon[axis::2]]
        low, length = entry["bbox"][axis], entry["bbox"][axis + 2]
        spans.append(max(values) - min(values))
        common.append(min(max(values), low + length + BEYOND) - max(min(values), low - BEYOND))
    return min(common) < 0 or common[0] * common[1] < 0.5 * spans[0] * spans[1]


def _check_segmentation(drawn: Any, size: Size) -> None:
    height, width = size
    if isinstance(drawn, dict):
        if drawn.get("size") != [height, width]:
            raise ValueError(f"segmentation: expected run lengths of [{height}, {width}], got {drawn.get('size')}")
        counts = drawn.get("counts")
        if isinstance(counts, list):
            runs = counts if all(_is_id(count) and not isinstance(count, str) for count in counts) else None
        elif isinstance(counts, str) and counts:
            runs = _unpacked(counts)
        else:
            raise ValueError("segmentation: expected run lengths, got none")
        if not runs or min(runs) < 0 or sum(runs) != height * width:
            raise ValueError(f"segmentation: expected run lengths of {height * width} pixels in all, got others")
        return
    if not isinstance(drawn, list):
        raise ValueError(f"segmentation: expected polygons or run lengths, got {type(drawn).__name__}")
    for polygon in drawn:
        if not _is_polygon(polygon):
            points = f"{len(polygon) / 2:g} points" if isinstance(polygon, list) else type(polygon).__name__
            raise ValueError(f"segmentation: expected polygons of at least 3 points of finite numbers, got {points}")
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(values) < -BEYOND or max(values) > side + BEYOND:
                raise ValueError(
                    f"segmentation: expected polygons inside of the image, {width}x{height} pixels, "
                    f"got a coordinate {min(values) if min(values) < -BEYOND else max(values)}"
                )


def _unpacked(text: str) -> list[int] | None:
    """Run lengths of COCO's packed form, of 5 bits a character; None where it is none.

    pycocotools reads on beyond the end of a text that breaks off.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_finite, polygon))


def _is_finite(value: Any) -> bool:
    # Whole numbers of json have no limit; none of these is as large as 1e9.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 <= value <= 1e9
