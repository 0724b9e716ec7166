"""The residual networks for CIFAR-10 of He et al. (2016): 20, 32, 44 or 56 layers, option-A shortcuts."""

import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = (20, 32, 44, 56)


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm around a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Option A: every second pixel, the missing channels zero, half of them on either side.
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.grown // 2
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, before, self.grown - before)))


class CifarResNet(nn.Module):
    """A residual network for 32×32 colour images `[n, 3, 32, 32]` with 16, 32 and 64 channels.

    Raises ValueError for a depth that is not of the family.

    >>> model = CifarResNet(20).eval()
    >>> sum(p.numel() for p in model.parameters()), model(torch.zeros(2, 3, 32, 32)).shape
    (269722, torch.Size([2, 10]))
    """

    def __init__(self, depth: int = 20, classes: int = 10):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth is {depth}; the depths are {', '.join(map(str, DEPTHS))}")
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, count, stride=1)
        self.layer2 = self._stage(16, 32, count, stride=2)
        self.layer3 = self._stage(32, 64, count, stride=2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(count - 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[n, classes]` of images `[n, 3, 32, 32]`."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
