"""How fast the attack and the training are, against the original's way, measured side by side: make bench

The original's way is robustness' AttackerModel in float32, attacking once for every attack of every method, and, for
training, PIL transforms in loader workers, float32, images in torch's default memory format; on a GPU with TF32 in
convolutions, which is torch's default. Both ways get random images and untrained models, by turns, each in batches of
the size that suits it, and the best of several rounds counts. On a CPU the work is small.
"""

import platform
import time
from argparse import Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import lock
import train
import utils
from attack import attack
from config import CONFIG
from data import to_float
from lockfiles import METHODS, attacks_of
from models import MODELS
from models.base import Surrogate, attacker_model, cuda_optional


class Size(NamedTuple):
    """How much is timed, and how often: images and steps of an attack, batches of a training, by model their sizes."""

    reference_batch: int
    batch: int
    steps: int
    batches: int
    rounds: int
    models: dict


SIZES = {
    "cuda": Size(128, 1000, 20, 100, 3, {"preresnet110": 128, "vgg19": 128, "densenet100bc": 64}),
    "cpu": Size(16, 16, 1, 2, 2, {"preresnet20": 64, "vgg19": 64, "densenet100bc": 8}),
}


class Work(NamedTuple):
    """One line of the table: two ways to do the same, each to a number of images.

    flops are the floating-point operations that ours needs for one image, as the model's definition has it.
    """

    name: str
    reference: callable
    reference_images: int
    ours: callable
    images: int
    flops: float


def forward_flops(model, device):
    """The floating-point operations of a model for one image of 32x32 pixels; those of its gradients are as many
    again for the images, and once more for the weights."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32, device=device))
    return counter.get_total_flops()


def robustness_attack(model, images, targets, steps):
    """robustness' own attack, as the original calls it."""
    with cuda_optional():
        options = {"constraint": "2", "targeted": True, "eps": 0.5, "step_size": 0.1, "iterations": steps}
        return model(images, targets, make_adv=True, **options)


def attack_works(device, precision, size):
    """The lines about locking with a ResNet-50: one target map, and all methods."""
    model = attacker_model("resnet50", "cifar").to(device).eval()
    classifier = torch.nn.Sequential(model.normalizer, model.model).requires_grad_(False)
    surrogate = Surrogate(classifier, utils.PRECISIONS[precision])
    images = torch.randint(256, (size.batch, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(size.batch, device=device) % 10
    few, few_labels = to_float(images[: size.reference_batch]), labels[: size.reference_batch]
    args = Namespace(eps=0.5, attack_lr=0.1, attack_steps=size.steps, alpha=0.5, lambd=0.5)
    maps = lock.target_maps(10, 0)
    count, flops = sum(len(attacks_of([method])) for method in METHODS), forward_flops(classifier, device)
    steps = f"{size.steps} step" + "s" * (size.steps > 1)
    yield Work(
        f"attack on ResNet-50, {steps}",
        lambda: robustness_attack(model, few, few_labels, size.steps),
        len(few),
        lambda: attack(surrogate, to_float(images), labels, 0.5, 0.1, size.steps),
        len(images),
        flops * (2 * size.steps + 1),
    )
    yield Work(
        f"lock by all four methods, {steps}",
        lambda: [robustness_attack(model, few, few_labels, size.steps) for _ in range(count)],
        len(few),
        lambda: lock.lock_batch(
            classifier, surrogate, images, labels, maps, "labels", list(METHODS), args, lambda: None
        ),
        len(images),
        flops * (4 * (2 * size.steps + 1) + 1 + 4 + 4),  # four attacks; one look at the originals, and eight at results
    )


def train_reference(model, optimizer, loader, device):
    """An epoch of the original's trainer."""
    model.train()
    for inputs, targets in loader:
        loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def training_work(name, batch_size, device, precision, batches):
    """The line about training a model."""
    config = EasyDict(CONFIG | {"architecture": name, "precision": precision, "batch_size": batch_size})
    learner = train.make_learner(config, device)
    images = torch.randint(256, (batches * batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    augmentation = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    pictures = [to_pil_image(image) for image in images]

    def collate(indices):
        return torch.stack([augmentation(pictures[index]) for index in indices]), labels[indices]

    workers = 4 if device.type == "cuda" else 2
    loader = DataLoader(range(len(images)), batch_size, shuffle=True, num_workers=workers, collate_fn=collate,
                        persistent_workers=True)  # fmt: skip
    reference = MODELS[name](num_classes=10).to(device)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, **CONFIG["optimize"])
    on_device = images.to(device), labels.to(device)
    return Work(
        f"train {name}, batch {batch_size}",
        lambda: train_reference(reference, optimizer, loader, device),
        len(images),
        lambda: train.train_epoch(learner, *on_device, config),
        len(images),
        3 * forward_flops(reference, device),
    )


def seconds(function, device):
    """How long a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(work, device, rounds):
    """The best times an image in seconds, of the reference and of ours."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        work.reference()  # to warm up
    work.ours()
    pairs = []
    for _ in range(rounds):
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            reference = seconds(work.reference, device)
        pairs.append((reference, seconds(work.ours, device)))
    reference, ours = (min(times) for times in zip(*pairs))
    return reference / work.reference_images, ours / work.images


def ceilings(device, precision):
    """What the hardware reaches: operations a second in a product of matrices, and bytes a second in a copy."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=utils.PRECISIONS[precision])
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    much = torch.ones(2**30, dtype=torch.uint8, device=device)  # more than any cache holds
    copy = min(seconds(much.clone, device) for _ in range(5))
    return 2 * n**3 / product, 2 * much.nbytes / copy


def main():
    device, reason = utils.pick_device()
    precision, why = utils.pick_precision("auto", device)
    size = SIZES[device.type]
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    rate, bandwidth = ceilings(device, precision)
    works = [*attack_works(device, precision, size)]
    works += [training_work(name, batch, device, precision, size.batches) for name, batch in size.models.items()]
    print(f"{device} ({reason}), {precision} ({why}), torch {torch.__version__}, Python {platform.python_version()}")
    print(f"product of matrices: {rate / 1e12:.2f} TFLOP/s, copy: {bandwidth / 1e9:.0f} GB/s\n")
    print("| work, for one image | the original's way, ms | ours, ms | ratio | share of the product's rate |")
    print("|---|---|---|---|---|")
    for work in tqdm(works, leave=False, disable=None):
        reference, ours = measure(work, device, size.rounds)
        ratio, share = f"{reference / ours:.1f}x", f"{work.flops / ours / rate:.0%}"
        print(f"| {work.name} | {1e3 * reference:.3f} | {1e3 * ours:.3f} | {ratio} | {share} |", flush=True)


if __name__ == "__main__":
    utils.run_command(main)
