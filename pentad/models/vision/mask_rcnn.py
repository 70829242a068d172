"""Faster R-CNN (arXiv:1506.01497) and Mask R-CNN (arXiv:1703.06870) on a ResNet with a feature pyramid.

The files are torchvision's, with old and new names. Parts have its names, and details are those of its code.

Legend: B images, N objects or boxes, K classes with the background (0), A anchors of a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.models.vision.config import sizes
from pentad.models.vision.labels import COCO_91
from pentad.models.vision.resnet import COUNTERS, Backbone, ResNet, ResNetConfig, initialize_parts, stage_fields
from pentad.nn.boxes import batched_nms, clip_boxes, decode_boxes
from pentad.nn.conv import FrozenBatchNorm2d
from pentad.nn.pyramid import Pyramid, pool_levels
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
ANCHOR_SIDES = (32, 64, 128, 256, 512)
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height by width
PRE_NMS = {True: 2000, False: 1000}
POST_NMS = {True: 2000, False: 1000}
RPN_NMS, BOX_NMS = 0.7, 0.5
LEAST_SIDE = 1e-3, 1e-2  # of proposals and of detections
MAX_DETECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class MaskRCNNConfig(ModelConfig):
    """Sizes of a Mask R-CNN; the defaults are those of torchvision's ResNet-50.

    Attributes:
        embedding_size, hidden_sizes, depths, layer_type: of the backbone, see `ResNetConfig`.
        names: the classes' names, the first one for the background.
        frozen: batch norms aren't trained, as in the published COCO weights, whose eps is 0.
        masks: False for a Faster R-CNN.
        pyramid_size, head_size: channels of the pyramid, and of the box head.
        roi_align: False for RoIPool, as in Faster R-CNN's paper; masks suffer from its rounding.
        min_size, max_size: images are resized to this shorter side, unless the longer one would exceed the other.
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    names: tuple[str, ...] = COCO_91
    frozen: bool = True
    masks: bool = True
    roi_align: bool = True
    pyramid_size: int = 256
    head_size: int = 1024
    min_size: int = 800
    max_size: int = 1333

    def resolve(self, checkpoint: Checkpoint) -> Self:
        self.backbone.resolve(checkpoint)
        if len(self.names) < 2:
            raise BadInput(f"{checkpoint.path}: names are {list(self.names)}; expected the background's and a class's")
        if len(self.depths) != 4:
            raise BadInput(f"{checkpoint.path}: the backbone has {len(self.depths)} stages; expected 4")
        return self

    @property
    def backbone(self) -> ResNetConfig:
        fields = {name: getattr(self, name) for name in ("embedding_size", "hidden_sizes", "depths", "layer_type")}
        return ResNetConfig(**fields)


class Instances(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes_N4: in pixels of the network's input.
        scores_N: falling.
        labels_N: from 1.
        masks_NMM: probabilities in the boxes; None without a mask head.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    labels_N: Tensor
    masks_NMM: Tensor | None


class Proposals(NamedTuple):
    """What the region proposal network says.

    Attributes:
        boxes: [N, 4] for each image, by falling score.
        objectness_BN, deltas_BN4: for each anchor.
        anchors_N4: of all levels.
    """

    boxes: list[Tensor]
    objectness_BN: Tensor
    deltas_BN4: Tensor
    anchors_N4: Tensor


class RPNHead(nn.Module):
    """Objectness and box deltas of each anchor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)))
        self.cls_logits = nn.Conv2d(channels, len(ANCHOR_RATIOS), 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * len(ANCHOR_RATIOS), 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, H * W * A] and [B, H * W * A, 4] of each level."""
        objectness, deltas = [], []
        for one in maps:
            y_BCHW = F.relu(self.conv(one))
            objectness.append(self.cls_logits(y_BCHW).permute(0, 2, 3, 1).flatten(1))
            found_BXHW = self.bbox_pred(y_BCHW).permute(0, 2, 3, 1)
            deltas.append(found_BXHW.reshape(len(one), -1, 4))
        return objectness, deltas


class BoxHead(nn.Module):
    """Two linear layers."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * 7 * 7, hidden)
        self.fc7 = nn.Linear(hidden, hidden)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(x_NCHW.flatten(1)))))


class BoxPredictor(nn.Module):
    """Class logits [N, K] and box deltas [N, 4 K]."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(hidden, classes)
        self.bbox_pred = nn.Linear(hidden, 4 * classes)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x_ND), self.bbox_pred(x_ND)


class MaskPredictor(nn.Module):
    """Mask logits of each class at twice the size, [N, K, M, M]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(channels, classes, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NKMM: Tensor = self.mask_fcn_logits(F.relu(self.conv5_mask(x_NCHW)))
        return logits_NKMM


class MaskRCNN(nn.Module):
    """Proposals from a feature pyramid; then the class, box and mask of each."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        c = self.config = config
        norm = partial(FrozenBatchNorm2d, eps=0.0) if c.frozen else nn.BatchNorm2d
        self.backbone = nn.Module()
        self.backbone.body = Backbone(c.backbone, norm)
        self.backbone.fpn = Pyramid(c.hidden_sizes, c.pyramid_size)
        self.rpn = nn.Module()
        self.rpn.head = RPNHead(c.pyramid_size)
        self.roi_heads = nn.Module()
        self.roi_heads.box_head = BoxHead(c.pyramid_size, c.head_size)
        self.roi_heads.box_predictor = BoxPredictor(c.head_size, len(c.names))
        if c.masks:
            convs = (nn.Conv2d(c.pyramid_size, c.pyramid_size, 3, padding=1) for _ in range(4))
            self.roi_heads.mask_head = nn.Sequential(*(nn.Sequential(conv, nn.ReLU(inplace=True)) for conv in convs))
            self.roi_heads.mask_predictor = MaskPredictor(c.pyramid_size, len(c.names))

    def forward(
        self, images_B3HW: Tensor, image_sizes: Sequence[tuple[int, int]], threshold: float = 0.05
    ) -> list[Instances]:
        """Find the objects of images.

        Args:
            images_B3HW: normalized, padded to equal sizes at the right and the bottom.
            image_sizes: height and width of each without the padding.
            threshold: the least score.
        """
        maps = self.maps(images_B3HW)
        boxes = self.propose(maps, images_B3HW.shape[2:], image_sizes).boxes
        height = images_B3HW.shape[2]
        logits_NK, deltas_NX = self.classify(maps, boxes, height)
        found = self._select(logits_NK, deltas_NX, boxes, image_sizes, threshold)
        if not self.config.masks:
            return found
        logits_NKMM = self.masks(maps, [one.boxes_N4 for one in found], height)
        labels_N = torch.cat([one.labels_N for one in found])
        chosen_NMM = logits_NKMM[torch.arange(len(labels_N), device=labels_N.device), labels_N].sigmoid()
        parts = torch.split(chosen_NMM, [len(one.labels_N) for one in found])
        return [one._replace(masks_NMM=part) for one, part in zip(found, parts, strict=True)]

    def maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """The pyramid, five maps at strides 4 to 64."""
        body, pyramid = self.backbone.body, self.backbone.fpn
        assert isinstance(body, Backbone)
        assert isinstance(pyramid, Pyramid)
        maps: list[Tensor] = pyramid(body.features(images_B3HW))
        return maps

    def propose(
        self, maps: Sequence[Tensor], padded: Sequence[int], image_sizes: Sequence[tuple[int, int]]
    ) -> Proposals:
        """The most object-like boxes of each image; no gradient reaches them."""
        objectness, deltas = self.rpn.head(maps)  # type: ignore[operator]
        anchors = [level_anchors(one, padded, side) for one, side in zip(maps, ANCHOR_SIDES, strict=True)]
        counts = [len(one) for one in anchors]
        objectness_BN, deltas_BN4, anchors_N4 = torch.cat(objectness, 1), torch.cat(deltas, 1), torch.cat(anchors)
        boxes = []
        with torch.no_grad():
            tops_BN = [level.topk(min(PRE_NMS[self.training], level.shape[1]), 1)[1] for level in objectness]
            levels_N = torch.cat([torch.full((top.shape[1],), i) for i, top in enumerate(tops_BN)]).to(
                anchors_N4.device
            )
            starts = [sum(counts[:i]) for i in range(len(counts))]
            chosen_BN = torch.cat([top + start for top, start in zip(tops_BN, starts, strict=True)], 1)
            for chosen_N, scores_N, deltas_N4, size in zip(
                chosen_BN, objectness_BN, deltas_BN4, image_sizes, strict=True
            ):
                found_N4 = decode_boxes(deltas_N4[chosen_N], anchors_N4[chosen_N], RPN_WEIGHTS)
                found_N4 = clip_boxes(found_N4, *size)
                scores_N = scores_N[chosen_N].sigmoid()
                large_N = _large(found_N4, LEAST_SIDE[0])
                found_N4 = found_N4[large_N]
                kept_N = batched_nms(found_N4, scores_N[large_N], levels_N[large_N], RPN_NMS)
                boxes.append(found_N4[kept_N[: POST_NMS[self.training]]])
        return Proposals(boxes, objectness_BN, deltas_BN4, anchors_N4)

    def classify(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], height: int) -> tuple[Tensor, Tensor]:
        """Class logits [N, K] and box deltas [N, 4 K] of boxes."""
        heads = self.roi_heads
        pooled = pool_levels(maps[:4], boxes, 7, height, align=self.config.roi_align)
        found: tuple[Tensor, Tensor] = heads.box_predictor(heads.box_head(pooled))  # type: ignore[operator]
        return found

    def masks(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], height: int) -> Tensor:
        """Mask logits of boxes, [N, K, M, M]."""
        heads = self.roi_heads
        pooled = pool_levels(maps[:4], boxes, 14, height, align=self.config.roi_align)
        logits: Tensor = heads.mask_predictor(heads.mask_head(pooled))  # type: ignore[operator]
        return logits

    def _select(
        self,
        logits_NK: Tensor,
        deltas_NX: Tensor,
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        threshold: float,
    ) -> list[Instances]:
        counts, results = [len(one) for one in proposals], []
        scores = torch.split(logits_NK.softmax(1), counts)
        deltas = torch.split(deltas_NX.view(-1, logits_NK.shape[1], 4), counts)
        for scores_NK, deltas_NK4, boxes_N4, size in zip(scores, deltas, proposals, image_sizes, strict=True):
            rows_N, labels_N = (scores_NK[:, 1:] > threshold).nonzero(as_tuple=True)
            labels_N = labels_N + 1
            scores_N = scores_NK[rows_N, labels_N]
            found_N4 = clip_boxes(decode_boxes(deltas_NK4[rows_N, labels_N], boxes_N4[rows_N], BOX_WEIGHTS), *size)
            large_N = _large(found_N4, LEAST_SIDE[1])
            found_N4, scores_N, labels_N = found_N4[large_N], scores_N[large_N], labels_N[large_N]
            kept_N = batched_nms(found_N4, scores_N, labels_N, BOX_NMS)[:MAX_DETECTIONS]
            results.append(Instances(found_N4[kept_N], scores_N[kept_N], labels_N[kept_N], None))
        return results


@torch.no_grad()
def start_from_resnet(network: MaskRCNN, resnet: nn.Module) -> None:
    """Copy the stages of a classifier into the backbone.

    Raises:
        BadInput: it is another network, or its sizes are others.
    """
    if not isinstance(resnet, ResNet):
        raise BadInput(f"the backbone is a {type(resnet).__name__}; expected a ResNet")
    ours, theirs = network.config.backbone, resnet.config
    for name in ("embedding_size", "hidden_sizes", "depths", "layer_type"):
        if getattr(ours, name) != getattr(theirs, name):
            raise BadInput(f"the backbone's {name} is {getattr(theirs, name)}; expected {getattr(ours, name)}")
    body = cast("nn.Module", network.backbone.body)
    names = body.state_dict().keys()
    body.load_state_dict({name: tensor for name, tensor in resnet.state_dict().items() if name in names})


def level_anchors(one: Tensor, padded: Sequence[int], side: int) -> Tensor:
    """The anchors of a map, [H * W * A, 4]: rounded boxes around each position."""
    height, width = one.shape[2:]
    tall = torch.tensor(ANCHOR_RATIOS, device=one.device).sqrt()
    half_A2 = torch.stack([side / tall, side * tall], 1)
    cell_A4 = (torch.cat([-half_A2, half_A2], 1) / 2).round()
    y, x = torch.meshgrid(
        torch.arange(height, device=one.device) * (padded[0] // height),
        torch.arange(width, device=one.device) * (padded[1] // width),
        indexing="ij",
    )
    shift_P4 = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
    return (shift_P4 + cell_A4).view(-1, 4)


def _large(boxes_N4: Tensor, least: float) -> Tensor:
    """The boxes whose sides are at least this long."""
    return ((boxes_N4[:, 2:] - boxes_N4[:, :2]) >= least).all(1).nonzero()[:, 0]


def _tables(config: MaskRCNNConfig) -> list[KeyTable]:
    """torchvision's names since 0.13, and the older ones."""
    old = [Rule("rpn.head.conv.0.0", "rpn.head.conv")]
    old += [Rule(f"roi_heads.mask_head.{i}.0", f"roi_heads.mask_head.mask_fcn{i + 1}") for i in range(4)]
    for i in range(4):
        for blocks in ("inner_blocks", "layer_blocks"):
            old.append(Rule(f"backbone.fpn.{blocks}.{i}.0", f"backbone.fpn.{blocks}.{i}"))
    return [KeyTable([], [COUNTERS], prefix=""), KeyTable(old, [COUNTERS], prefix="")]


def recognizes(checkpoint: Checkpoint) -> bool:
    if "model_type" in checkpoint.config:
        return bool(checkpoint.config["model_type"] == "mask_rcnn")
    return {"backbone.body.conv1.weight", "rpn.head.cls_logits.weight"} <= checkpoint.tensors.keys()


def from_tensors(checkpoint: Checkpoint) -> MaskRCNNConfig:
    """The config of torchvision's files, read off their tensors. Only trainable batch norms count batches."""
    backbone: dict[str, Any] = stage_fields(checkpoint, "backbone.body.")
    del backbone["num_channels"]
    classes = sizes(checkpoint, "roi_heads.box_predictor.cls_score.weight")[0]
    names = COCO_91 if classes == len(COCO_91) else ("background", *(str(i) for i in range(1, classes)))
    return MaskRCNNConfig(
        **backbone,
        names=names,
        frozen="backbone.body.bn1.num_batches_tracked" not in checkpoint.tensors,
        masks="roi_heads.mask_predictor.conv5_mask.weight" in checkpoint.tensors,
        pyramid_size=sizes(checkpoint, "rpn.head.cls_logits.weight")[1],
        head_size=sizes(checkpoint, "roi_heads.box_head.fc6.weight")[0],
    )


@torch.no_grad()
def initialize(network: nn.Module, config: MaskRCNNConfig, generator: torch.Generator) -> None:
    """The backbone as a ResNet, and small normal weights for the region proposals, as in torchvision."""
    initialize_parts(network, generator)
    for name, parameter in network.named_parameters():
        if name.startswith("rpn.") and parameter.dim() > 1:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.01, generator=generator))


FAMILY = Family(
    MaskRCNNConfig,
    MaskRCNN,
    key_tables={"state_dict": _tables, "hf": _tables},
    names=ArchitectureNames("mask_rcnn", "MaskRCNN"),
    recognizes=recognizes,
    task="detect",
    read_config=from_tensors,
    initialize=initialize,
)
