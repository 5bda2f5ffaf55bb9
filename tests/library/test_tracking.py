import kornia.augmentation as K
import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from densessl import (
    BatchAugment,
    MultiView,
    byol_photometric,
    byol_views,
    check_tracking,
    mocov2_photometric,
    mocov2_views,
    simclr_photometric,
    simclr_views,
)

BILINEAR = InterpolationMode.BILINEAR


@pytest.mark.parametrize("preset", [byol_views, mocov2_views, simclr_views])
def test_published_pipelines_pass_over_a_thousand_draws(preset):
    report = check_tracking(preset(96), draws=500)  # of two views
    assert report.draws == 1000
    assert report.max_error < 0.15
    assert report.pixels > 1_000_000


@pytest.mark.parametrize("preset", [byol_photometric, mocov2_photometric, simclr_photometric])
def test_photometric_halves_pass(preset):
    for augment in preset():
        assert check_tracking(augment, draws=3).max_error == 0


class OnImages(v2.Transform):
    """Does something to images and forgets the coords."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def transform(self, inpt, params):
        return tv_tensors.wrap(self.change(inpt), like=inpt) if isinstance(inpt, tv_tensors.Image) else inpt


FORGETFUL = {
    "a shift of 2 px": lambda x: x.roll(2, -1),
    "a shift of 2 px down": lambda x: x.roll(2, -2),
    "a forgotten flip": lambda x: x.flip(-1),
    "a forgotten vertical flip": lambda x: x.flip(-2),
    "a half turn": lambda x: x.flip(-1, -2),
    "a forgotten crop and resize": lambda x: F.resize(x.as_subclass(torch.Tensor)[..., 4:, 4:], list(x.shape[-2:])),
}


@pytest.mark.parametrize("name", FORGETFUL)
@pytest.mark.parametrize("published", [False, True])
def test_forgetful_pipelines_fail(name, published):
    wrong = OnImages(FORGETFUL[name])
    pipeline = v2.Compose([*byol_views(224).transforms[0].transforms, wrong]) if published else wrong
    with pytest.raises(ValueError, match=r"pixels moved and coords did not follow.*source pixels apart"):
        check_tracking(pipeline)


def test_a_shift_hidden_in_a_container_or_a_multiview_fails():
    hidden = v2.RandomApply([OnImages(FORGETFUL["a shift of 2 px"])], p=0.1)
    with pytest.raises(ValueError, match="did not follow"):
        check_tracking(MultiView(v2.Identity(), v2.Compose([v2.ColorJitter(0.4), hidden])))


def test_a_mirrored_plane_in_kornia_fails():
    class Forgetful(K.RandomHorizontalFlip):
        def compute_transformation(self, input, params, flags):
            return torch.eye(3).expand(len(input), 3, 3)

    with pytest.raises(ValueError, match="did not follow"):
        check_tracking(BatchAugment(Forgetful(p=1.0)), draws=3)


@pytest.mark.parametrize(
    "pipeline",
    [
        v2.RandomRotation(45),
        v2.Compose([v2.RandomResizedCrop(64), v2.RandomAffine(30, (0.1, 0.1), (0.5, 1.5), 10)]),
        v2.Resize(50, interpolation=InterpolationMode.NEAREST),
        v2.Resize(50, interpolation=InterpolationMode.NEAREST_EXACT),
        v2.Compose([v2.Resize(500), v2.RandomRotation(30), v2.RandomResizedCrop(64)]),
    ],
)
def test_nearest_neighbour_is_allowed_half_a_step(pipeline):
    assert check_tracking(pipeline, draws=40).max_error < 1


@pytest.mark.parametrize(
    "pipeline",
    [
        v2.RandomRotation(45, BILINEAR, expand=True),
        v2.Compose([v2.RandomPerspective(0.5, 1.0), v2.RandomResizedCrop(96, interpolation=InterpolationMode.BICUBIC)]),
        v2.Compose([v2.RandomZoomOut(p=1.0), v2.RandomCrop(64, pad_if_needed=True), v2.RandomErasing(1.0)]),
        v2.Compose([v2.Pad(20, padding_mode="reflect"), v2.RandomCrop(200)]),
        v2.Compose([v2.RandomCrop(100), v2.Pad(20, fill=0.75)]),
        v2.Compose(
            [v2.RandomPhotometricDistort(), v2.RandomChannelPermutation(), v2.RandomInvert(), v2.RandomEqualize()]
        ),
        nn.Sequential(v2.RandomVerticalFlip(), v2.CenterCrop(100), v2.RandomAdjustSharpness(2), v2.RandomPosterize(3)),
    ],
)
def test_whole_pipelines_pass(pipeline):
    assert check_tracking(pipeline, draws=40).max_error < 0.15


def test_elastic_passes_densely_and_is_refused_otherwise():
    pipeline = v2.Compose([v2.RandomResizedCrop(96), v2.ElasticTransform(50.0)])
    assert check_tracking(MultiView(pipeline, dense=True), draws=40).max_error < 0.5
    with pytest.raises(ValueError, match="ElasticTransform"):
        check_tracking(pipeline)


def test_geometric_kornia_passes():
    augment = BatchAugment(
        K.AugmentationSequential(
            K.RandomAffine(30.0, (0.1, 0.1), p=1.0), K.RandomPerspective(), K.ColorJitter(0.4, 0.4)
        )
    )
    assert check_tracking(augment, draws=8).max_error < 0.3
    assert not any("apply_transform" in vars(module) for module in augment.modules())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    check_tracking(v2.RandomHorizontalFlip(), draws=2)
    assert torch.equal(torch.rand(2), expected)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="no pixel of 2 draws could be compared"):
        check_tracking(v2.Resize(3), draws=2)
