"""On a GPU, what makes training and attack fast leaves them what they are. Skipped, unless asked for on a GPU:

    TEST_ON_GPU=1 python -m pytest tests/test_gpu.py
"""

import itertools
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch._dynamo.utils as dynamo
import torch.nn.functional as F
from cox.utils import Parameters
from torch import nn

import train
import utils
from attack import attack
from checkpoints import restore, snapshot
from data import Split
from graphs import Captured, Compiled
from models import MODELS, base
from tests.conftest import config_of, new_learner, small_classifier, two_tones
from tests.test_graphs import train_some
from utils import PRECISIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and TEST_ON_GPU=1")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.compiler.reset()  # after eight variants of a function torch.compile would run further ones as they are
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    return utils.set_up_device()[0]


def difference(ours, theirs):
    """How far tensors are from others, all of them taken together, as a share of the length of these; 0 if equal.

    Of a single tensor, such as the bias of a batch norm, a ReLU that another rounding turns on can change a lot.
    """
    ours, theirs = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(theirs.dtype).tiny)).item()


KEYS = [{}, {"mixup": "True"}, {"adversarial.eps": "0.5"}]
WAYS = list(itertools.product(["captured", "compiled and captured"], KEYS))
# not compiled: what that rounds in another way would make other trainings of these
WAYS += [("captured", {"precision": precision}) for precision in ("bfloat16", "float16")]


@pytest.mark.parametrize("way, keys", WAYS, ids=str)
def test_training_is_the_plain_one(device, tmp_path, way, keys):
    """One epoch of five full batches, two of which are replayed, and a smaller one: the way from the first weights.

    At this learning rate, random errors of 3e-7 in every layer and gradient changed it by up to 0.07 in adversarial
    training, and by 0.002 in the plain one (40 seeds, on a CPU); at 0.1, by 0.3.
    """
    keys = {"architecture": "preresnet8", "batch_size": "8", "precision": "float32"} | keys
    config, compiled = config_of(tmp_path, **keys), config_of(tmp_path, **keys, compile="always")
    start, _ = train_some(config, epochs=0, device=device)
    plain, ((loss, accuracy),) = train_some(config, epochs=1, device=device, lr=0.001)
    fast, (found,) = train_some(
        compiled if "compiled" in way else config,
        (lambda step: step) if "compiled" in way else Captured,  # which make_step does to what it compiles
        epochs=1,
        device=device,
        lr=0.001,
    )
    for ends, bound in {("weight", "bias"): 0.1, ("running_mean", "running_var"): 0.01}.items():
        names = [name for name in start if str(name).endswith(ends)]
        ours, theirs = ([weights[name] - start[name] for name in names] for weights in (fast, plain))
        assert difference(ours, theirs) < bound, ends
    assert fast["scale"] == plain["scale"]
    assert found == (pytest.approx(loss, rel=0.01), pytest.approx(accuracy, abs=2.01 * 100 / 44))  # two of 44 images


@pytest.mark.parametrize("architecture", ["preresnet8", "mobilenet_v2", "vit"])
def test_what_auto_chooses_trains(device, tmp_path, architecture):
    """bfloat16, compiled and captured; with dropout, depthwise convolutions or attention, and after --resume.

    Black and white images are soon told apart. That a learning rate of 0 changes no weight shows that replays read it.
    """
    keys = {"architecture": architecture, "precision": "bfloat16", "compile": "always", "batch_size": "32"}
    config = config_of(tmp_path, **keys, **{"lr_scheduler.base_lr": "0.01"})
    images, labels = two_tones(192, [0, 1])
    data = images.repeat(1, 1, 8, 8).to(device), labels.to(device)  # of 32x32 pixels, which vit asks for
    torch.manual_seed(0)
    first, resumed = (new_learner(config, device) for _ in range(2))
    step, losses = train.make_step(first, config, say=pytest.fail), []
    for _ in range(4):  # of six batches each
        losses.append(train.train_epoch(step, *data, config)[0])
    restore(snapshot(first, 1, [], config, "data"), resumed, config, "data")
    step = train.make_step(resumed, config, say=pytest.fail)
    losses.append(train.train_epoch(step, *data, config)[0])
    assert losses[-1] < losses[0] / 4
    weights = [parameter.detach().clone() for parameter in resumed.model.parameters()]
    resumed.optimizer.param_groups[0]["lr"].fill_(0)
    train.train_epoch(step, *data, config)
    assert all(map(torch.equal, resumed.model.parameters(), weights))


@pytest.mark.parametrize("precision, bound", [("float32", 0.05), ("bfloat16", 0.5)])
def test_the_training_of_a_base_classifier_is_the_plain_one(device, monkeypatch, precision, bound):
    """Five steps of robustness' loop, which is not captured, but whose network torch.compile runs as CUDA graphs.

    On a CPU, five steps in bfloat16 differed from those in float32 by 0.3.
    """
    monkeypatch.setattr(base, "Compiled", partial(Compiled, say=pytest.fail))
    base.import_robustness()  # imports robustness.train, and hides its warnings
    from robustness import train as loops

    split = Split(torch.randint(256, (640, 3, 32, 32), dtype=torch.uint8), torch.arange(640) % 10, None, None)

    def trained(compile, loop=True):
        torch.manual_seed(0)
        model = base.attacker_model("resnet18", "cifar")
        args = Namespace(precision=precision, compile=compile, batch_size=128, adv_train=0, adv_eval=0)
        base.speed_up(model.model, args, device, passes=0)
        model = nn.DataParallel(model.to(device), [device.index])
        # large steps amplify rounding; of smaller ones float32 would lose the larger part where a weight is near 1
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        hooks = Parameters({"custom_accuracy": base.accuracies})
        if loop:
            loops._model_loop(hooks, "train", base.Batches(split, device, 128), model, optimizer, 0, False, None)
        return [parameter.detach().clone() for parameter in model.module.model.parameters()]

    start, plain = trained("never", loop=False), trained("never")
    dynamo.counters.clear()
    fast = trained("always")
    counters = dynamo.counters["inductor"]
    assert counters["cudagraph_recorded_non_static_inputs"] and not counters["cudagraph_skips"]
    ours, theirs = ([after - before for after, before in zip(parameters, start)] for parameters in (fast, plain))
    assert difference(ours, theirs) < bound


BATCHES = {"preresnet110": 128, "vgg19": 128, "densenet100bc": 64}
TRAINED = [(arch, size, dtype) for arch, size in BATCHES.items() for dtype in (torch.float64, torch.float32)]
TRAINED += [("vit", 128, torch.float64), ("vit", 512, torch.float32)]


@pytest.mark.parametrize("arch, batch_size, dtype", TRAINED, ids=str)
def test_compiled_gradients_are_the_eager_ones(device, arch, batch_size, dtype):
    """In the batch size in which these models are trained, on which it depends what is compiled; vit in float32 in a
    larger one, in which the sums of a layer norm's gradients are fused (in float64, inductor's kernel for it fails). In
    float64 they must agree; float32, in which these models amplify rounding to about 1 %, is what cuDNN has
    channels_last for."""
    torch.manual_seed(0)
    model = MODELS[arch]().to(device, dtype, memory_format=torch.channels_last)
    if arch == "vit":
        nn.init.normal_(model.heads.head.weight, std=0.02)  # it begins at 0, and so would all gradients but its own
    images = torch.rand(batch_size, 3, 32, 32, dtype=dtype, device=device)
    targets = torch.arange(batch_size, device=device) % 10

    def gradients(forward):
        return torch.autograd.grad(F.cross_entropy(forward(images), targets), list(model.parameters()))

    expected, found = gradients(model.forward), gradients(Compiled(model.forward, batch_size, say=pytest.fail))
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    assert difference(found, expected) < 0.1


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
        assert difference([attacked - images], [expected - images]) < 0.05
    reached, before = (F.cross_entropy(classifier(each), targets) for each in (attacked, images))
    assert reached < F.cross_entropy(classifier(expected), targets) + 0.05 * (before - reached)
