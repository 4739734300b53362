"""How fast the attack and the training are, against the authors' way, measured side by side: make bench

    python -m tests.benchmarks.speed preresnet vgg

measures only the lines whose names have one of the words. --profile also says what a call of ours spends its time in.
What is printed is Markdown, so that a file of it is the record of a run.

The authors' way is robustness' AttackerModel in float32, attacking once for every attack of every method, and, for
training, PIL transforms in loader workers, float32, images in torch's default memory format; on a GPU with TF32 in
convolutions, which is torch's default. Ours is in the precision that auto picks, and compiled on a GPU only. Both ways
get random images and untrained models, by turns, and the best of several rounds counts (of the authors' way once for
all lines that compare with the same); what the first call takes longer, compiling, is told apart. What the whole of the
work would take follows from that: to attack the 60,000 images of CIFAR-10 in 100 steps, the first call included, or an
epoch of 50,000, without evaluations and checkpoints, by either way. On a CPU only little of it is timed: of an attack
one step, which tells nothing of 100.

Small models leave a GPU mostly idle, so they are also trained several at once, a process for each, as
python -m experiments --jobs does it. Processes take turns on a GPU unless NVIDIA's MPS lets them share it.
"""

import io
import math
import os
import platform
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cox.utils import Parameters
from easydict import EasyDict
from torch import nn
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
from data import Split, to_float
from graphs import Compiled
from methods import METHODS, attacks_of, target_maps
from models import MODELS
from models.base import (
    Batches,
    FoldedClassifier,
    accuracies,
    attacker_model,
    augment_photos,
    import_robustness,
    one_device,
    speed_up,
)
from utils import UserError


class Size(NamedTuple):
    """How much is timed, and how often: images and steps of an attack, batches of a training, their sizes; models."""

    reference_batch: int
    batch: int
    steps: int
    batches: int
    rounds: int
    base_batch: int
    models: dict
    workers: tuple  # loader workers of the authors' way: of a training, and of the base classifier's
    together: tuple  # models that are also trained several at once
    jobs: int  # in how many processes


SIZES = {
    "cuda": Size(
        reference_batch=128,
        batch=lock.BATCH_SIZES["cuda"],
        steps=100,
        batches=100,
        rounds=3,
        base_batch=128,
        models={"preresnet110": 128, "vgg19": 128, "densenet100bc": 64},
        workers=(4, 16),
        together=("preresnet110", "densenet100bc"),
        jobs=4,
    ),
    "cpu": Size(
        reference_batch=16,
        batch=16,
        steps=1,
        batches=2,
        rounds=2,
        base_batch=8,
        models={"preresnet20": 64, "vgg19": 64, "densenet100bc": 8},
        workers=(2, 2),
        together=("preresnet20",),
        jobs=2,
    ),
}


LOCK, EPOCH = 60_000 * 100, 50_000  # the whole of a work: images times steps, and images


class Work(NamedTuple):
    """One line of the table: two ways to do the same, how often a call does it, and how often the whole work does.

    cost is what ours needs at least, each time: floating-point operations, and bytes to and from memory.
    """

    name: str
    whole: int
    reference: Callable
    reference_count: float
    ours: Callable
    count: int
    cost: tuple


def cost_of(model, dtype, passes):
    """Floating-point operations and bytes for one image of 32x32 pixels to go through a model some times, gradients
    included: one pass is that of the images, one their gradients', and one the weights'.

    Bytes are those of what every convolution and linear layer reads and writes, were all else done on the way.
    """
    elements = 0

    def count(module, inputs, output):
        nonlocal elements
        elements += inputs[0].numel() + output.numel()

    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [module.register_forward_hook(count) for module in layers]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return passes * counter.get_total_flops(), passes * elements * dtype.itemsize


def robustness_attack(model, images, targets, steps):
    """robustness' own attack, as the authors call it."""
    with one_device(images.device):
        options = {"constraint": "2", "targeted": True, "eps": 0.5, "step_size": 0.1, "iterations": steps}
        return model(images, targets, make_adv=True, **options)


def compile_on(device):
    """The value of the key compile: on a GPU what auto means for long work; on a CPU never, since what is timed there
    is small."""
    return "always" if device.type == "cuda" else "never"


def attack_works(device, precision, size):
    """The lines about locking with a ResNet-50: one target map, and all methods; each counts images times steps."""
    dtype = utils.PRECISIONS[precision]
    model = attacker_model("resnet50", "cifar").to(device).eval()
    classifier = torch.nn.Sequential(model.normalizer, model.model).requires_grad_(False)
    classifier = deepcopy(classifier).to(memory_format=torch.channels_last)  # as lock.py's; the authors' stays as it is
    folded = FoldedClassifier(classifier, dtype)
    if compile_on(device) == "always":
        folded.model.forward = Compiled(folded.model.forward, size.batch)
    images = torch.randint(256, (size.batch, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(size.batch, device=device) % 10
    few, few_labels = to_float(images[: size.reference_batch]), labels[: size.reference_batch]
    args = Namespace(eps=0.5, attack_lr=0.1, attack_steps=size.steps, alpha=0.5, lambd=0.5)
    maps = target_maps(10, 0)
    passes = 2 + 1 / size.steps  # after the last step the images are looked at once more
    one = Work(
        "a step of the attack on ResNet-50",
        LOCK,
        lambda: robustness_attack(model, few, few_labels, size.steps),
        len(few) * size.steps,
        lambda: attack(folded, to_float(images), labels, 0.5, 0.1, size.steps),
        len(images) * size.steps,
        cost_of(classifier, dtype, passes),
    )
    yield one
    attacks = sum(len(attacks_of([method])) for method in METHODS)
    yield one._replace(
        name="a step of the lock by all four methods",
        reference_count=one.reference_count / attacks,  # of the many attacks that it takes, all alike, one is timed
        ours=lambda: lock.lock_batch(
            classifier, folded, maps, args, images, labels, "train", list(METHODS), lambda: None
        ),
        cost=cost_of(classifier, dtype, 4 * passes + 10 / size.steps),  # it looks at the originals and the attacks too
    )


class Pictures(torch.utils.data.Dataset):
    """PIL images, transformed one by one, as torchvision's data sets are."""

    def __init__(self, images, labels, transform):
        self.pictures, self.labels, self.transform = list(map(to_pil_image, images)), labels.tolist(), transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.transform(self.pictures[index]), self.labels[index]


def random_split(count):
    """So many random images uint8 [count, 3, 32, 32], and labels."""
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10


def base_works(device, precision, size):
    """The line about training a base classifier, by robustness' own loop both times."""
    import_robustness()  # imports robustness.train, and hides its warnings
    from robustness import data_augmentation
    from robustness import train as loops
    from robustness.tools import helpers

    images, labels = random_split(size.batches * size.base_batch)
    pictures = Pictures(images, labels, data_augmentation.TRAIN_TRANSFORMS_DEFAULT(32))
    on_gpu = device.type == "cuda"
    options = {"num_workers": size.workers[1], "pin_memory": on_gpu, "persistent_workers": True}
    loader = DataLoader(pictures, size.base_batch, shuffle=True, **options)
    loader = helpers.DataPrefetcher(loader) if on_gpu else loader
    batches = Batches(Split(images, labels, None, None), device, size.base_batch, augment_photos, shuffle=True)
    args = Namespace(batch_size=size.base_batch, compile=compile_on(device), adv_train=0, adv_eval=0)
    args.precision = precision if precision != "float16" else "float32"

    def epoch_of(loader, fast):
        model = attacker_model("resnet50", "cifar")
        if fast:
            with redirect_stdout(io.StringIO()):  # it says what the table's head says already
                speed_up(model.model, args, device, passes=0)
        model = nn.DataParallel(model.to(device), [device.index] if on_gpu else None)  # as robustness does it
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        hooks = Parameters({"custom_accuracy": accuracies} if fast else {})

        def epoch():
            with one_device(device), redirect_stderr(io.StringIO()):
                loops._model_loop(hooks, "train", loader, model, optimizer, 0, False, None)

        return epoch

    dtype = utils.PRECISIONS[args.precision]
    cost = cost_of(attacker_model("resnet50", "cifar").model, dtype, 3)
    name = f"train the base classifier, ResNet-50, batch {size.base_batch}"
    yield Work(name, EPOCH, epoch_of(loader, False), len(images), epoch_of(batches, True), len(images), cost)


def train_reference(model, optimizer, loader, device):
    """An epoch of the authors' trainer."""
    model.train()
    for inputs, targets in loader:
        loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_epoch(name, device, precision, size):
    """An epoch of train.py, as a function; the images lie on the device."""
    batch_size = size.models[name]
    images, labels = (tensor.to(device) for tensor in random_split(size.batches * batch_size))
    keys = {"architecture": name, "precision": precision, "compile": compile_on(device), "batch_size": batch_size}
    config = EasyDict(CONFIG | keys)
    step = train.make_step(train.make_learner(train.make_model(config).to(device), config), config)
    return lambda: train.train_epoch(step, images, labels, config)


def training_works(device, precision, size):
    """The lines about training: each model alone, then some of them several at once, timed for an image of any.

    The authors' way is one process in both cases.
    """
    works = {}
    for name, batch_size in size.models.items():
        images, labels = random_split(size.batches * batch_size)
        augmentation = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        pictures = Pictures(images, labels, augmentation)
        loader = DataLoader(pictures, batch_size, shuffle=True, num_workers=size.workers[0], persistent_workers=True)
        reference = MODELS[name](num_classes=10).to(device)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, **CONFIG["optimize"])
        works[name] = Work(
            f"train {name}, batch {batch_size}",
            EPOCH,
            partial(train_reference, reference, optimizer, loader, device),
            len(images),
            our_epoch(name, device, precision, size),
            len(images),
            cost_of(reference, utils.PRECISIONS[precision], 3),
        )
        yield works[name]
    for name in size.together:
        alone, count = works[name], size.jobs
        with together(count, name, size) as epoch:
            title = f"{count} at once: {name}, batch {size.models[name]}"
            yield alone._replace(name=title, ours=epoch, count=count * alone.count)


@contextmanager
def together(jobs, name, size):
    """An epoch of training a model in several processes at once, on one device, as a function, while this is open.

    Its first call starts the processes. On a CPU they share the threads that one process would have.
    """
    context = torch.multiprocessing.get_context("spawn")
    processes = {}  # by our ends of their pipes

    def epoch():
        while len(processes) < jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=train_at, args=(theirs, jobs, name, size), daemon=True)
            process.start()
            theirs.close()  # so that ours ends with the process, however that ends
            processes[ours] = process
        try:
            for pipe in processes:
                pipe.send("begin")
            for pipe in processes:
                pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError("one of the processes that train at once failed, see above") from error

    try:
        yield epoch
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.join()


def train_at(pipe, jobs, name, size):
    """One of several processes: train for an epoch whenever the pipe says so, and say when it has ended."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    device, _, precision, _ = set_up()
    epoch = our_epoch(name, device, precision, size)
    with suppress(EOFError, ConnectionError):  # all is measured, or another process failed
        while pipe.recv():
            seconds(epoch, device)
            pipe.send("ended")


def seconds(function, device):
    """How long a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(work, device, rounds, references):
    """Seconds: the best of the reference and of ours, each for one time, and what our first call took longer.

    references has the best of those that were timed before, for other lines, and gets this one's.
    """

    def reference():
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            return seconds(work.reference, device)

    known = work.reference in references
    if not known:
        reference()  # to warm up
    first, ours = seconds(work.ours, device), []
    for _ in range(rounds):
        if not known:
            references[work.reference] = min(reference(), references.get(work.reference, math.inf))
        ours.append(seconds(work.ours, device))
    return references[work.reference] / work.reference_count, min(ours) / work.count, first - min(ours)


def duration(seconds):
    """A time as text, in the unit that suits it."""
    unit, length = ("h", 3600) if seconds >= 7200 else ("min", 60) if seconds >= 120 else ("s", 1)
    return f"{seconds / length:.1f} {unit}"


def profile(function, device, usual):
    """The 15 operations or, on a GPU, kernels that a call spends most of its time in, as lines; above them how long all
    take together, beside the seconds that a call takes as usual: what a GPU waits is the rest of these.

    Without any, there are no lines: those of other processes are not seen.
    """
    with torch.profiler.profile(acc_events=True) as profiler:
        seconds(function, device)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # a kernel is an event of the GPU, and counts at the operation that launched it, too; here once
    events = [
        event
        for event in profiler.key_averages()
        if event.device_type.name.lower() == device.type and not event.is_user_annotation
    ]
    events.sort(key=lambda event: getattr(event, kind), reverse=True)
    total = sum(getattr(event, kind) for event in events)
    if events:
        yield f"{total / 1e3:.2f} ms in all; unprofiled, a call takes {1e3 * usual:.2f} ms"
    for event in events[:15]:
        time = getattr(event, kind)
        yield f"{time / total:6.1%} {time / 1e3:10.2f} ms {event.count:6} times  {event.key[:90]}"


def ceilings(device, precision):
    """What the hardware reaches: operations a second in a product of matrices, and bytes a second in a copy.

    The product is tried as a convolution of 1x1 too, which another library computes (oneDNN or cuDNN).
    """
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=utils.PRECISIONS[precision])
    images, kernel = a.view(16, 16, n // 256, n).permute(0, 3, 1, 2), a[:, :, None, None]
    products = (lambda: a @ a, lambda: F.conv2d(images, kernel))
    fastest = min(seconds(product, device) for product in products for _ in range(5))
    much = torch.ones(2**30, dtype=torch.uint8, device=device)  # more than any cache holds
    copy = min(seconds(much.clone, device) for _ in range(5))
    return 2 * n**3 / fastest, 2 * much.nbytes / copy


def set_up():
    """What every process begins with; returns the device, and the precision that auto picks there, each with why."""
    device, reason = utils.set_up_device()
    torch.manual_seed(0)
    # all that is measured is a network of ordinary convolutions, which share a precision
    return device, reason, *utils.pick_precision("auto", device, MODELS["preresnet20"]())


def main():
    parser = utils.Parser(__doc__)
    parser.add_argument("words", nargs="*", default=[""], help="measure only the lines with one of these words")
    parser.add_argument("--profile", action="store_true", help="say what takes the time in each line of one process")
    args = parser.parse_args()
    device, reason, precision, why = set_up()
    size = SIZES[device.type]
    rates = ceilings(device, precision)
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    print(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {utils.commit()}:")
    print(f"`{shlex.join(['python', '-m', 'tests.benchmarks.speed', *sys.argv[1:]])}`\n")
    print(f"{device} ({reason}), {os.cpu_count()} CPU cores, {precision} ({why}), compile {compile_on(device)};")
    print(f"torch {torch.__version__}{cudnn}, Python {platform.python_version()}.")
    print(f"Peak, as measured: {rates[0] / 1e12:.2f} TFLOP/s in a matrix product, {rates[1] / 1e9:.0f} GB/s in a copy.")
    # training_works last: torch.compile's CUDA graphs in base_works free cuBLAS' workspaces, to which its own write
    works = chain(*(kind(device, precision, size) for kind in (attack_works, base_works, training_works)))
    columns = "work, for one image", "the authors' way, ms", "ours, ms", "ratio", "of peak FLOP/s"
    columns += "of peak bandwidth", "first call, s", "the whole, the authors' way", "the whole, ours"
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    profiles, references, compiling = {}, {}, 0
    for work in tqdm(works, leave=False, disable=None):
        if not any(word in work.name for word in args.words):
            continue
        reference, ours, first = measure(work, device, size.rounds, references)
        shares = " | ".join(f"{cost / ours / rate:.0%}" for cost, rate in zip(work.cost, rates))
        times = f"{1e3 * reference:.3g} | {1e3 * ours:.3g} | {reference / ours:.1f}x"
        once = 0  # the first of many epochs pays for all
        if work.whole == LOCK:
            once = compiling = max(compiling, first)  # the lines of the attack share a compiled model
        whole = duration(reference * work.whole), duration(ours * work.whole + once)
        if work.whole == LOCK and size.steps == 1:
            whole = "", ""
        print(f"| {work.name} | {times} | {shares} | {first:.1f} | {' | '.join(whole)} |", flush=True)
        profiles[work.name] = list(profile(work.ours, device, ours * work.count)) if args.profile else []
    for name, lines in profiles.items():
        if lines:
            print(f"\n{name}:\n\n```", *lines, "```", sep="\n")
    if not profiles:
        raise UserError(f"{' '.join(args.words)}: no line's name has one of these words")


if __name__ == "__main__":
    utils.run_command(main)
