"""Residual networks (He et al. 2016): ResNet-20 for CIFAR (§4.2) and ResNet-50 for ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """Two 3 × 3 convolutions; the shortcut has no parameters (option A: every second pixel, channels of zeros)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(h + shortcut)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride) and 1 × 1; the shortcut is projected where shapes differ."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != 4 * width:
            projection = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(h)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Images (batch, 3, height, width) → logits; parameters have torchvision's names."""

    def __init__(self, block: type[Basic | Bottleneck], depths: list[int], width: int, classes: int) -> None:
        super().__init__()
        self.imagenet = block is Bottleneck
        kernel, stride = (7, 2) if self.imagenet else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels, self.stages = width, [f"layer{n + 1}" for n in range(len(depths))]
        for n, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(block(channels, width << n, 2 if n and not i else 1))
                channels = (width << n) * block.expansion
            setattr(self, name, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


def resnet20(classes: int = 10) -> ResNet:
    return ResNet(Basic, [3, 3, 3], 16, classes)


def resnet50(classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], 64, classes)
