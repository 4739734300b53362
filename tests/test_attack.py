"""The attack: robustness' own as a reference, closed forms, and what holds for every attack."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack import attack, gradient_of, project
from models.base import AttackerModel, DummyModel, FoldedClassifier, attacker_model, one_device, robustness_datasets
from tests.conftest import small_classifier
from utils import PRECISIONS


def saturated_images(n, size=16):
    """Random images of which about a fifth of the pixels are 0 and a fifth 1."""
    return (torch.rand(n, 3, size, size) * 1.7 - 0.35).clamp(0, 1)


class Recorder(nn.Module):
    """Passes images through to a classifier, and keeps a copy of all that it was shown."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.seen = classifier, []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        return self.classifier(images)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "eps, step_size, steps, targeted",
    [(0.5, 0.1, 30, True), (2.0, 0.4, 10, True), (0.5, 0.1, 1, True), (0.5, 0.1, 7, False)],
)
def test_equals_robustness(seed, eps, step_size, steps, targeted):
    """In float64: in float32 rounding can send an image past a kink, and the two ways part by up to 1e-4."""
    torch.manual_seed(seed)
    reference = AttackerModel(DummyModel(small_classifier()), robustness_datasets.CIFAR(".")).eval().double()
    classifier = nn.Sequential(reference.normalizer, reference.model)
    images, targets = saturated_images(11).double(), torch.randint(10, (11,))
    with one_device(images.device):
        _, expected = reference(
            images, targets, make_adv=True, constraint="2", targeted=targeted,
            eps=eps, step_size=step_size, iterations=steps,
        )  # fmt: skip
    attacked = attack(classifier, images, targets, eps, step_size, steps, targeted)
    assert not torch.equal(attacked, images)
    torch.testing.assert_close(attacked, expected, atol=1e-9, rtol=0)


def test_every_iterate_is_in_the_ball_and_in_range():
    recorder, counted = Recorder(small_classifier()), []
    images = saturated_images(6)
    attack(recorder, images, torch.randint(10, (6,)), 0.3, 0.2, steps=15, on_step=lambda: counted.append(1))
    assert len(recorder.seen) == len(counted) == 16
    for iterate in recorder.seen:
        assert iterate.min() >= 0 and iterate.max() <= 1
        assert (iterate - images).flatten(1).norm(dim=1).max() <= 0.3 + 1e-6
    assert torch.equal(recorder.seen[0], images)  # no random start


def test_one_step_has_its_closed_form():
    # logits (0, w.x): the cross-entropy to class 1 has the gradient -w times a positive number
    w = torch.randn(3 * 4 * 4)
    linear = nn.Linear(48, 2, bias=False)
    linear.weight.data = torch.stack([torch.zeros(48), w])
    images = torch.full((2, 3, 4, 4), 0.5)
    attacked = attack(nn.Sequential(nn.Flatten(), linear), images, torch.tensor([1, 0]), 0.5, 0.1, 1)
    expected = torch.stack([0.1 * w / w.norm(), -0.1 * w / w.norm()]).view(2, 3, 4, 4)
    torch.testing.assert_close(attacked - images, expected, atol=1e-6, rtol=0)
    assert torch.allclose(project(images + 10 * expected, images, 0.25), images + 2.5 * expected, atol=1e-6)


def test_best_iterate_is_kept():
    recorder = Recorder(small_classifier())
    images, targets = saturated_images(8), torch.randint(10, (8,))
    # steps as long as the radius overshoot, so that the best iterate is not the last one
    attacked = attack(recorder, images, targets, eps=1.0, step_size=1.0, steps=12)
    losses = torch.stack([F.cross_entropy(recorder.classifier(x), targets, reduction="none") for x in recorder.seen])
    best = losses.argmin(0)
    assert (best < 12).any()
    assert torch.equal(attacked, torch.stack(recorder.seen)[best, torch.arange(8)])


def test_of_equally_good_iterates_the_first_is_kept():
    """Where float32 knows no smaller loss than that of the image itself, the image stays as it is."""
    recorder = Recorder(lambda x: 20 * torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1))
    images = torch.full((2, 3, 4, 4), 0.5)
    assert torch.equal(attack(recorder, images, torch.zeros(2, dtype=int), 0.5, 0.1, 3), images)
    assert not torch.equal(recorder.seen[-1], images)  # it was led on, though


def test_where_the_gradient_is_zero_nothing_moves():
    images, recorder = saturated_images(3), Recorder(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)))
    recorder.classifier[1].weight.data.zero_()
    attack(recorder, images, torch.tensor([0, 1, 0]), 0.5, 0.1, 3)
    assert all(torch.equal(iterate, images) for iterate in recorder.seen)  # NaN, which is not kept, would hide


def test_an_iterate_without_a_finite_loss_is_not_kept():
    """Finite weights do not make losses so: a negative variance, say, or float16 that overflows."""
    classifier, images = small_classifier(), saturated_images(3)
    classifier[1].running_var -= 100
    for targeted in (True, False):
        assert torch.equal(attack(classifier, images, torch.tensor([0, 1, 0]), 0.5, 0.1, 3, targeted), images)

    def sure_elsewhere(x):  # of class 1, wherever it is not shown the images themselves
        logits = torch.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1)
        return logits if torch.equal(x, images) else logits + torch.tensor([-torch.inf, 0])

    assert torch.equal(attack(sure_elsewhere, images, torch.zeros(3, dtype=int), 0.5, 0.1, 1, targeted=False), images)


def test_an_image_is_attacked_alike_in_any_batch():
    classifier, images, targets = small_classifier().double(), saturated_images(7).double(), torch.randint(10, (7,))
    together = attack(classifier, images, targets, 0.5, 0.1, 10)
    alone = torch.cat([attack(classifier, images[i : i + 1], targets[i : i + 1], 0.5, 0.1, 10) for i in range(7)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


def test_the_gradient_is_every_images_own_also_where_float16_has_none():
    """Losses of about 1, and of about 1e-7, whose gradient is nothing in float16."""
    classifier, images = small_classifier(), saturated_images(6)
    logits = classifier(images)
    targets = torch.cat([logits[:3].argmin(1), logits[3:].argmax(1)])
    bias = torch.zeros(6, 10)
    bias[torch.arange(3, 6), targets[3:]] = 17  # sure of its class

    def gradients(network, x):
        x = x.detach().requires_grad_()
        logits = network(x).float() + bias
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses, gradient_of(losses, logits, x)

    losses, found = gradients(classifier, images)
    assert losses[:3].min() > 0.1 and losses[3:].max() < 1e-6
    x = images.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(classifier(x) + bias, targets, reduction="sum"), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())
    _, half = gradients(small_classifier_in(classifier, torch.float16), images)
    assert F.cosine_similarity(half.flatten(1), expected.flatten(1)).min() > 0.99
    torch.testing.assert_close(half.flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1), rtol=0.05, atol=0)


def small_classifier_in(classifier, dtype):
    """A FoldedClassifier of a classifier that needs no normalisation."""
    return FoldedClassifier(nn.Sequential(nn.Identity(), classifier), dtype)


def test_a_constant_classifier_has_no_gradient():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    logits = x.flatten(1) @ torch.zeros(48, 10) + torch.tensor([200.0] + [0] * 9)
    losses = F.cross_entropy(logits, torch.zeros(2, dtype=torch.long), reduction="none")
    assert torch.equal(gradient_of(losses, logits, x), torch.zeros_like(x))


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "vgg11", "densenet_cifar", "preresnet8", "resnet20", "densenet100bc", "torchvision/efficientnet_b0"],
)
def test_the_folded_classifier_is_the_classifier_with_batch_norm_folded(arch):
    model = attacker_model(arch, "cifar").requires_grad_(False).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                values.uniform_(0.5, 1.5)
    classifier = nn.Sequential(model.normalizer, model.model)
    folded, images = FoldedClassifier(classifier, torch.float64), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(images), classifier(images), rtol=1e-9, atol=1e-9)
    before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in one.modules()) for one in (classifier, folded))
    assert after < 0.6 * before  # pre-activation has some that follow a sum


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_attacks_in_half_precision_do_what_those_in_float32_do(precision):
    classifier, images = small_classifier(), saturated_images(40)
    targets, flags = torch.randint(10, (40,)), {"eps": 1.0, "step_size": 0.2, "steps": 20}
    exact = attack(classifier, images, targets, **flags)
    attacked = attack(small_classifier_in(classifier, PRECISIONS[precision]), images, targets, **flags)
    assert attacked.dtype == torch.float32 and attacked.min() >= 0 and attacked.max() <= 1
    assert (attacked - images).flatten(1).norm(dim=1).max() <= 1.0 + 1e-6
    losses = [F.cross_entropy(classifier(x), targets) for x in (images, exact, attacked)]
    assert losses[2] - losses[1] < 0.02 * (losses[0] - losses[1])
