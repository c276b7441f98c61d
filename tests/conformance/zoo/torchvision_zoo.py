"""torchvision: the 85 networks of 0.13 that Torch-Pruning's own table lists, and the rest.

A detector is its backbone and its heads; box, mask and keypoint heads read a pooled feature map
where RoIAlign would give them one for each proposed box.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tests.conformance.zoo.entry import ZooModel, built, clip, floats, picture
from tests.conformance.zoo.torchvision_shim import import_torchvision

# https://github.com/VainF/Torch-Pruning, benchmarks/prunability/readme.md: 77 passed, 8 failed in
# one edition; 81 and 4 in the last one.
TORCH_PRUNING_TABLE = (
    *("alexnet", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    *("densenet121", "densenet169", "densenet201", "densenet161"),
    *(f"efficientnet_b{i}" for i in range(8)),
    *("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
    *("googlenet", "inception_v3", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *("regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf"),
    *("regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
    *("squeezenet1_0", "squeezenet1_1", "vgg11", "vgg13", "vgg16", "vgg19"),
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *("ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "fasterrcnn_resnet50_fpn"),
    *("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    *("fasterrcnn_mobilenet_v3_large_fpn", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
    *("maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2", "raft_large"),
    *("swin_t", "swin_s", "swin_b"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
)
SINCE = (
    *("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maxvit_t", "raft_small"),
    *("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "mvit_v1_b", "mvit_v2_s"),
    *("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
    *("regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf", "resnext101_64x4d"),
    *("swin3d_t", "swin3d_s", "swin3d_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"),
)
DETECTORS = ("ssdlite", "ssd300", "fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet")
SEGMENTERS = ("fcn", "deeplabv3", "lraspp")
TRANSFORMERS = ("vit", "swin", "maxvit", "mvit")
SIZE = 64  # the smallest that every plain CNN takes
# Where 64 is too small: window attention at two resolutions, fixed position tables, fixed pools.
SIZES = {
    "swin": 112,
    "maxvit": 224,
    "inception": 139,
    "ssd300": 300,
    "ssdlite320": 96,
    "vit_h_14": 56,
}
CLIPS = {"s3d": (16, 224), "mvit": (16, 224), "swin3d": (4, 64)}
CLIP = (4, 32)
FLOW_SIZE = 128  # RAFT's correlation pyramid needs 16 x 16 at an eighth of the resolution


def names() -> tuple[str, ...]:
    """All networks: Torch-Pruning's table first."""
    return TORCH_PRUNING_TABLE + SINCE


def entries() -> Iterator[ZooModel]:
    """One entry a network."""
    for name in names():
        inputs = _inputs(name)
        yield ZooModel(
            name=f"torchvision/{name}",
            family=name.partition("_")[0].rstrip("0123456789"),
            source="torchvision",
            kind="transformer" if name.startswith(TRANSFORMERS) else "cnn",
            build=built(partial(_make, name), inputs),
            inputs=inputs,
        )


def _inputs(name: str) -> Callable[[], tuple[Any, ...] | dict[str, Any]]:
    if name.startswith("raft"):
        return lambda: {
            "image1": floats(3, FLOW_SIZE, FLOW_SIZE),
            "image2": floats(3, FLOW_SIZE, FLOW_SIZE, seed=1),
            "num_flow_updates": 2,
        }
    if name in {"mc3_18", "r2plus1d_18", "r3d_18"}:
        return clip(*CLIP)
    for start, shape in CLIPS.items():
        if name.startswith(start):
            return clip(*shape)
    return picture(next((s for start, s in SIZES.items() if name.startswith(start)), SIZE))


def _make(name: str) -> nn.Module:
    models = import_torchvision().models
    options: dict[str, Any] = {"weights": None}
    if name.startswith(DETECTORS + SEGMENTERS):
        options["weights_backbone"] = None
    if name.startswith(("googlenet", "inception")):
        options |= {"init_weights": False, "aux_logits": False}
    if name.startswith("vit"):
        options["image_size"] = SIZES.get(name, SIZE)
    model: nn.Module = models.get_model(name, **options)
    return _detector(name, model) if name.startswith(DETECTORS) else model


def _detector(name: str, model: Any) -> nn.Module:
    if name.startswith(("fasterrcnn", "maskrcnn", "keypointrcnn")):
        return TwoStage(model)
    return OneStage(model.backbone, model.head)


class OneStage(nn.Module):
    """Feature maps and what the heads say of every anchor."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Any:
        """[b, 3, h, w] -> class logits [b, anchors, classes] and boxes [b, anchors, 4], by name."""
        return self.head(list(self.backbone(images).values()))


class TwoStage(nn.Module):
    """Feature maps, proposals and what every head says of one box over the whole picture."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.proposals = model.rpn.head
        heads = model.roi_heads
        self.box = nn.Sequential(heads.box_head, heads.box_predictor)
        self.mask = _pair(heads.mask_head, heads.mask_predictor)
        self.keypoints = _pair(heads.keypoint_head, heads.keypoint_predictor)

    def forward(self, images: Tensor) -> list[Any]:
        """[b, 3, h, w] -> proposals, boxes, then masks and keypoints where there are heads."""
        features = list(self.backbone(images).values())
        found = [*self.proposals(features), self.box(_pooled(features[0], 7))]
        more = [head for head in (self.mask, self.keypoints) if head is not None]
        return found + [head(_pooled(features[0], 14)) for head in more]


def _pair(head: nn.Module | None, predictor: nn.Module | None) -> nn.Module | None:
    return None if head is None or predictor is None else nn.Sequential(head, predictor)


def _pooled(features: Tensor, size: int) -> Tensor:
    return functional.interpolate(features, size=(size, size), mode="bilinear")
