"""Small detectors made like those of torchvision, of plain ops."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 4


@dataclass
class Images:
    tensors: Tensor
    image_sizes: list[tuple[int, int]]


class Transform(nn.Module):
    """Normalises, pads to a multiple of eight, stacks; scales boxes back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, images: list[Tensor], targets: Any) -> tuple[Images, Any]:
        height, width = (-(-max(i.shape[d] for i in images) // 8) * 8 for d in (1, 2))
        padded = [
            F.pad(i - self.mean[:, None, None], (0, width - i.shape[2], 0, height - i.shape[1]))
            for i in images
        ]
        return Images(torch.stack(padded), [(i.shape[1], i.shape[2]) for i in images]), targets


class Backbone(nn.Module):
    def __init__(self, *, single: bool = False) -> None:
        super().__init__()
        self.single = single
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        fine = self.drop(self.b(F.relu(self.a(x))))
        if self.single:
            return fine
        return OrderedDict([("0", fine), ("1", F.max_pool2d(fine, 2))])


class Head(nn.Module):
    """Scores and boxes of each cell, all levels together."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        assert isinstance(levels, list)
        scores = [self.scores(x).flatten(1) for x in levels]
        boxes = [self.boxes(x).flatten(2).transpose(1, 2) for x in levels]
        return {"scores": torch.cat(scores, 1), "boxes": torch.cat(boxes, 1)}


class TwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = [self.head([x]) for x in levels]
        return [f["scores"] for f in found], [f["boxes"] for f in found]


def suppressed(scores: Tensor, boxes: Tensor) -> Tensor:
    """Indices of boxes of positive score that overlap with no better one."""
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if scores[i] <= 0:
            break
        low = [torch.maximum(boxes[i, :2], boxes[k, :2]) for k in kept]
        high = [torch.minimum(boxes[i, 2:], boxes[k, 2:]) for k in kept]
        if not any(bool((h > w).all()) for w, h in zip(low, high, strict=True)):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def anchors(levels: list[Tensor], height: int) -> Tensor:
    centres = []
    for level in levels:
        rows, columns = level.shape[-2:]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres.append(torch.stack([x, y, x, y], -1).reshape(-1, 4) * (height / rows))
    return torch.cat(centres)


class OneStage(nn.Module):
    def __init__(self, *, single: bool = False) -> None:
        super().__init__()
        self.transform, self.backbone, self.head = Transform(), Backbone(single=single), Head()

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        assert not self.training
        batch, _ = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        features = OrderedDict([("0", features)]) if isinstance(features, Tensor) else features
        levels = list(features.values())
        raw = self.head(levels)
        boxes = raw["boxes"] + anchors(levels, batch.tensors.shape[2])
        rows = [(s, b, suppressed(s, b)) for s, b in zip(raw["scores"], boxes, strict=True)]
        return [{"scores": s[k], "boxes": b[k]} for s, b, k in rows]


class Proposals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = TwoLists()

    def forward(self, images: Images, features: dict[str, Tensor]) -> list[Tensor]:
        levels = list(features.values())
        scores, boxes = (torch.cat(parts, 1) for parts in self.head(levels))
        boxes = boxes + anchors(levels, images.tensors.shape[2])
        return [b[suppressed(s, b)] for s, b in zip(scores, boxes, strict=True)]


class Pooled(nn.Module):
    """Reads the values of the features at each proposal."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 2)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> list[Tensor]:
        fine = features["0"]
        found = []
        for image, rows in zip(fine, boxes, strict=True):
            x = (rows[:, 0] / STRIDE).long().clamp(0, image.shape[2] - 1)
            y = (rows[:, 1] / STRIDE).long().clamp(0, image.shape[1] - 1)
            found.append(self.out(image[:, y, x].T))
        return found


class TwoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone = Transform(), Backbone()
        self.rpn, self.roi_heads = Proposals(), Pooled()

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        batch, _ = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        boxes = self.rpn(batch, features)
        classes = self.roi_heads(features, boxes)
        return [{"boxes": b, "classes": c} for b, c in zip(boxes, classes, strict=True)]
