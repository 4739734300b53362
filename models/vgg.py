"""VGG with batch norm and a single linear layer (Simonyan & Zisserman, 2015; CIFAR-ZOO's shape)."""

from torch import nn

from models.layers import init_he

# How many 3x3 convolutions each of the five stages has; a 2x2 max pooling ends a stage.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Maps images [N, 3, H, W] to logits [N, num_classes]; H and W at least 32, depth one of 11, 13, 16, 19."""

    def __init__(self, depth, num_classes=10):
        super().__init__()
        layers, in_channels = [], 3
        for count, out_channels in zip(STAGES[depth], (64, 128, 256, 512, 512)):
            for _ in range(count):
                layers += [
                    nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                ]
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        init_he(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))
