import functools
import operator
import random

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from densessl import (
    BatchAugment,
    DenseCoords,
    MultiView,
    ViewCoords,
    byol_photometric,
    byol_views,
    check_tracking,
    mocov2_photometric,
    mocov2_views,
    simclr_photometric,
    simclr_views,
    tracking,
)

BILINEAR = InterpolationMode.BILINEAR


@pytest.mark.parametrize(("preset", "draws"), [(byol_views, 500), (mocov2_views, 100), (simclr_views, 100)])
def test_published_pipelines_pass_over_many_draws(preset, draws):
    """Their geometric steps are the same; what differs is the colours."""
    report = check_tracking(preset(96), draws=draws)  # of two views
    assert report.draws == 2 * draws
    assert report.max_error < 0.15
    assert report.pixels > 2000 * draws


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


# --- what moves and changes at once, and what hides -------------------------------------------------------------------


def pasted(x):
    plain = x.as_subclass(torch.Tensor).clone()
    half = plain.shape[-1] // 2
    plain[..., :half] = 0.9 * plain[..., -half:]
    return plain


CHANGING = {
    "a dimmed shift": lambda x: x.roll(20, -1) * 0.9,
    "a brighter flip": lambda x: x.flip(-1) + 0.05,
    "an inverted half turn": lambda x: 1 - x.flip(-1, -2),
    "half the image dimmed over the other": pasted,
    "colours alone": lambda x: x * 0.9,
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("often", [1.0, 0.3])
def test_changed_colours_are_not_taken_for_fill(name, often):
    bad = OnImages(CHANGING[name])
    for step in (v2.RandomApply([bad], p=often), v2.RandomChoice([v2.Identity(), bad], p=[1 - often, often])):
        with pytest.raises(ValueError, match="colours changed, cannot be compared"):
            check_tracking(v2.Compose([v2.RandomResizedCrop(96), step]), draws=25)


SPARSE = {
    "swapped channels": lambda x: x[[2, 1, 0]],
    "half of the pixels dropped": lambda x: x * (torch.rand(x.shape[1:]) > 0.5),
    "a sixth of the pixels dropped": lambda x: x * (torch.rand(x.shape[1:]) > 0.17),
}


@pytest.mark.parametrize("name", SPARSE)
def test_changed_colours_that_look_like_fill_are_named_as_a_cause(name):
    changed = "a step of your own changed the colours: leave such steps out of the check$"
    with pytest.raises(ValueError, match=rf"(no pixel of 4 draws|only [1-4]\.\d% of what) .* or {changed}"):
        check_tracking(OnImages(SPARSE[name]), draws=4)


def test_a_choice_with_one_bad_branch_is_found():
    for bad in (OnImages(FORGETFUL["a shift of 2 px"]), Thrown(0.02)):
        with pytest.raises(ValueError, match="did not follow"):
            check_tracking(v2.RandomChoice([v2.Identity(), v2.RandomVerticalFlip(), bad]), draws=20)


class Thrown(v2.Transform):
    """Leaves pixels alone and puts the coords elsewhere."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def transform(self, inpt, params):
        if isinstance(inpt, DenseCoords):
            return DenseCoords(inpt.as_subclass(torch.Tensor) + self.shift)
        if isinstance(inpt, ViewCoords):
            shift = torch.tensor([[1.0, 0, self.shift], [0, 1, 0], [0, 0, 1]])
            return ViewCoords(shift @ inpt.as_subclass(torch.Tensor), canvas_size=inpt.canvas_size)
        return inpt


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shift", [2.5, -7.3, float("nan")])
def test_coords_thrown_out_of_the_source_are_found(dense, shift):
    with pytest.raises(ValueError, match=r"did not follow|know nothing"):
        check_tracking(MultiView(v2.Compose([v2.CenterCrop(120), Thrown(shift)]), dense=dense), draws=4)


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge"])
def test_padding_that_repeats_the_source_beyond_its_edge_is_no_error(mode):
    report = check_tracking(v2.Compose([v2.Pad(90, padding_mode=mode), v2.RandomCrop(80)]), draws=8)
    assert report.max_error < 0.1


class OnMasks(v2.Transform):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def transform(self, inpt, params):
        return tv_tensors.wrap(self.change(inpt), like=inpt) if isinstance(inpt, tv_tensors.Mask) else inpt


def test_masks_are_audited_as_images_are():
    for change in (lambda m: m.roll(3, -1), lambda m: m.flip(-2)):
        with pytest.raises(ValueError, match="the mask's pixels moved and coords did not follow"):
            check_tracking(v2.Compose([v2.CenterCrop(100), OnMasks(change)]), draws=4)
    with pytest.raises(ValueError, match="the mask's labels changed"):
        check_tracking(OnMasks(lambda m: m.flip(-1) // 2), draws=4)
    assert check_tracking(OnMasks(lambda m: m * 0), draws=4).max_error == 0  # fill


def test_steps_that_take_image_and_coords_alone_are_audited_without_a_mask():
    def flip(image, coords):
        return F.horizontal_flip(image), F.horizontal_flip(coords)

    class Unpacks(v2.Transform):
        def forward(self, *inputs):
            image, coords = inputs
            return flip(image, coords)

    for step in (flip, Unpacks()):
        assert check_tracking(step, draws=4).max_error < 1e-3


def test_views_of_fill_and_strong_perspective_end_in_a_report_or_an_error_of_ours():
    gone = v2.Compose([v2.RandomRotation((180, 180), center=(0, 0)), v2.RandomVerticalFlip(1.0)])
    with pytest.raises(ValueError, match="nothing but fill"):
        check_tracking(MultiView(gone, dense=True), draws=4)
    assert check_tracking(v2.RandomPerspective(0.8, p=1.0, interpolation=BILINEAR), draws=8).max_error < 1


def test_the_share_is_that_of_the_source_pixels_shown():
    whole = check_tracking(v2.Identity(), draws=4)
    assert whole.share == 1
    turned = check_tracking(v2.RandomRotation((30, 30), BILINEAR), draws=4)
    assert 0.9 < turned.share < 1  # fill does not count, rims do
    with pytest.raises(ValueError, match=r"no pixel|could be compared"):
        check_tracking(v2.Resize(4), draws=2)
    with pytest.raises(ValueError, match=r"only 4.0% of what the views show .* at least 5% expected"):
        check_tracking(v2.Resize((5, 5)), draws=2)  # one pixel lies within the rims


class Forgets(v2.Transform):
    """Makes the dense coords of the view's left part unknown."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def transform(self, inpt, params):
        if not isinstance(inpt, DenseCoords):
            return inpt
        known = inpt.as_subclass(torch.Tensor).clone()
        known[..., : round(self.share * known.shape[-1])] = float("nan")
        return DenseCoords(known)


def test_a_quarter_of_each_view_must_be_known():
    def pipeline(share):
        return MultiView(v2.Compose([v2.RandomResizedCrop(100), Forgets(share)]), dense=True)

    assert check_tracking(pipeline(0.72), draws=2).max_error < 1
    with pytest.raises(ValueError, match=r"coords know nothing of 7\d% of what a view shows .* at least 25% must be"):
        check_tracking(pipeline(0.78), draws=2)


def test_errors_that_are_not_found_are_named():
    """Those that the docstring names are not found, so that nobody relies on it."""

    class Shift(v2.Transform):
        def __init__(self, applies):
            super().__init__()
            self.applies = applies

        def transform(self, inpt, params):
            plain = inpt.as_subclass(torch.Tensor)
            moves = isinstance(inpt, tv_tensors.Image) and self.applies(plain)
            return tv_tensors.wrap(plain.roll(9, -1), like=inpt) if moves else inpt

    for applies in (
        lambda image: image.dtype == torch.uint8,
        lambda image: max(image.shape) > 403,
        lambda image: image.std() < 0.05,  # content
    ):
        check_tracking(Shift(applies), draws=4)
    said = " ".join(check_tracking.__doc__.split())
    for words in ("less often than once in ``draws``", "content or dtype", "larger than 403 pixels", "within the rim"):
        assert words in said


def test_generators_of_random_and_numpy_are_left_alone():
    class Draws(v2.Transform):
        def transform(self, inpt, params):
            random.random(), np.random.rand()  # noqa: NPY002
            return inpt

    random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    check_tracking(Draws(), draws=2)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


# --- kornia -----------------------------------------------------------------------------------------------------------


class MovingIntensity(K.IntensityAugmentationBase2D):
    def apply_transform(self, input, params, flags, transform=None):
        return input.roll(5, -1)


class MovingBlur(K.RandomGaussianBlur):
    def apply_transform(self, input, params, flags, transform=None):
        return input.flip(-2)


class DerivedBlur(K.RandomGaussianBlur):
    """Adds nothing to kornia's."""


def test_intensity_classes_of_ones_own_that_move_pixels_are_found():
    for moving in (MovingIntensity(p=1.0), MovingBlur((3, 3), (0.1, 2.0), p=1.0)):
        for augmentation in (moving, K.AugmentationSequential(K.ColorJitter(0.4), moving)):
            with pytest.raises(ValueError, match="did not follow"):
                check_tracking(BatchAugment(augmentation), draws=3)
    assert check_tracking(BatchAugment(DerivedBlur((3, 3), (0.1, 2.0), p=1.0)), draws=3).max_error == 0


def test_batches_are_audited_from_cropped_coords():
    """Border padding is right for whole sources, beyond which nothing matches, and wrong for crops."""
    with pytest.raises(ValueError, match="did not follow"):
        check_tracking(BatchAugment(K.RandomAffine(0.0, (0.2, 0.2), p=1.0, padding_mode="border")), draws=4)


# --- coords in another image ------------------------------------------------------------------------------------------


def wavy(size: tuple[int, int]) -> torch.Tensor:
    """Dense coords of an image in another one: a smooth wave, a region unknown, and a jump at an edge."""
    y, x = torch.meshgrid(
        (torch.arange(size[0]) + 0.5) / size[0], (torch.arange(size[1]) + 0.5) / size[1], indexing="ij"
    )
    start = torch.stack([0.8 * x + 0.03 * (7 * y).sin() + 0.1, 0.9 * y + 0.02 * (5 * x).cos()])
    start[:, :, size[1] // 2 :] += 0.07
    start[:, 20:50, 30:60] = torch.nan
    return start


CROP = v2.Compose([v2.RandomResizedCrop((64, 80), scale=(0.3, 0.9)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])


@pytest.mark.parametrize("dense", [False, True])
def test_positions_in_another_image_are_audited(dense):
    start = wavy((150, 190))
    report = check_tracking(MultiView(CROP, dense=dense), draws=8, coords=start, source_size=(300, 200))
    assert report.max_error < 0.3
    tilted = torch.tensor([[0.7, 0.1, 0.15], [-0.1, 0.6, 0.3], [0.05, 0.1, 1.0]])
    assert check_tracking(MultiView(CROP, dense=dense), draws=8, coords=tilted, source_size=(300, 200)).max_error < 0.5


def test_positions_that_are_not_carried_rightly_are_found(monkeypatch):
    """A flow that is read upside down: pixels and coords of the image agree, positions in the other one do not."""
    right = tracking.carried
    monkeypatch.setattr(tracking, "carried", lambda place, start: right(place, start.flip(2)))
    with pytest.raises(ValueError, match="positions in the other image moved and coords did not follow"):
        check_tracking(MultiView(CROP), draws=8, coords=wavy((150, 190)))


def test_other_starts_of_an_audit_are_refused():
    with pytest.raises(ValueError, match="coords: expected positions in the other image's unit square"):
        check_tracking(MultiView(CROP), coords=100 * wavy((150, 190)))
    with pytest.raises(ValueError, match="coords: no pixel of 2 draws could be compared"):
        check_tracking(MultiView(CROP), draws=2, coords=torch.full((2, 90, 80), torch.nan))
    with pytest.raises(ValueError, match="coords: expected None for a BatchAugment"):
        check_tracking(byol_photometric()[0], coords=wavy((150, 190)))


# --- colours that change and look like a move, and steps without a signature ------------------------------------------


def solarized(x):
    return torch.where(x.as_subclass(torch.Tensor) > 0.8, 1 - x, x)


def noisy(x):
    return torch.cat([x[:1] + 0.2 * torch.randn_like(x[:1]), x[1:]])


LOOK_MOVED = {
    "swapped x and y": lambda x: x[[1, 0, 2]],
    "noise in one channel": noisy,
    "one channel inverted": lambda x: torch.cat([x[:1], 1 - x[1:2], x[2:]]),
    "solarized above the marks": solarized,
}


@pytest.mark.parametrize("name", LOOK_MOVED)
@pytest.mark.parametrize("often", [1.0, 0.3])
def test_changed_colours_that_look_like_a_move_are_told_from_it(name, often):
    bad = v2.RandomApply([OnImages(LOOK_MOVED[name])], p=often)
    for pipeline in ([bad], [v2.RandomResizedCrop(96), bad, v2.RandomRotation(20, fill=0.5)]):
        with pytest.raises(ValueError, match=r"colours changed, cannot be compared: .*by RandomApply"):
            check_tracking(v2.Compose(pipeline), draws=10)


@pytest.mark.parametrize("name", FORGETFUL)
def test_moves_are_not_taken_for_changed_colours(name):
    """Behind fill of another value in each channel as well."""
    rotated = v2.RandomAffine(20, fill=[0.9, 0.1, 0.4], interpolation=v2.InterpolationMode.BILINEAR)
    with pytest.raises(ValueError, match="pixels moved and coords did not follow"):
        check_tracking(v2.Compose([rotated, OnImages(FORGETFUL[name])]), draws=10)


def test_a_move_is_told_of_a_step_that_needs_its_mask():
    def by_index(*parts):
        return parts[0].as_subclass(torch.Tensor).flip(-1), parts[1], parts[2]

    def by_name(image, coords, mask):
        return image.as_subclass(torch.Tensor).flip(-1), coords, mask

    def by_default(image, coords, mask=None):
        return image.as_subclass(torch.Tensor).flip(-1), coords, tv_tensors.wrap(mask.clone(), like=mask)

    for step in (by_index, by_name, by_default):
        with pytest.raises(ValueError, match="pixels moved and coords did not follow"):
            check_tracking(step, draws=2)


class WithoutSignature:
    """Python code whose signature cannot be read."""

    __signature__ = 3

    def __init__(self, function):
        self.__call = function

    def __call__(self, image, coords):
        return image, coords


class AloneWithoutSignature(WithoutSignature):
    def __call__(self, image):
        return image


BUILTIN = {
    "neg": torch.neg,
    "method": torch.Tensor.neg,
    "itemgetter": operator.itemgetter(0),
    "partial": functools.partial(torch.flip, dims=[-1]),
    "type": dict,
    "inside": v2.RandomApply([torch.neg]),
    "alone": AloneWithoutSignature(None),
}


@pytest.mark.parametrize("name", BUILTIN)
def test_steps_without_a_signature_are_refused_by_what_to_write(name):
    message = r"transforms: expected steps that take the image and its coords, .*(v2\.Lambda|takes the image alone)"
    for make in (MultiView, check_tracking):
        with pytest.raises(ValueError, match=message):
            make(v2.Compose([BUILTIN[name]]))


def test_python_steps_without_a_signature_work():
    step = WithoutSignature(None)
    assert MultiView(step)(torch.rand(3, 16, 20))[0].image.shape == (3, 16, 20)
    assert check_tracking(step, draws=2).max_error == 0
