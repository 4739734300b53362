"""CIFAR ResNets of depth 6n+2 (He et al., 2016a), their pre-activation form (He et al., 2016b), and ResNet-18, the one
for photographs, as it is usual for images of 32x32 pixels.
"""

import torchvision
from torch import nn

from models.layers import conv1x1, conv3x3, init_he


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus a shortcut, then relu."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(in_channels, channels, stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.residual(x) + self.shortcut(x))


class PreActBlock(nn.Module):
    """bn-relu-conv-bn-relu-conv, plus a shortcut of the block's raw input."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            conv3x3(in_channels, channels, stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
        )
        self.shortcut = conv1x1(in_channels, channels, stride) if stride != 1 else nn.Identity()

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class ResNet(nn.Module):
    """Maps images [N, 3, H, W] to logits [N, num_classes]; depth is 6n+2, n blocks in each of three stages."""

    def __init__(self, depth, num_classes=10, preact=False):
        super().__init__()
        block = PreActBlock if preact else BasicBlock
        blocks = (depth - 2) // 6
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.conv = conv3x3(3, 16)
        self.blocks = nn.Sequential(
            *(block(before, width, stride=width // before) for before, width in zip([16] + widths, widths))
        )
        # Batch norm and relu follow the first convolution, or, with pre-activation, the last block.
        self.bn = nn.BatchNorm2d(64 if preact else 16)
        self.relu = nn.ReLU(inplace=True)
        self.preact = preact
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        init_he(self)

    def forward(self, x):
        x = self.conv(x)
        if self.preact:
            x = self.relu(self.bn(self.blocks(x)))
        else:
            x = self.blocks(self.relu(self.bn(x)))
        return self.fc(self.pool(x).flatten(1))


def resnet18(num_classes=10):
    """torchvision's ResNet-18, but its first convolution is 3x3 with stride 1, and no pooling follows it.

    Maps images [N, 3, H, W] to logits [N, num_classes], by the same layers as robustness' resnet18. Their weights begin
    as those of the models above.
    """
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1, model.maxpool = conv3x3(3, 64), nn.Identity()
    init_he(model)
    return model
