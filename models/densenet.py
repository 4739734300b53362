"""DenseNet-BC for small images (Huang et al., 2017): bottlenecks, and half the channels at each transition."""

import torch
from torch import nn

from models.layers import conv1x1, conv3x3, init_he


class Bottleneck(nn.Sequential):
    """Puts growth_rate new channels before those that it is given."""

    def __init__(self, in_channels, growth_rate):
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            conv1x1(in_channels, 4 * growth_rate),
            nn.BatchNorm2d(4 * growth_rate),
            nn.ReLU(inplace=True),
            conv3x3(4 * growth_rate, growth_rate),
        )

    def forward(self, x):
        return torch.cat([super().forward(x), x], dim=1)


class DenseNet(nn.Module):
    """Maps images [N, 3, H, W] to logits [N, num_classes]; depth is 6n+4, n bottlenecks in each of three stages."""

    def __init__(self, depth, growth_rate, num_classes=10):
        super().__init__()
        channels = 2 * growth_rate
        layers = [conv3x3(3, channels)]
        for stage in range(3):
            if stage > 0:
                layers += [
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    conv1x1(channels, channels // 2),
                    nn.AvgPool2d(2),
                ]
                channels //= 2
            for _ in range((depth - 4) // 6):
                layers.append(Bottleneck(channels, growth_rate))
                channels += growth_rate
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))
