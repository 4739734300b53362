"""On a GPU, what makes training and attack fast leaves them what they are. Skipped, unless asked for on a GPU:

    TEST_ON_GPU=1 python -m pytest tests/test_gpu.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils
from attack import attack
from graphs import Captured, Compiled
from models.base import FoldedClassifier
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


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_attack_is_that_of_a_cpu(device, precision, compile):
    classifier, images, targets = small_classifier(), torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    expected = attack(classifier, images, targets, 0.5, 0.1, 20)
    folded = FoldedClassifier(nn.Sequential(nn.Identity(), classifier).to(device), PRECISIONS[precision])
    if compile:
        folded.model.forward = Compiled(folded.model.forward, len(images))
    attacked = attack(folded, images.to(device), targets.to(device), 0.5, 0.1, 20).cpu()
    classifier.cpu()
    if precision == "float32":
        assert difference(attacked - images, expected - images) < 0.05
    reached, before = (F.cross_entropy(classifier(each), targets) for each in (attacked, images))
    assert reached < F.cross_entropy(classifier(expected), targets) + 0.05 * (before - reached)
