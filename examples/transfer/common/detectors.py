"""The detectors of the published protocols, from torchvision's parts. All batch norms train; nothing is frozen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = (0.5, 1.0, 2.0)


def faster_rcnn_c4(network: ResNet, classes: int, sizes: Sequence[int], max_size: int, rois: int) -> GeneralizedRCNN:
    """Faster R-CNN on the C4 map: layer4 is the box head, with an extra batch norm after it.

    Args:
        network: A ResNet of torchvision's; gives layer1 to layer3 to the backbone, layer4 to the head.
        classes: Number of object classes, without the background.
        sizes: Lengths of the shorter side in pixels, one is drawn in training; the last is the test's.
        max_size: Greatest length of the longer side in pixels.
        rois: Number of regions that are sampled per image in training.
    """
    stem = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    backbone = nn.Sequential(OrderedDict((name, network.get_submodule(name)) for name in stem))
    width = network.layer4[0].conv1.in_channels
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),), (RATIOS,))
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(width, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12000, "testing": 6000},  # one map has all the anchors
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    res5 = OrderedDict(layer4=network.layer4, norm=nn.BatchNorm2d(network.inplanes))
    heads = Res5RoIHeads(
        MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        nn.Sequential(res5),
        FastRCNNPredictor(network.inplanes, classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    return GeneralizedRCNN(backbone, rpn, heads, GeneralizedRCNNTransform(tuple(sizes), max_size, MEAN, STD))


def mask_rcnn_c4(network: ResNet, classes: int, sizes: Sequence[int], max_size: int, rois: int) -> GeneralizedRCNN:
    """Mask R-CNN on the C4 map: masks from the box head's own cells, 7x7 enlarged to 14x14. Arguments as above."""
    model = faster_rcnn_c4(network, classes, sizes, max_size, rois)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(network.inplanes, 256, classes + 1)
    return model


class Res5RoIHeads(RoIHeads):
    """RoI heads whose box and mask branch share the cells of one residual stage.

    torchvision's own forward pass would run the stage a second time for the masks, on the positive boxes alone: batch
    norm would see two populations in training and one of them at test.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's: detections at test, losses in training."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        cells = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        loss_classifier, loss_box_reg = fastrcnn_loss(*self.box_predictor(cells.mean((2, 3))), labels, offsets)
        losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg}
        if self.mask_predictor is not None:
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(cells[torch.cat(labels) > 0]),
                [boxes[label > 0] for boxes, label in zip(proposals, labels, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [index[label > 0] for index, label in zip(matched, labels, strict=True)],
            )
        return [], losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        cells = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        boxes, scores, labels = self.postprocess_detections(
            *self.box_predictor(cells.mean((2, 3))), proposals, image_shapes
        )
        found = [{"boxes": b, "scores": s, "labels": c} for b, s, c in zip(boxes, scores, labels, strict=True)]
        if self.mask_predictor is not None:
            cells = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
            masks = maskrcnn_inference(self.mask_predictor(cells), labels)
            found = [{**one, "masks": mask} for one, mask in zip(found, masks, strict=True)]
        return found


def mask_rcnn_fpn(network: ResNet, classes: int, sizes: Sequence[int], max_size: int, rois: int) -> MaskRCNN:
    """Mask R-CNN on a feature pyramid; batch norm in pyramid and heads, box head of 4 convolutions and 1 linear layer.

    Arguments as of faster_rcnn_c4.
    """
    levels = ["0", "1", "2", "3"]
    return MaskRCNN(
        _pyramid(network, (1, 2, 3, 4), LastLevelMaxPool(), nn.BatchNorm2d),
        min_size=tuple(sizes),
        max_size=max_size,
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=0),
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(1024, classes + 1),
        box_batch_size_per_image=rois,
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=0),
        mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(256, 256, classes + 1),
    )


def fcos_fpn(network: ResNet, classes: int, sizes: Sequence[int], max_size: int) -> FCOS:
    """FCOS on P3 to P7, torchvision's own head with group norm. Arguments as of faster_rcnn_c4."""
    return FCOS(
        _pyramid(network, (2, 3, 4), LastLevelP6P7(256, 256), None),
        classes + 1,  # index 0 stays unused: labels count from 1 in all detectors here
        min_size=tuple(sizes),
        max_size=max_size,
        score_thresh=0.05,  # torchvision's 0.2 suits a demonstration; it cuts the tail that AP counts
    )


def _pyramid(
    network: ResNet, layers: Sequence[int], extra: ExtraFPNBlock, norm: type[nn.Module] | None
) -> BackboneWithFPN:
    # torchvision's resnet_fpn_backbone has no argument for the pyramid's norm, and makes the network by itself.
    names = {f"layer{layer}": str(level) for level, layer in enumerate(layers)}
    widths = [network.inplanes // 2 ** (4 - layer) for layer in layers]
    return BackboneWithFPN(network, names, widths, 256, extra, norm)
