"""Random faults in COCO's json and VOC's xml: what opens is right to the last box, all else is refused by its file."""

import copy
import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as masks_of
from torchvision.transforms import v2

from examples.transfer.datasets.coco_boxes import coco_boxes
from examples.transfer.datasets.voc_boxes import NAMES, voc_boxes

SIZES = ((36, 52), (40, 44), (30, 64))
CASES = 150
NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 1, 2, 0.5, 3.7, 1e9, 1e-9, 10**20, 10**400, True]
JUNK = [*NUMBERS, None, "", "7", "x", "\0", [], [1, 2], [None], [[]], {}, {"a": 1}, {"id": 5}]
TEXTS = ["", " ", "x", "nan", "inf", "-inf", "-3", "0", "0.5", "17.0", "1e9", "1e400", "1_0", "٣", "None", "1,5"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate(SIZES):
        Image.fromarray(np.full((*size, 3), 40 * number, np.uint8)).save(folder / f"{number}.jpg")
    return folder


def drawn_box(draw: random.Random, size: tuple[int, int], least: float = 1.0) -> list[float]:
    """x, y, width and height, inside of the image."""
    (height, width), numbers = size, draw.uniform if draw.random() < 0.5 else draw.randint
    x, y = numbers(0, width // 2), numbers(0, height // 2)
    return [x, y, max(least, numbers(4, width // 2 - 1)), max(least, numbers(4, height // 2 - 1))]


def run_lengths(draw: random.Random, size: tuple[int, int], text: bool) -> dict:
    mask = np.asfortranarray(
        np.array([[draw.random() < 0.4 for _ in range(size[1])] for _ in range(size[0])], np.uint8)
    )
    if text:
        code = masks_of.encode(mask)
        return {"size": list(size), "counts": code["counts"].decode()}
    flat, counts, value = mask.flatten("F"), [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(size), "counts": counts}


def content(draw: random.Random) -> dict:
    images = [{"id": 5 + n, "file_name": f"{n}.jpg", "height": h, "width": w} for n, (h, w) in enumerate(SIZES)]
    objects = []
    for number in range(draw.randint(1, 6)):
        of = draw.randrange(len(SIZES))
        x, y, w, h = box = drawn_box(draw, SIZES[of])
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        drawing = draw.choice([polygons, polygons, run_lengths(draw, SIZES[of], draw.random() < 0.5)])
        objects.append({"id": 1 + number, "image_id": 5 + of, "category_id": draw.choice([3, 8]), "bbox": box,
                        "area": w * h, "iscrowd": 0, "segmentation": drawing})  # fmt: skip
    return {"images": images, "annotations": objects, "categories": [{"id": 8, "name": "cat"}, {"id": 3, "name": "x"}]}


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Where in nested lists and dicts values stand; of long lists the first few."""
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value[:9]))
        if isinstance(value, list)
        else []
    )
    return [spot for key, child in inner for spot in [(*path, key), *places(child, (*path, key))]]


def damaged(given: dict, draw: random.Random) -> dict:
    """One to two places are replaced, left out, doubled, or exchanged with another."""
    given = copy.deepcopy(given)
    for _ in range(draw.choice([1, 1, 2])):
        found = places(given)
        if not found:
            break
        path = draw.choice(found)
        holder = given
        for key in path[:-1]:
            holder = holder[key]
        kind = draw.choice(["junk", "junk", "junk", "gone", "double", "swap"])
        if kind == "junk":
            holder[path[-1]] = copy.deepcopy(draw.choice(JUNK))
        elif kind == "gone":
            del holder[path[-1]]
        elif kind == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        elif kind == "swap" and isinstance(holder, list):
            other = draw.randrange(len(holder))
            holder[other], holder[path[-1]] = holder[path[-1]], holder[other]
    return given


def check_target(target: dict, boxes: list, size: tuple[int, int], labels: set[int]) -> None:
    """Boxes x0 y0 x1 y1 as they stand in the file, each with an area, within a pixel of the image."""
    expected = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    torch.testing.assert_close(target["boxes"].double(), expected, rtol=1e-6, atol=1e-5)
    assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    limit = torch.tensor([size[1], size[0], size[1], size[0]])
    assert ((target["boxes"] >= -1.001) & (target["boxes"] <= limit + 1.001)).all()
    assert set(target["labels"].tolist()) <= labels
    assert (target["area"].isfinite() & (target["area"] >= 0)).all()


def opened(folder: Path, file: Path, text: str, masks: bool) -> object:
    file.write_text(text)
    return coco_boxes(folder, file, v2.ToPureTensor(), masks=masks, train=False)


@pytest.mark.parametrize("masks", [False, True])
def test_random_faults_in_coco_files(masks, photos, tmp_path):
    draw, file = random.Random(masks), tmp_path / "train.json"
    refused = 0
    for _ in range(CASES):
        right = content(draw)
        given = damaged(right, draw)
        text = json.dumps(given)
        if draw.random() < 0.05:
            text = text[: draw.randrange(len(text))]
        try:
            data = opened(photos, file, text, masks)
        except ValueError as error:
            assert str(error).startswith(str(file))  # noqa: PT017
            refused += 1
            continue
        given = json.loads(text)
        by_image = {entry["id"]: [] for entry in given["images"]}
        for entry in given["annotations"]:
            x, y, w, h = entry["bbox"]
            by_image[entry["image_id"]].append([x, y, x + w, y + h])
        names = {entry["id"]: entry["file_name"] for entry in given["images"]}
        assert len(data) == len(by_image)
        for number, (image, target) in zip(sorted(by_image), data, strict=True):
            size = SIZES[int(Path(names[number]).stem)]
            assert image.shape == (3, *size)
            check_target(target, by_image[number], size, set(range(1, 1 + len(given["categories"]))))
            if masks:
                assert target["masks"].shape == (len(target["boxes"]), *size)
                assert (target["masks"] <= 1).all()
    assert CASES * 0.3 < refused < CASES


@pytest.mark.parametrize("kind", ["shares", "corners", "scaled", "turned", "beyond", "runs"])
def test_files_in_other_units_are_refused(kind, photos, tmp_path):
    """Every object of a file is in another unit, as its converter left it: the first of them is enough."""
    draw, file = random.Random(kind), tmp_path / "train.json"
    for _ in range(25):
        given = content(draw)
        sizes = {5 + n: size for n, size in enumerate(SIZES)}
        for entry in given["annotations"]:
            (height, width), (x, y, w, h) = sizes[entry["image_id"]], entry["bbox"]
            if kind == "shares":
                entry["bbox"] = [x / width, y / height, w / width, h / height]
            elif kind == "corners":
                x, y = x + 5, y + 5
                entry |= {"bbox": [x, y, x + w, y + h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            elif kind == "beyond":
                entry["bbox"][draw.randrange(2)] += draw.choice([-1, 1]) * draw.uniform(70, 900)
            elif kind == "runs":
                entry["segmentation"] = run_lengths(draw, (height + 1, width), draw.random() < 0.5)
        for image in given["images"]:
            if kind == "scaled":
                image["height"], image["width"] = 2 * image["height"], 2 * image["width"]
            elif kind == "turned":
                image["height"], image["width"] = image["width"], image["height"]
        with pytest.raises(ValueError, match=r"train.json: (image|annotation) \d+: ") as told:
            opened(photos, file, json.dumps(given), masks=True)
        assert str(told.value).startswith(str(file))


NO_JSON = ["", "[]", "null", "7", '{"images": 3}', "{", "\ufeff{}", '{"images": [], "annotations": []}', "[" * 9999]


@pytest.mark.parametrize("text", NO_JSON)
def test_files_that_are_no_coco_json(text, photos, tmp_path):
    with pytest.raises(ValueError, match=r"train.json: expected COCO's json"):
        opened(photos, tmp_path / "train.json", text, masks=False)


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def voc_xml(draw: random.Random, size: tuple[int, int]) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    if draw.random() < 0.7:
        said = ElementTree.SubElement(root, "size")
        for key, value in (("width", size[1]), ("height", size[0]), ("depth", 3)):
            ElementTree.SubElement(said, key).text = str(value)
    for _ in range(draw.randint(0, 3)):
        entry = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(entry, "name").text = draw.choice(NAMES)
        ElementTree.SubElement(entry, "difficult").text = draw.choice("01")
        box = ElementTree.SubElement(entry, "bndbox")
        x, y, w, h = drawn_box(draw, size)
        for key, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
            ElementTree.SubElement(box, key).text = str(value)
    return root


def damaged_xml(root: ElementTree.Element, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 2])):
        pairs = [(parent, child) for parent in root.iter() for child in parent]
        if not pairs:
            return
        parent, child = draw.choice(pairs)
        kind = draw.choice(["text", "text", "gone", "double", "empty", "renamed"])
        if kind == "text":
            child.text = draw.choice(TEXTS)
        elif kind == "gone":
            parent.remove(child)
        elif kind == "double":
            parent.append(copy.deepcopy(child))
        elif kind == "empty":
            for inner in list(child):
                child.remove(inner)
        else:
            child.tag = draw.choice(["xmin", "object", "bndbox", "name", "other"])


def test_random_faults_in_voc_files(photos, tmp_path):
    draw = random.Random(0)
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for sub in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / sub).mkdir(parents=True)
    (root / "ImageSets" / "Main" / "test.txt").write_text("0\n")
    refused = 0
    for _ in range(CASES):
        number = draw.randrange(len(SIZES))
        (root / "JPEGImages" / "0.jpg").write_bytes((photos / f"{number}.jpg").read_bytes())
        tree = voc_xml(draw, SIZES[number])
        damaged_xml(tree, draw)
        text = ElementTree.tostring(tree, encoding="utf-8")
        if draw.random() < 0.05:
            text = text[: draw.randrange(len(text))]
        (root / "Annotations" / "0.xml").write_bytes(text)
        try:
            image, target = voc_boxes(str(tmp_path), "VOC2007/test", v2.ToPureTensor())[0]
        except ValueError as error:
            assert str(error).startswith(str(root / "Annotations" / "0.xml"))  # noqa: PT017
            refused += 1
            continue
        assert image.shape == (3, *SIZES[number])
        boxes = []
        for entry in ElementTree.fromstring(text).findall("object"):
            x0, y0, x1, y1 = (float(entry.find("bndbox").find(key).text) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append([x0 - 1, y0 - 1, x1, y1])
        check_target(target, boxes, SIZES[number], set(range(1, 21)))
    assert CASES * 0.2 < refused < CASES
