"""Annotations in other units, of other sizes, twice or broken: each refused before the first step, by file and id."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from examples.transfer.datasets.boxes import Boxes
from examples.transfer.datasets.coco_boxes import coco_boxes
from examples.transfer.datasets.sizes import is_turned, shown_size
from examples.transfer.datasets.voc_boxes import voc_boxes
from examples.transfer.detection import OVERLAPS, RECALLS

HEIGHT, WIDTH = 36, 52
CORNERS = ("xmin", "ymin", "xmax", "ymax")
TURNED = 6  # a quarter turn clockwise to be shown


def photo(path: Path, orientation: int = 1) -> None:
    """Red grows from left to right and green from top to bottom, as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(WIDTH), 4 * np.arange(HEIGHT)[:, None]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=100)


def square(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def content() -> dict:
    images = [{"id": 5 + n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in range(3)]
    boxes = [(4, 5, 20, 12), (30, 20, 22, 16), (11, 3, 14, 30), (0, 0, WIDTH, HEIGHT)]
    objects = [
        {"id": 1 + n, "image_id": 5 + n // 2, "category_id": 3, "bbox": list(box), "area": box[2] * box[3],
         "iscrowd": 0, "segmentation": square(*box)}
        for n, box in enumerate(boxes)
    ]  # fmt: skip
    return {"images": images, "annotations": objects, "categories": [{"id": 3, "name": "dog"}]}


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(3):
        photo(tmp_path / f"{number}.jpg")
    return tmp_path


def opened(folder: Path, given: dict, masks: bool = True, **options):
    (folder / "train.json").write_text(json.dumps(given))
    return coco_boxes(folder, folder / "train.json", v2.ToPureTensor(), masks=masks, train=False, **options)


def test_what_is_right_passes(folder):
    data = opened(folder, content())
    assert [len(data[index][1]["boxes"]) for index in range(3)] == [2, 2, 0]
    assert data[1][1]["masks"][1].all()
    given = content()
    for image in given["images"]:  # a file that says no sizes
        del image["height"], image["width"]
    assert len(opened(folder, given)) == 3


RUNS = {"size": [HEIGHT, WIDTH], "counts": [3, HEIGHT * WIDTH - 3]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"bbox": None}, "bbox: expected x, y, width, height, got None"),
        ({"bbox": [1, None, 5, 5]}, "bbox: expected finite numbers"),
        ({"bbox": [1, float("nan"), 5, 5]}, "bbox: expected finite numbers"),
        ({"bbox": [1, 2, "5", 5]}, "bbox: expected finite numbers"),
        ({"bbox": [0.25, 0.5, 0.3, 0.2]}, "bbox: expected pixels, .* which looks like shares of the image"),
        ({"bbox": [40, 20, 20, 10]}, "bbox: expected a box inside of the image, 52x36 pixels"),
        ({"bbox": [-4, 20, 20, 10]}, "bbox: expected a box inside of the image"),
        ({"bbox": [30, 20, 52, 36]}, "bbox: expected x, y, width, height, .* which looks like x0, y0, x1, y1"),
        (
            {"bbox": [10, 8, 22, 20], "area": 144, "segmentation": square(10, 8, 12, 12)},
            "which looks like x0, y0, x1, y1",
        ),
        ({"bbox": [20, 14, 20, 12], "segmentation": square(10, 8, 20, 12)}, "bbox: .* around the polygons"),
        ({"bbox": [10, 8, 20, 12], "segmentation": square(0.2, 0.2, 0.4, 0.3)}, "bbox: .* around the polygons"),
        ({"area": None}, "area: expected a number of square pixels, got None"),
        ({"area": float("nan")}, "area: expected a number of square pixels, got nan"),
        ({"area": -1}, "area: expected a number of square pixels, got -1"),
        ({"iscrowd": None}, "iscrowd: expected 0 or 1, got None"),
        ({"segmentation": [[1, 2, 3, 4]]}, "segmentation: expected polygons of at least 3 points .* got 2 points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "segmentation: expected polygons .* got 3.5 points"),
        ({"segmentation": [[1, 2, 3, None, 5, 6]]}, "segmentation: expected polygons .* finite numbers"),
        ({"segmentation": square(30, 20, 40, 10)}, "segmentation: expected polygons inside .* a coordinate 70"),
        ({"segmentation": RUNS | {"size": [WIDTH, HEIGHT]}}, r"expected run lengths of \[36, 52\], got \[52, 36\]"),
        ({"segmentation": RUNS | {"counts": [3, 4]}}, "segmentation: expected run lengths of 1872 pixels in all"),
        ({"segmentation": RUNS | {"counts": None}}, "segmentation: expected run lengths, got none"),
        ({"segmentation": "polygon"}, "segmentation: expected polygons or run lengths, got str"),
        ({"id": 1}, "two annotations have the id 1"),
    ],
)
def test_bad_annotations(damage, message, folder):
    given = content()
    given["annotations"][1] |= damage
    with pytest.raises(ValueError, match=rf"train.json: (annotation 2: )?.*{message}"):
        opened(folder, given)


def test_a_file_of_two_images_and_names_that_are_too_long_are_refused(folder):
    given = content()
    given["images"][1]["file_name"] = given["images"][0]["file_name"]
    with pytest.raises(ValueError, match=r"train.json: two images have the file '0.jpg'"):
        opened(folder, given)
    given["images"][1]["file_name"] = "a" * 5000
    with pytest.raises(ValueError, match=r"train.json: image \d+: .*too long"):
        opened(folder, given)


def test_corners_without_polygons_are_seen_by_the_area(folder):
    given = content()
    given["annotations"][1] |= {"bbox": [10, 8, 22, 20], "area": 144, "segmentation": []}
    with pytest.raises(ValueError, match=r"annotation 2: .* which looks like x0, y0, x1, y1"):
        opened(folder, given, masks=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"id": 5}, "two images have the id 5"),
        ({"height": 72, "width": 104}, "image 6: expected its size, 52x36 pixels in .*1.jpg, got 104x72"),
        ({"height": WIDTH, "width": HEIGHT}, "image 6: expected its size, 52x36 pixels in .*, got 36x52"),
        ({"height": None}, "image 6: height and width: expected whole numbers of pixels, got None and 52"),
    ],
)
def test_bad_images(damage, message, folder):
    given = content()
    given["images"][1] |= damage
    with pytest.raises(ValueError, match=rf"train.json: {message}"):
        opened(folder, given)


def test_categories_of_one_id(folder):
    given = content()
    given["categories"].append({"id": 3, "name": "cat"})
    with pytest.raises(ValueError, match=r"train.json: two categories have the id 3"):
        opened(folder, given)


def test_a_broken_photo_is_named_before_the_first_step(folder):
    (folder / "1.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"train.json: image 6: .*1.jpg cannot be read"):
        opened(folder, content())


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("as_shown", [True, False])
def test_photos_are_turned_where_the_file_means_it(as_shown, suffix, folder):
    """Boxes on the shown photo have its sides exchanged, on the stored one they do not."""
    path = folder / f"0{suffix}"
    photo(path, TURNED)
    given = content()
    given["images"][0]["file_name"] = path.name
    size = (WIDTH, HEIGHT) if as_shown else (HEIGHT, WIDTH)
    given["images"][0] |= {"height": size[0], "width": size[1]}
    given["annotations"] = given["annotations"][2:]
    image, _ = opened(folder, given)[0]
    assert image.shape == (3, *size)
    red, green = image[0].float(), image[1].float()
    if as_shown:  # the stored top is the right side
        assert red[-1].mean() > red[0].mean() + 100
        assert green[:, 0].mean() > green[:, -1].mean() + 100
    else:
        assert red[:, -1].mean() > red[:, 0].mean() + 100
    assert is_turned(path, size) is as_shown
    assert shown_size(path) == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match=r"52x36 pixels \(36x52 as EXIF turns it\) in .*0\.\w+, got 9x8"):
        is_turned(path, (8, 9))


def voc(folder: Path, size: str, box: tuple, names: str = "a\n") -> None:
    root = folder / "VOCdevkit" / "VOC2007"
    for sub in ("Annotations", "ImageSets/Main"):
        (root / sub).mkdir(parents=True)
    photo(root / "JPEGImages" / "a.jpg", TURNED)
    (root / "ImageSets" / "Main" / "test.txt").write_text(names)
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(CORNERS, box, strict=True))
    entry = f"<object><name>dog</name><bndbox>{corners}</bndbox></object>"
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{size}{entry}</annotation>")


def said(width: int, height: int) -> str:
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


@pytest.mark.parametrize(
    ("size", "box", "shape"),
    [
        (said(WIDTH, HEIGHT), (1, 1, WIDTH, HEIGHT), (HEIGHT, WIDTH)),
        (said(HEIGHT, WIDTH), (1, 1, HEIGHT, WIDTH), (WIDTH, HEIGHT)),
        ("", (1, 1, HEIGHT, WIDTH), (WIDTH, HEIGHT)),
    ],
)
def test_voc_photos_are_turned_where_the_file_means_it(size, box, shape, tmp_path):
    voc(tmp_path, size, box)
    image, target = voc_boxes(str(tmp_path), "VOC2007/test", v2.ToPureTensor())[0]
    assert image.shape == (3, *shape)
    assert target["boxes"].tolist() == [[0, 0, shape[1], shape[0]]]


@pytest.mark.parametrize(
    ("size", "box", "names", "message"),
    [
        (said(104, 72), (1, 1, 9, 9), "a\n", "a.xml: size: expected its size, 52x36 .*got 104x72"),
        ("<size><width>52</width></size>", (1, 1, 9, 9), "a\n", "a.xml: size: no 'height'"),
        (said(WIDTH, HEIGHT), (1, 1, 60, 20), "a\n", "a.xml: object 1: expected a box inside .*52x36"),
        (said(WIDTH, HEIGHT), (1, 1, 20, "nan"), "a\n", "a.xml: object 1: expected finite numbers"),
        (said(WIDTH, HEIGHT), (0.1, 0.2, 0.5, 0.9), "a\n", "a.xml: object 1: .* shares of the image"),
        (said(WIDTH, HEIGHT), (1, 1, 9, 9), "a\na\n", "test.txt: entry 'a' is listed twice"),
    ],
)
def test_bad_voc_files(size, box, names, message, tmp_path):
    voc(tmp_path, size, box, names)
    with pytest.raises(ValueError, match=message):
        voc_boxes(str(tmp_path), "VOC2007/test", v2.ToPureTensor())


@pytest.mark.parametrize("value", ["true", "2", "Unspecified"])
def test_other_words_than_0_and_1_for_difficult_are_refused(value, tmp_path):
    voc(tmp_path, said(WIDTH, HEIGHT), (1, 1, 9, 9))
    path = tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<bndbox>", f"<difficult>{value}</difficult><bndbox>"))
    with pytest.raises(ValueError, match=f"a.xml: object 1: difficult: expected 0 or 1, got '{value}'"):
        voc_boxes(str(tmp_path), "VOC2007/test", v2.ToPureTensor())


def test_thresholds_are_cocos_own():
    """In float32 an overlap of exactly 0.6 misses the threshold 0.6000000238."""
    from pycocotools.cocoeval import Params

    own = Params("bbox")
    assert own.iouThrs.tolist() == OVERLAPS
    assert own.recThrs.tolist() == RECALLS
    assert torch.tensor(OVERLAPS).tolist() != OVERLAPS


def renamed(given: dict) -> None:
    given["categories"] = [{"id": 3, "name": "cat"}]


def renumbered(given: dict) -> None:
    given["categories"][0]["id"] = 1
    for entry in given["annotations"]:
        entry["category_id"] = 1


def without_objects(given: dict) -> None:
    given["annotations"].clear()


def without_categories(given: dict) -> None:
    given["annotations"].clear()
    given["categories"].clear()


@pytest.mark.parametrize(
    ("split", "damage", "message"),
    [
        ("val", renamed, r"val.json: expected the categories of .*train.json, 3 dog, got 3 cat"),
        ("val", renumbered, r"val.json: expected the categories of .*train.json, 3 dog, got 1 dog"),
        ("val", without_objects, r"val.json: expected objects to evaluate on, got none in 3 images"),
        ("train", without_objects, r"train.json: expected objects to train on, got none in 3 images"),
        ("train", without_categories, r"train.json: expected COCO's json, got an empty list of categories"),
    ],
)
def test_splits_that_do_not_fit_each_other(split, damage, message, folder):
    for name in ("train", "val"):
        given = content()
        if name == split:
            damage(given)
        (folder / f"{name}.json").write_text(json.dumps(given))
    data = Boxes("coco", str(folder), ["train"], ["val"], images=".", annotations="{split}.json", batch_size=1)
    model = SimpleNamespace(hparams=SimpleNamespace(classes=1))
    data.trainer = SimpleNamespace(lightning_module=model, world_size=1)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")
