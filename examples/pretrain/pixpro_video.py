"""PixPro on pairs of frames: positives are the pixels that optical flow joins. Ours; nothing published to compare with.

    python examples/pretrain/pixpro_video.py fit --data.folder FRAMES --data.flow FLOW \\
        --config examples/pretrain/configs/pixpro_video_r50_1gpu.yaml

``examples/quickstart/moving.py`` draws frames with exact flow, to try it without a data set.
"""

from torch import nn

from densessl import EMA, PPM, ConvMLP, DistanceMatcher, MaskedView, PixProLoss, View
from examples.pretrain.common.step import Step, pair_metrics, valid_cells


class PixProVideo(nn.Module):
    """PixPro whose second view is of another frame than the first, with positions in the first one's frame.

    Distances are in pixels and in diagonals of the first view's cells. A cell of the second view that lies astride the
    edge of an object that moves reaches from the object to what is behind it: by the larger cell, as published, it
    would match everything in between.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Two cells are a positive pair if their centres lie less than this distance apart in the first view's
            frame, in diagonals of the first view's cell; above 0. PixPro's published value is 0.7.
    """

    in_words = "PixPro on frames of video"  # in logs and reports

    def __init__(
        self, backbone: nn.Module, width: int, hidden_dim: int = 4096, dim: int = 256, threshold: float = 0.7
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, ConvMLP(width, hidden_dim, dim))
        self.ppm = PPM(nn.Conv2d(dim, dim, 1))
        self.target = EMA(self.encoder)
        self.match, self.loss = DistanceMatcher(threshold, unit="query"), PixProLoss()

    def forward(self, view1: View | MaskedView, view2: View | MaskedView) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        size = z1.shape[-2:]
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, view1.source_size, valid1, valid2)
        loss = 2 * (self.loss(self.ppm(z1, valid1), t2, mask) + self.loss(self.ppm(z2, valid2), t1, mask.mT))
        return Step(loss, {}, lambda: pair_metrics(z1, t2, mask, valid1, valid2))


def check(options) -> None:
    """Refuses a run without flow, which would be PixPro on single frames."""
    if options.data.flow is None:
        raise ValueError("data.flow: expected a folder of optical flow, got none; for single images there is pixpro.py")


def recipe():
    from examples.pretrain.common.cli import Recipe  # Lightning comes in here, not with the method

    without = ("data.images", "data.segments", "data.grid", "data.segment_scale")
    return Recipe(PixProVideo, without=without, check=check)


if __name__ == "__main__":
    recipe().run()
