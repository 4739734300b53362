"""On a GPU, what makes training and attack fast leaves them what they are. Skipped, unless asked for on a GPU:

    TEST_ON_GPU=1 python -m pytest tests/test_gpu.py
"""

from argparse import Namespace
from functools import partial

import pytest
import torch
import torch._dynamo.utils as dynamo
import torch.nn.functional as F
from cox.utils import Parameters
from torch import nn

import utils
from attack import attack
from data import Split
from graphs import Captured, Compiled
from models import MODELS, base
from tests.conftest import config_of, small_classifier
from tests.test_graphs import train_some
from utils import PRECISIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and TEST_ON_GPU=1")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return utils.pick_device()[0]


def difference(ours, theirs):
    """How far a tensor is from another, as a share of that one's length."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("way", ["captured", "compiled and captured"])
@pytest.mark.parametrize("keys", [{}, {"mixup": "True"}, {"adversarial.eps": "0.5"}], ids=str)
def test_training_is_the_plain_one(device, tmp_path, keys, way):
    """One epoch of five full batches, two of which are replayed, and a smaller one: the way from the first weights."""
    keys = {"architecture": "preresnet8", "batch_size": "8", "precision": "float32"} | keys
    config, compiled = config_of(tmp_path, **keys), config_of(tmp_path, **keys, compile="always")
    start, _ = train_some(config, epochs=0, device=device)
    plain, (expected,) = train_some(config, epochs=1, device=device)
    fast, (found,) = train_some(
        compiled if "compiled" in way else config,
        (lambda step: step) if "compiled" in way else Captured,  # which make_step does to what it compiles
        epochs=1,
        device=device,
    )
    weights = [name for name in start if str(name).endswith(("weight", "bias", "running_mean", "running_var"))]
    for name in weights:
        assert difference(fast[name] - start[name], plain[name] - start[name]) < 0.05, name
    assert found == pytest.approx(expected, rel=0.01)


def test_the_training_of_a_base_classifier_is_the_plain_one(device, monkeypatch):
    """Five steps of robustness' loop, which is not captured, but whose network torch.compile runs as CUDA graphs."""
    monkeypatch.setattr(base, "Compiled", partial(Compiled, say=pytest.fail))
    base.robustness_main()  # imports robustness.train, and hides its warnings
    from robustness import train as loops

    split = Split(torch.randint(256, (640, 3, 32, 32), dtype=torch.uint8), torch.arange(640) % 10, None, None)

    def weights(compile, loop=True):
        torch.manual_seed(0)
        model = base.attacker_model("resnet18", "cifar")
        args = Namespace(precision="float32", compile=compile, batch_size=128, adv_train=0, adv_eval=0)
        base.speed_up(model.model, args, device, passes=0)
        model = nn.DataParallel(model.to(device), [device.index])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)  # large steps amplify rounding
        hooks = Parameters({"custom_accuracy": base.accuracies})
        if loop:
            loops._model_loop(hooks, "train", base.Batches(split, device, 128), model, optimizer, 0, False, None)
        return {name: parameter.detach().clone() for name, parameter in model.module.model.named_parameters()}

    start, plain = weights("never", loop=False), weights("never")
    dynamo.counters.clear()
    fast = weights("always")
    assert not dynamo.counters["inductor"]["cudagraph_skips"]
    for name in start:
        assert difference(fast[name] - start[name], plain[name] - start[name]) < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("arch, batch_size", [("preresnet110", 128), ("vgg19", 128), ("densenet100bc", 64)])
def test_compiled_gradients_are_the_eager_ones(device, arch, batch_size, dtype):
    """In the batch size in which these models are trained, on which it depends what is compiled. In float64 they must
    agree; float32, in which these models amplify rounding to about 1 %, is what cuDNN has channels_last for."""
    torch.manual_seed(0)
    model = MODELS[arch]().to(device, dtype, memory_format=torch.channels_last)
    images = torch.rand(batch_size, 3, 32, 32, dtype=dtype, device=device)
    targets = torch.arange(batch_size, device=device) % 10

    def gradients(forward):
        return torch.autograd.grad(F.cross_entropy(forward(images), targets), list(model.parameters()))

    expected, found = gradients(model.forward), gradients(Compiled(model.forward, batch_size, say=pytest.fail))
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    whole = [torch.cat([part.flatten() for part in parts]) for parts in (found, expected)]
    assert difference(*whole) < 0.1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_attack_is_that_of_a_cpu(device, precision, compile):
    classifier, images, targets = small_classifier(), torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    expected = attack(classifier, images, targets, 0.5, 0.1, 20)
    folded = base.FoldedClassifier(nn.Sequential(nn.Identity(), classifier).to(device), PRECISIONS[precision])
    if compile:
        folded.model.forward = Compiled(folded.model.forward, len(images), say=pytest.fail)
    attacked = attack(folded, images.to(device), targets.to(device), 0.5, 0.1, 20).cpu()
    classifier.cpu()
    if precision == "float32":
        assert difference(attacked - images, expected - images) < 0.05
    reached, before = (F.cross_entropy(classifier(each), targets) for each in (attacked, images))
    assert reached < F.cross_entropy(classifier(expected), targets) + 0.05 * (before - reached)
