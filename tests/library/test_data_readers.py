"""Each reader on a tiny copy of the layout in which its data set is given out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy")

from scipy.io import savemat

from densessl.evaluation import data
from examples.pretrain.common.data.decode import read_photo
from examples.pretrain.common.data.depths import as_bytes

H, W = 12, 17


def image(path, height=H, width=W):
    path.parent.mkdir(parents=True, exist_ok=True)
    shades = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(shades).save(path)


def mask(path, numbers, palette=False):
    """A label image whose rows hold the numbers, in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.array([numbers[row % len(numbers)] for row in range(H)], dtype=np.uint8)
    drawn = Image.fromarray(np.repeat(rows[:, None], W, 1))
    if palette:
        drawn = drawn.convert("P")
        drawn.putdata(np.repeat(rows, W).tolist())
    drawn.save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_voc(root):
    base = root / "VOCdevkit" / "VOC2012"
    for stem in ("2007_000032", "2007_000033", "2008_000001"):
        image(base / "JPEGImages" / f"{stem}.jpg")
        mask(base / "SegmentationClass" / f"{stem}.png", [0, 20, 255], palette=True)
    text(base / "ImageSets/Segmentation/train.txt", "2007_000032")
    text(base / "ImageSets/Segmentation/val.txt", "2007_000033")
    text(base / "ImageSets/Segmentation/trainval.txt", "2007_000032", "2007_000033")
    return base


def make_sbd(root):
    for stem in ("2007_000033", "2008_000002", "2008_000003"):
        image(root / "img" / f"{stem}.jpg")
        segmentation = np.full((H, W), 7, dtype=np.uint8)
        kinds = np.zeros((1, 1), dtype=[("Segmentation", object)])
        kinds["Segmentation"][0, 0] = segmentation
        (root / "cls").mkdir(exist_ok=True)
        savemat(root / "cls" / f"{stem}.mat", {"GTcls": kinds})
    text(root / "train.txt", "2007_000033", "2008_000002")
    text(root / "val.txt", "2008_000003")


def make_ade(root):
    for split in ("training", "validation"):
        image(root / "ADEChallengeData2016/images" / split / "ADE_1.jpg")
        mask(root / "ADEChallengeData2016/annotations" / split / "ADE_1.png", [0, 1, 150])


def make_cityscapes(root):
    for split in ("train", "val"):
        image(root / "leftImg8bit" / split / "ulm/ulm_000000_000019_leftImg8bit.png")
        mask(root / "gtFine" / split / "ulm/ulm_000000_000019_gtFine_labelIds.png", [0, 7, 33, 29])


def make_coco(root):
    image(root / "images/val2017/000000000139.jpg")
    mask(root / "annotations/val2017/000000000139.png", [0, 10, 12, 181, 255])


def make_camvid(root):
    image(root / "images/test/0001TP_008550.jpg")
    mask(root / "labels/test/0001TP_008550.png", [0, 10, 11])


def make_own(root):
    image(root / "images/test/roof.jpg")
    mask(root / "masks/test/roof.png", [1, 0, 255])
    text(root / "classes.txt", "ground", "roof")


def make_davis(root):
    for frame in range(3):
        image(root / "DAVIS/JPEGImages/480p/bear" / f"{frame:05}.jpg")
        mask(root / "DAVIS/Annotations/480p/bear" / f"{frame:05}.png", [0, 1, 2], palette=True)
    text(root / "DAVIS/ImageSets/2017/val.txt", "bear")


def make_spair(root):
    base = root / "SPair-71k"
    image(base / "JPEGImages/cat/2008_1.jpg")
    image(base / "JPEGImages/cat/2008_2.jpg", 20, 10)
    name = "000001-2008_1-2008_2:cat"
    entry = {
        "category": "cat",
        "src_imname": "2008_1.jpg",
        "trg_imname": "2008_2.jpg",
        "src_kps": [[0, 0], [16, 11]],
        "trg_kps": [[4, 9], [9, 19]],
        "trg_bndbox": [1, 2, 9, 18],
    }
    text(base / "PairAnnotation/test" / f"{name}.json", json.dumps(entry))
    text(base / "Layout/large/test.txt", name)
    return base / "PairAnnotation/test" / f"{name}.json"


@pytest.mark.parametrize(
    ("make", "read", "count", "classes", "rows"),
    [
        (make_voc, data.voc, 1, 21, [0, 20, 255]),
        (make_ade, data.ade20k, 1, 150, [255, 0, 149]),
        (make_cityscapes, data.cityscapes, 1, 19, [255, 0, 18, 255]),
        (make_coco, data.coco_stuff, 1, 171, [0, 10, 11, 170, 255]),
        (make_coco, lambda root: data.coco_stuff(root, classes=27), 1, 27, [9, 8, 8, 24, 255]),
        (make_camvid, data.camvid, 1, 11, [0, 10, 255]),
        (make_own, data.own_masks, 1, 2, [1, 0, 255]),
    ],
)
def test_labelled_sets(tmp_path, make, read, count, classes, rows):
    make(tmp_path)
    found = read(tmp_path)
    assert (len(found), found.classes) == (count, classes)
    picture, labels = found[0]
    assert (picture.dtype, tuple(picture.shape)) == (torch.uint8, (3, H, W))
    assert labels.dtype == torch.int64
    assert labels[:, 3].tolist() == [rows[row % len(rows)] for row in range(H)]
    small, coarse = data.resized(found, (6, 34))[0]
    assert (tuple(small.shape), tuple(coarse.shape)) == ((3, 6, 34), (6, 34))
    assert set(coarse.unique().tolist()) <= set(rows)
    with pytest.raises(IndexError):
        found[count]


def test_voc_takes_sbd_without_the_images_of_val(tmp_path):
    base = make_voc(tmp_path)
    make_sbd(tmp_path / "sbd")
    found = data.voc(tmp_path, "trainaug", sbd=tmp_path / "sbd")
    assert [path.stem for path in found.images] == ["2007_000032", "2008_000002", "2008_000003"]
    assert found[1][1].unique().tolist() == [7]
    with pytest.raises(ValueError, match=r"^folder: .*trainaug.txt"):
        data.voc(tmp_path, "trainaug")
    mask(base / "SegmentationClassAug/2008_000001.png", [3])
    text(
        base / "ImageSets/Segmentation/trainaug.txt",
        "/JPEGImages/2008_000001.jpg /SegmentationClassAug/2008_000001.png",
    )
    assert data.voc(base, "trainaug")[0][1].unique().tolist() == [3]


def test_coco_stuff_groups_every_number_that_occurs():
    from densessl.evaluation.data.scenes import _coco_class_of

    fine, coarse = _coco_class_of(171), _coco_class_of(27)
    assert sorted(fine.values()) == list(range(171))
    assert (len(coarse), set(coarse.values())) == (182, set(range(27)))
    # Known members: person, bicycle, bird, chair, tv, oven, clouds, river.
    assert [coarse[n - 1] for n in (1, 2, 16, 62, 72, 79, 106, 148)] == [9, 11, 7, 3, 0, 1, 23, 26]


def test_davis(tmp_path):
    make_davis(tmp_path)
    ((frames, masks),) = [*data.davis(tmp_path)]
    assert (frames.dtype, tuple(frames.shape)) == (torch.uint8, (3, 3, H, W))
    assert (masks.dtype, tuple(masks.shape)) == (torch.int64, (3, H, W))
    assert masks.unique().tolist() == [0, 1, 2]
    (tmp_path / "DAVIS/Annotations/480p/bear/00001.png").unlink()
    with pytest.raises(ValueError, match=r"^folder: .*bear.*00001.png"):
        data.davis(tmp_path)


def test_spair(tmp_path):
    path = make_spair(tmp_path)
    (pair,) = [*data.spair(tmp_path)]
    torch.testing.assert_close(pair.source_points, torch.tensor([[0.5, 0.5], [16.5, 11.5]]))
    torch.testing.assert_close(pair.target_points, torch.tensor([[4.5, 9.5], [9.5, 19.5]]))
    assert pair.extent == 16
    entry = json.loads(path.read_text())
    text(path, json.dumps(entry | {"src_kps": [[900, 0], [0, 0]]}))
    with pytest.raises(ValueError, match=r"^folder: .* points outside"):
        data.spair(tmp_path)[0]
    text(path, json.dumps(entry | {"src_kps": [[0, 0]]}))
    with pytest.raises(ValueError, match=r"^folder: expected as many points .* got 1 and 2"):
        data.spair(tmp_path)[0]
    text(path, json.dumps({key: entry[key] for key in entry if key != "trg_bndbox"}))
    with pytest.raises(ValueError, match=r"^folder: .*trg_bndbox"):
        data.spair(tmp_path)[0]


def test_photos(tmp_path):
    image(tmp_path / "a/one.png")
    image(tmp_path / "two.jpg", 8, 9)
    assert [tuple(photo.shape) for photo in data.photos(tmp_path)] == [(3, H, W), (3, 8, 9)]
    assert tuple(data.photos(tmp_path, (5, 6))[1].shape) == (3, 5, 6)


def test_photos_of_linked_folders_are_read_once_and_hidden_folders_left_out(tmp_path):
    image(tmp_path / "photos/b.gif")
    image(tmp_path / "photos/.ipynb_checkpoints/b.png")
    image(tmp_path / "elsewhere/a.png")
    for name in ("linked", "again"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "photos", target_is_directory=True)
    found = data.photos(tmp_path / "photos")
    assert [str(path.relative_to(tmp_path / "photos")) for path in found.paths] == ["again/a.png", "b.gif"]
    pages = Image.new("L", (W, H))
    pages.save(tmp_path / "photos/c.tif", save_all=True, append_images=[pages])
    with pytest.raises(ValueError, match=r"^folder: .*c.tif cannot be read: expected one image a file, got several"):
        data.photos(tmp_path / "photos")[2]


@pytest.mark.parametrize(
    "read",
    [data.voc, data.ade20k, data.cityscapes, data.coco_stuff, data.camvid, data.own_masks, data.davis, data.spair,
     data.photos],
)  # fmt: skip
def test_a_missing_folder_is_named(tmp_path, read):
    with pytest.raises(ValueError, match=rf"^folder: expected .*{tmp_path.name}"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["test", ""])
@pytest.mark.parametrize("read", [data.voc, data.ade20k, data.cityscapes, data.coco_stuff])
def test_an_unknown_split_is_refused(tmp_path, read, split):
    with pytest.raises(ValueError, match=r"^split: expected"):
        read(tmp_path, split)


def test_own_masks_may_lie_in_labels(tmp_path):
    make_own(tmp_path)
    expected = data.own_masks(tmp_path)[0]
    (tmp_path / "masks").rename(tmp_path / "labels")
    found = data.own_masks(tmp_path)
    assert len(found) == 1
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected, strict=True))
    (tmp_path / "masks").mkdir()  # without this split
    assert len(data.own_masks(tmp_path)) == 1


def test_grey_photos_of_16_bits_become_8(tmp_path):
    numbers = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5957).astype(np.uint16)  # up to 65,527
    Image.fromarray(numbers).save(tmp_path / "deep.png")
    found = data.photos(tmp_path)[0]
    assert torch.equal(found, as_bytes(read_photo(tmp_path / "deep.png", 3)))  # as the recipes read it
    assert found.max() == 255
    Image.fromarray(np.ones((3, 4), np.float32)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep.tiff cannot be read: expected 8 or 16 bits a channel, got mode F"):
        data.photos(tmp_path)[1]


def test_bad_labels_are_named(tmp_path):
    make_own(tmp_path)
    path = tmp_path / "masks/test/roof.png"
    mask(path, [0, 2])
    with pytest.raises(ValueError, match=r"^folder: .*roof.png holds the number 2"):
        data.own_masks(tmp_path)[0]
    image(path)
    with pytest.raises(ValueError, match=r"^folder: .*roof.png cannot be read: .*mode RGB"):
        data.own_masks(tmp_path)[0]
    Image.new("L", (3, 3)).save(path)
    with pytest.raises(ValueError, match=r"^folder: .*roof.png is 3x3 pixels, its image .*roof.jpg 17x12"):
        data.own_masks(tmp_path)[0]
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^folder: .*roof.png cannot be read"):
        data.own_masks(tmp_path)[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"^folder: .* are missing; the first is .*roof.png"):
        data.own_masks(tmp_path)
    mask(tmp_path / "masks/test/other.png", [0])
    with pytest.raises(ValueError, match=r"^folder: .*other.png has no image"):
        data.own_masks(tmp_path)
    text(tmp_path / "classes.txt", "roof", "roof")
    with pytest.raises(ValueError, match=r"^folder: expected 2 to 255 different names"):
        data.own_masks(tmp_path)
