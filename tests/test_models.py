"""The architectures: their parameters, layers and initialisation, and the images that they take."""

import re

import pytest
import torch
from robustness import cifar_models
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import utils
from models import MODELS
from models.resnet import BasicBlock

# Counts of CIFAR-ZOO's models with ten classes, and below them of torchvision's.
PARAMETERS = {
    "alexnet": 2_472_266,
    "vgg19": 20_040_522,
    "preresnet20": 272_282,
    "preresnet110": 1_730_522,
    "resnet110": 1_730_714,
    "densenet100bc": 769_162,
    "densenet190bc": 25_624_430,
    "mobilenet_v2": 2_236_682,
    "vit": 3_195_146,
    "resnet18": 11_173_962,
    "torchvision/resnet18": 11_181_642,
    "torchvision/vit_b_16": 85_806_346,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = MODELS[name](num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_models_that_cannot_be_trained_here_are_left_out():
    """Two give more than logits in training, and mnasnets take no state dict that was stripped of a version number."""
    known = [name for name in MODELS if re.search("googlenet|inception|mnasnet", name)]
    assert not known and "torchvision/mobilenet_v3_small" in MODELS and len(MODELS) > 90


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("vgg", "resnet", "preresnet"))])
def test_a_name_tells_kind_and_depth(name):
    """In which a residual network counts its linear layer too, and a VGG the three of the original."""
    kind, depth = re.fullmatch(r"(\D+)(\d+)", name).groups()
    with torch.device("meta"):
        model = MODELS[name]()
    convolutions = [module for module in model.modules() if getattr(module, "kernel_size", None) == (3, 3)]
    assert len(convolutions) == int(depth) - (3 if kind == "vgg" else 1)
    assert getattr(model, "preact", False) == (kind == "preresnet")


def test_resnet18_computes_what_robustness_resnet18_does():
    ours, reference = MODELS["resnet18"](num_classes=10).eval(), cifar_models.resnet18().eval()
    weights = ours.state_dict().values()
    reference.load_state_dict(dict(zip(reference.state_dict(), weights, strict=True)))
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), reference(images))


def test_a_residual_block_ends_in_its_relu():
    assert (BasicBlock(4, 4, stride=1)(torch.randn(2, 4, 8, 8)) >= 0).all()


# Multiplications, in millions, and ReLUs of an image of 32x32 pixels on its way through CIFAR-ZOO's models.
WORK = {"alexnet": (15.0, 5), "vgg19": (398.1, 16), "resnet20": (40.8, 19), "preresnet20": (40.8, 19),
        "densenet100bc": (287.9, 99)}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_strides_poolings_and_relus(name):
    """Of which a count of parameters says nothing."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, relus = MODELS[name]().eval(), []
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda *_: relus.append(None))
        model(torch.empty(1, 3, 32, 32))
    assert (round(counter.get_total_flops() / 2e6, 1), len(relus)) == WORK[name]


@pytest.mark.parametrize(
    "name",
    ["alexnet", "vgg11", "resnet18", "resnet20", "preresnet8", "densenet100bc", "mobilenet_v2",
     "torchvision/efficientnet_b0"],
)  # fmt: skip
def test_logits_of_any_size_and_gradients_everywhere(name):
    model = MODELS[name](num_classes=7)
    for size in (32, 48, 64) if name in ("alexnet", "vgg11") else (8, 32, 48, 64):
        assert model(torch.rand(2, 3, size, size)).shape == (2, 7)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20", "preresnet20"])
def test_he_initialisation(name):
    for module in MODELS[name](num_classes=10).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_a_full_memory_is_not_taken_for_images_of_a_wrong_size():
    def fills_the_memory(images):
        raise torch.cuda.OutOfMemoryError

    model = nn.Identity()
    model.forward = fills_the_memory
    with pytest.raises(torch.cuda.OutOfMemoryError):
        utils.check_size(model, torch.rand(1, 3, 8, 8), "--arch resnet50")
