"""The architectures that train.py trains: CIFAR-ZOO's AlexNet, VGG, ResNet, PreResNet and DenseNet-BC, torchvision's
ResNet-18 and vision transformer (Dosovitskiy et al., 2021) made small, and torchvision's classifiers as they are.
"""

from functools import partial

import torchvision
from torchvision.models import get_model, list_models, mobilenet_v2
from torchvision.models.vision_transformer import VisionTransformer

from models.alexnet import AlexNet
from models.densenet import DenseNet
from models.resnet import ResNet, resnet18
from models.vgg import VGG

MODELS = {
    "alexnet": AlexNet,
    "vgg11": partial(VGG, 11),
    "vgg13": partial(VGG, 13),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    "resnet18": resnet18,
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet1202": partial(ResNet, 1202),
    "preresnet8": partial(ResNet, 8, preact=True),
    "preresnet20": partial(ResNet, 20, preact=True),
    "preresnet32": partial(ResNet, 32, preact=True),
    "preresnet44": partial(ResNet, 44, preact=True),
    "preresnet56": partial(ResNet, 56, preact=True),
    "preresnet110": partial(ResNet, 110, preact=True),
    "preresnet1202": partial(ResNet, 1202, preact=True),
    "densenet100bc": partial(DenseNet, 100, growth_rate=12),
    "densenet190bc": partial(DenseNet, 190, growth_rate=40),
    "mobilenet_v2": mobilenet_v2,  # the same as torchvision/mobilenet_v2
    # of images of 32x32 pixels only
    "vit": partial(
        VisionTransformer, image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=256, mlp_dim=512
    ),
}
# made for photographs: most halve the resolution five times. Of those left out, two give more than logits in training,
# and mnasnets take no state dict from a checkpoint of robustness or of train.py, which lacks its private version number
MODELS |= {
    f"torchvision/{name}": partial(get_model, name)
    for name in list_models(torchvision.models, exclude=["googlenet", "inception_v3", "mnasnet*"])
}
