"""Methods of one's own that lack what the training looks for are refused; runs that learn nothing are told."""

import copy

import pytest
import torch
from making import TINY
from pytorch_lightning.callbacks import Callback
from torch import nn
from torchvision.io import write_png

from densessl import EMA, ConvMLP, DistanceMatcher
from examples.pretrain.common.cli import make_run
from examples.pretrain.own_method import OwnMethod, recipe


class HeadApart(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        self.encoder, self.head = backbone, ConvMLP(width, hidden_dim, dim)


class StemFirst(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        self.encoder = nn.Sequential(nn.Identity(), backbone)


class NoEncoder(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        del self.encoder


class Copied(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        self.target = copy.deepcopy(self.encoder)


class Teacher(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        self.teacher = EMA(self.encoder)


class LossAlone(OwnMethod):
    def forward(self, view1, view2):
        return super().forward(view1, view2).loss


class LossOfEach(OwnMethod):
    def forward(self, view1, view2):
        step = super().forward(view1, view2)
        return step._replace(loss=step.loss.expand(4))


class LossAsNumber(OwnMethod):
    def forward(self, view1, view2):
        return super().forward(view1, view2)._replace(loss=1.0)


class WithoutTarget(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        self.target = None

    def forward(self, view1, view2):
        self.target = self.encoder
        step = super().forward(view1, view2)
        self.target = None
        return step


class NoPairs(DistanceMatcher):
    def forward(self, *args, **options):
        return super().forward(*args, **options) & False


class Unmatched(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone, width, hidden_dim, dim)
        self.match = NoPairs()


class Frozen(OwnMethod):
    def __init__(self, backbone, width, hidden_dim=8, dim=8):
        super().__init__(backbone.requires_grad_(False), width, hidden_dim, dim)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for index in range(16):
        image = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8, generator=generator)
        write_png(image, str(root / f"{index:02}.png"))
    return root


def made(method, photos, out, *others):
    return make_run(
        recipe()._replace(method=method),
        [*TINY, "--data.folder", str(photos), "--data.size=32", "--data.batch_size=4", "--data.workers=0", "--out",
         str(out), "--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.enable_progress_bar=false",
         "--probe.images=4", *others],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (HeadApart, r"HeadApart.encoder to begin with the backbone .*, got FeatureMap that begins with Conv2d"),
        (StemFirst, r"StemFirst.encoder to begin with the backbone .*, got Sequential that begins with Identity"),
        (NoEncoder, r"NoEncoder.encoder to begin with the backbone .*, got none"),
        (Copied, r"Copied.target to be an EMA of the encoder, got Sequential"),
        (Teacher, r"in Teacher.target, which the training updates, got an EMA in Teacher.teacher"),
    ],
)
def test_a_method_without_its_parts_is_refused(method, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(method, photos, tmp_path / "run")


@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize(
    ("method", "got"),
    [
        (LossAlone, "Tensor"),
        (LossOfEach, r"a Step whose loss is \(4,\)"),
        (LossAsNumber, "a Step whose loss is float"),
    ],
)
def test_a_step_has_a_scalar_loss(method, got, anchor, photos, tmp_path):
    with pytest.raises(ValueError, match=f"method: expected forward to return a Step with a scalar loss, got {got}"):
        made(method, photos, tmp_path / "run", f"--method.anchor={anchor}").fit()


def test_a_target_of_none_is_no_target(photos, tmp_path):
    run = made(WithoutTarget, photos, tmp_path / "run")
    run.fit()
    assert run.trainer.global_step == 4


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        (Unmatched, "No image had a pair of matching cells in any logged step"),
        (Frozen, "No weight of the backbone has changed"),
        (OwnMethod, "The score pck went from"),
    ],
)
def test_a_run_that_learns_nothing_is_not_called_better(method, verdict, photos, tmp_path):
    made(method, photos, tmp_path / "run").fit()
    assert verdict in (tmp_path / "run" / "report.md").read_text()


class Fail(Callback):
    """Ends a run by an error before the step after ``at``."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.at:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("method", [OwnMethod, Frozen])
def test_a_continued_run_that_fails_at_once_is_judged_from_its_start(method, photos, tmp_path):
    for at, others in ((2, []), (2, ["--ckpt_path=last"])):
        run = made(method, photos, tmp_path / "run", "--save_every_n_steps=2", *others)
        run.trainer.callbacks.append(Fail(at))
        with pytest.raises(RuntimeError, match="out of memory"):
            run.fit()
        report = (tmp_path / "run" / "report.md").read_text()
        assert "stopped after 2 of 4 steps by RuntimeError" in report
        assert ("No weight of the backbone has changed" in report) == (method is Frozen)


def test_a_run_without_later_readings_names_no_cause_of_their_change(photos, tmp_path):
    run = made(OwnMethod, photos, tmp_path / "run")
    run.trainer.callbacks.append(Fail(0))
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "No weight of the backbone has changed." in report
    assert "batch norm's statistics alone" not in report
