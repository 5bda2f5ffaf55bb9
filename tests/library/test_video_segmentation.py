"""J and F against loops, and the propagation of masks on videos whose features are known."""

import davis_reference
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("scipy")

from densessl.evaluation import DAVIS, VideoSettings, propagate_labels, video_segmentation
from densessl.evaluation._boundaries import boundary_accuracy, region_similarity
from densessl.evaluation.video import _input_size, _statistics, _stretched

AS_IT_IS = DAVIS._replace(side=None, radius=2, neighbors=3)
CELL = 4


def masks(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Blobs of all sizes, among them none and all."""
    generator = torch.Generator().manual_seed(seed)
    noise = F.avg_pool2d(torch.rand(count, *size, generator=generator), 3, 1, 1)
    found = noise > torch.linspace(0.3, 0.6, count)[:, None, None]
    found[0], found[1] = False, True
    return found


@pytest.mark.parametrize("size", [(9, 13), (40, 31), (150, 3)])
def test_j_and_f_equal_the_loops(size):
    ours, theirs = masks(7, size, 0), masks(7, size, 1).roll(2, 0)
    ours = torch.cat([ours, ours[:2], ours[2:3]])
    theirs = torch.cat([theirs, ours[:2], ours[2:3].roll(1, 1)])  # both empty, both full, moved by a pixel
    j, f = region_similarity(ours, theirs), boundary_accuracy(ours, theirs)
    for frame in range(len(ours)):
        a, b = ours[frame].tolist(), theirs[frame].tolist()
        assert float(j[frame]) == pytest.approx(davis_reference.region_similarity(a, b))
        assert float(f[frame]) == pytest.approx(davis_reference.boundary_accuracy(a, b))
    assert float(f[7]) == 1
    assert 0 < float(f[2:7].mean()) < 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 30])
def test_statistics_equal_the_loop(count):
    frames = torch.rand(count, generator=torch.Generator().manual_seed(count)).double()
    assert _statistics(frames) == pytest.approx(davis_reference.statistics(frames.tolist()))


def colours(images: Tensor) -> Tensor:
    """The mean colours of cells, centred, as features."""
    return F.avg_pool2d(images.float(), CELL) - 128


def moving(objects: int, size: tuple[int, int] = (24, 32), frames: int = 6) -> tuple[Tensor, Tensor]:
    """Squares of 8 pixels, each of one colour, that move a cell each frame."""
    truth = torch.zeros(frames, *size, dtype=torch.int64)
    images = torch.full((frames, 3, *size), 20, dtype=torch.uint8)
    for number in range(objects):
        for time in range(frames):
            y, x = 12 * number, 4 * time
            truth[time, y : y + 8, x : x + 8] = number + 1
            images[time, :, y : y + 8, x : x + 8] = torch.tensor([[250, 30, 30], [30, 250, 30]][number]).view(3, 1, 1)
    return images, truth


def test_perfect_features_carry_the_masks():
    scores = video_segmentation(colours, [moving(2), moving(1, (32, 40), 5)], AS_IT_IS, batch_size=4)
    assert scores.objects.shape == (3, 2)
    assert scores.j > 0.9
    assert scores.j_and_f == pytest.approx((scores.j + scores.f) / 2)
    assert abs(scores.j_decay) < 0.1


def test_scores_equal_the_steps_by_hand():
    frames, truth = moving(2)
    frames = (frames.float() + 90 * torch.rand(frames.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    frames = frames.to(torch.uint8)
    truth[3, :2] = 255  # void counts as background
    maps = colours(frames)
    small = truth[0, CELL // 2 :: CELL, CELL // 2 :: CELL]
    shares = propagate_labels(maps, F.one_hot(small, 3).movedim(-1, 0).float(), neighbors=3, radius=2)
    full = F.interpolate(shares, truth.shape[1:], mode="bilinear", align_corners=False)
    low, high = full.amin((2, 3), keepdim=True), full.amax((2, 3), keepdim=True)
    answer = ((full - low) / (high - low).clamp(min=1e-9)).argmax(1)
    rows = []
    for number in (1, 2):
        pairs = [((answer[t - 1] == number).tolist(), (truth[t] == number).tolist()) for t in range(1, 5)]
        j = davis_reference.statistics([davis_reference.region_similarity(a, b) for a, b in pairs])
        f = davis_reference.statistics([davis_reference.boundary_accuracy(a, b) for a, b in pairs])
        rows.append([*j, *f])
    expected = torch.tensor(rows).double().mean(0).tolist()
    made = video_segmentation(colours, [(frames, truth)], AS_IT_IS)
    assert [made.j, made.j_recall, made.j_decay, made.f, made.f_recall, made.f_decay] == pytest.approx(expected)
    assert 0.1 < made.j < 0.99


def test_frames_are_resized_as_the_published_code_does():
    assert _input_size(torch.empty(1, 3, 480, 854), DAVIS) == (480, 832)
    assert _input_size(torch.empty(1, 3, 1080, 1920), DAVIS) == (480, 832)
    assert _input_size(torch.empty(1, 3, 910, 480), DAVIS) == (896, 480)
    seen = []

    def features(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return colours(images)

    settings = VideoSettings("a test", side=16, multiple=8, radius=0, neighbors=2, frames=1)
    assert 0.2 < video_segmentation(features, iter([moving(1)]), settings).j < 0.9
    assert set(seen) == {(16, 16)}


def test_shares_are_stretched_class_by_class():
    shares = torch.tensor([[[0.2, 0.4]], [[0.0, 0.0]], [[0.3, 0.3]]])
    assert _stretched(shares).tolist() == [[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]


IMAGES, TRUTH = moving(1)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("videos", lambda: video_segmentation(colours, [], AS_IT_IS)),
        ("videos", lambda: video_segmentation(colours, [(IMAGES, torch.zeros_like(TRUTH))], AS_IT_IS)),
        ("videos.0.", lambda: video_segmentation(colours, [(IMAGES, TRUTH[:, 1:])], AS_IT_IS)),
        ("videos.1.", lambda: video_segmentation(colours, [(IMAGES, TRUTH), (IMAGES[:2], TRUTH[:2])], AS_IT_IS)),
        ("videos.0.", lambda: video_segmentation(colours, [IMAGES], AS_IT_IS)),
        ("videos.0.", lambda: video_segmentation(colours, [(IMAGES, TRUTH.tolist())], AS_IT_IS)),
        ("videos.0.", lambda: video_segmentation(colours, [(IMAGES, TRUTH - 1)], AS_IT_IS)),
        ("features", lambda: video_segmentation(lambda x: colours(x) * float("nan"), [(IMAGES, TRUTH)], AS_IT_IS)),
        ("protocol", lambda: video_segmentation(colours, [(IMAGES, TRUTH)], "DAVIS")),
        ("batch_size", lambda: video_segmentation(colours, [(IMAGES, TRUTH)], AS_IT_IS, batch_size=0)),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()
