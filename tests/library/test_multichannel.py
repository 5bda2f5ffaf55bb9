"""Views of images with any number of channels, on the CPU and on the device; what colour steps say to such images."""

import kornia.augmentation as K
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from densessl import (
    BatchAugment,
    MultiView,
    View,
    byol_photometric,
    byol_views,
    check_tracking,
    mocov2_photometric,
    mocov2_views,
    multichannel_photometric,
    multichannel_views,
    simclr_photometric,
    simclr_views,
)
from densessl.augment._kornia import BatchChannelJitter
from densessl.augment.multichannel import ChannelDropout, ChannelJitter

CHANNELS = pytest.mark.parametrize("channels", [1, 2, 4, 13])


def statistics(channels: int) -> dict[str, list[float]]:
    return {"mean": [0.4 + 0.01 * c for c in range(channels)], "std": [0.2 + 0.01 * c for c in range(channels)]}


def batch_of(images: Tensor) -> View:
    return View(images, torch.eye(3).expand(len(images), 3, 3), torch.tensor([[20, 24]] * len(images)))


@CHANNELS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_both_halves_take_any_number_of_channels(channels, dtype):
    image = (255 * torch.rand(channels, 40, 50)).byte() if dtype == torch.uint8 else torch.rand(channels, 40, 50)
    before = image.clone()
    whole, geometric = (multichannel_views((16, 20), on_cpu, **statistics(channels)) for on_cpu in (True, False))
    for view in whole(image):
        assert view.image.shape == (channels, 16, 20)
        assert view.image.dtype == torch.float32
        assert view.image.unique().numel() > 100
    batch = default_collate([geometric(image)[0] for _ in range(3)])
    assert batch.image.dtype == dtype
    for augment in multichannel_photometric(**statistics(channels)):
        first, again = augment(batch, seed=3), augment(batch, seed=3)
        assert torch.equal(first.image, again.image)
        assert not torch.equal(first.image, augment(batch, seed=4).image)
        assert first.image.shape == (3, channels, 16, 20)
        assert first.coords is batch.coords
    assert torch.equal(image, before)


def test_sixteen_bits_stay_sixteen_bits():
    """12-bit values in a 16-bit file: 4,096 levels below 0.0625, of which 8 bits would leave 16."""
    image = torch.arange(4096.0).view(1, 64, 64).expand(4, -1, -1) / 65535
    options = {"mean": [0.0] * 4, "std": [1.0] * 4}
    device = multichannel_photometric(**options)[1](batch_of(image[None]), seed=0).image[0]
    torch.manual_seed(0)
    cpu = next(v.image for v in (multichannel_views(64, **options)(image)[1] for _ in range(50)) if v.image.amin() > 0)
    for out in (device, cpu):
        assert out.unique().numel() > 1000
        assert out.amax() < 0.0625 * 1.4**2


def test_jitter_is_brightness_then_contrast_of_each_channel_and_the_same_on_both_roads():
    image = tv_tensors.Image(torch.rand(4, 6, 9))
    jitter = ChannelJitter(0.4)
    torch.manual_seed(0)
    factors = torch.tensor(jitter.make_params([image])["factors"])
    torch.manual_seed(0)
    got = jitter(image)
    assert isinstance(got, tv_tensors.Image)
    for channel, (brightness, contrast) in enumerate(factors.tolist()):
        brighter = (image[channel].double() * brightness).clamp(0, 1)
        expected = (brighter.mean() + contrast * (brighter - brighter.mean())).clamp(0, 1)
        torch.testing.assert_close(got[channel].double(), expected, rtol=0, atol=1e-6)
    params = {"brightness": factors[None, :, 0, None, None], "contrast": factors[None, :, 1, None, None]}
    on_device = BatchChannelJitter(0.4, p=1.0).apply_transform(image.as_subclass(Tensor)[None], params, {})
    torch.testing.assert_close(on_device[0], got.as_subclass(Tensor), rtol=0, atol=1e-6)
    many = torch.stack([torch.tensor(jitter.make_params([image])["factors"]) for _ in range(500)])
    drawn = BatchChannelJitter(0.4, p=1.0).generate_parameters(torch.Size((500, 4, 6, 9)))
    for factors in (many, drawn["brightness"], drawn["contrast"]):
        assert 0.6 <= factors.min() < 0.61
        assert 1.39 < factors.max() <= 1.4
    assert drawn["brightness"].shape == (500, 4, 1, 1)


def test_dropout_takes_one_channel_of_one_image():
    image = tv_tensors.Image(torch.rand(3, 5, 7) + 0.1)
    dropped = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out = ChannelDropout()(image)
        gone = (out == 0).flatten(1).all(1)
        assert gone.sum() == 1
        assert torch.equal(out[~gone], image[~gone])
        dropped.add(int(gone.nonzero()))
    assert dropped == {0, 1, 2}


@pytest.mark.parametrize("change", [ChannelJitter(), ChannelDropout()], ids=lambda t: type(t).__name__)
def test_a_batch_is_changed_as_each_of_its_images(change):
    images = tv_tensors.Image(torch.rand(2, 4, 5, 7) + 0.1)
    drawn = []
    for part in (images, tv_tensors.Image(images[0]), tv_tensors.Image(images[1])):
        torch.manual_seed(3)
        drawn.append(change(part))
    assert torch.equal(drawn[0], torch.stack(drawn[1:]))
    assert not torch.equal(drawn[0], images)


def test_shares_of_the_steps():
    """As often as the docstring says; the strengths are in the names of kornia's."""
    image = torch.rand(4, 32, 32) * 0.5 + 0.2
    options = {"mean": [0.1] * 4, "std": [1.0] * 4}
    torch.manual_seed(0)
    views = [multichannel_views(32, scale=(1, 1), ratio=(1, 1), **options)(image) for _ in range(200)]
    on_cpu = [torch.stack([view[i].image for view in views]) for i in range(2)]
    batch = batch_of(image.expand(200, -1, -1, -1))
    on_device = [augment(batch, seed=7).image for augment in multichannel_photometric(**options)]
    for both in (on_cpu, on_device):
        for out, sharp in zip(both, (0.0, 0.9), strict=True):
            gone = (out == 0).flatten(2).all(2)
            assert gone.sum(1).amax() == 1
            assert gone.any(1).float().mean() == pytest.approx(0.2, abs=0.1)
            level = out.mean((2, 3)) - (image - 0.1).mean((1, 2))
            changed = (level.abs() > 1e-3).sum(1) >= 2  # the blur and the dropout change no more than one mean
            assert changed.float().mean() == pytest.approx(0.8, abs=0.1)
            # Neighbours of white noise differ by sqrt(2) standard deviations, of blurred noise by less.
            left = ~gone
            ratio = out.diff(dim=3).std((2, 3)) / out.std((2, 3)).clamp(min=1e-6)
            per_image = torch.stack([r[keep].mean() for r, keep in zip(ratio, left, strict=True)])
            assert (per_image < 1.3).float().mean() == pytest.approx(1 - sharp, abs=0.25)  # a small sigma hardly blurs


@pytest.mark.parametrize("channels", [3, 5])
def test_nothing_moves(channels):
    """The tracer has three channels, whatever the pipeline expects of images."""
    whole = multichannel_views(96, **statistics(channels))
    assert check_tracking(whole, draws=20).max_error < 0.15
    if channels == 3:  # kornia's normalisation looks at the tracer
        for augment in multichannel_photometric(**statistics(3)):
            assert check_tracking(augment, draws=3).max_error == 0


def test_masks_and_grey_photos_pass():
    labels = torch.arange(40 * 50).view(40, 50)
    views = multichannel_views(16, **statistics(1))(Image.new("L", (50, 40), 100), labels)
    assert all(view.mask.dtype == torch.int64 and view.image.shape == (1, 16, 16) for view in views)


# --- images with channels that a step cannot take ---------------------------------------------------------------------


@pytest.mark.parametrize("views", [byol_views, mocov2_views, simclr_views])
def test_colour_steps_on_the_cpu_name_themselves(views):
    """In every draw, not only in those where the step is drawn."""
    for channels in (2, 4):
        for image in (torch.rand(channels, 20, 24), torch.zeros(channels, 20, 24, dtype=torch.uint8)):
            with pytest.raises(
                ValueError, match=rf"C = 3 channels, for ColorJitter, .*multichannel.*got C = {channels}"
            ):
                views(16)(image)
        with pytest.raises(ValueError, match=rf"mean, std: expected 1 or 3 numbers, .* got {channels} and {channels}"):
            views(16, **statistics(channels))
    with pytest.raises(ValueError, match=r"C = 3 channels, .*as mean and std.*got C = 1"):
        views(16)(torch.rand(1, 20, 24))
    assert views(16, **statistics(1))(torch.rand(1, 20, 24))[0].image.shape == (1, 16, 16)  # grey they take
    assert views(16, False)(torch.rand(4, 20, 24))[0].image.shape == (4, 16, 16)  # and the geometric half takes all


@pytest.mark.parametrize("preset", [byol_photometric, mocov2_photometric, simclr_photometric])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colour_steps_on_the_device_name_themselves(preset, channels):
    for augment in preset():
        for seed in range(3):
            with pytest.raises(ValueError, match=rf"C = 3 channels, for ColorJitter; multi.*; got C = {channels}"):
                augment(batch_of(torch.rand(1, channels, 20, 24)), seed=seed)
    if channels != 1:
        with pytest.raises(ValueError, match=rf"mean, std: expected 1 or 3 numbers, .* got {channels} and {channels}"):
            preset(**statistics(channels))


def test_a_pipeline_of_ones_own_too():
    own = BatchAugment(K.AugmentationSequential(K.RandomHue((-0.1, 0.1), p=0.1), K.RandomSaturation((1, 2), p=0.1)))
    with pytest.raises(ValueError, match=r"for RandomHue, RandomSaturation; .* got C = 5"):
        own(batch_of(torch.rand(2, 5, 20, 24)))
    geometric = BatchAugment(K.RandomHorizontalFlip())
    assert geometric(batch_of(torch.rand(2, 5, 20, 24))).image.shape == (2, 5, 20, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: multichannel_views(16, **statistics(4))(torch.rand(3, 20, 24)),
            "C = 4 channels, as mean and std; got C = 3",
        ),
        (lambda: multichannel_views(16, mean=[0.5], std=[0.5, 0.5]), "mean, std: expected one number .* got 1 and 2"),
        (lambda: multichannel_photometric([], []), "mean, std: expected one number .* got 0 and 0"),
        (
            lambda: multichannel_photometric([0.5] * 3, [0.5] * 3)[0](batch_of(torch.rand(2, 4, 20, 24))),
            r"mean length and number of channels do not match",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_geometric_pipelines_take_any_number_of_channels():
    """With coords, kornia's on top, and a mask."""
    views = MultiView(v2.Compose([v2.RandomResizedCrop(32), v2.RandomRotation(20), v2.RandomPerspective(p=1.0)]))
    image = torch.rand(7, 40, 50)
    (view,) = views(image, torch.ones(40, 50))
    batch = default_collate([view])
    moved = BatchAugment(K.RandomAffine(20.0, p=1.0))(batch, seed=0)
    assert moved.image.shape == (1, 7, 32, 32)
    assert not torch.equal(moved.coords, batch.coords)
    torch.manual_seed(0)
    (colour,) = views(image[:3])
    torch.manual_seed(0)
    (many,) = views(image)
    torch.testing.assert_close(many.image[:3], colour.image)
    assert torch.equal(many.coords, colour.coords)
