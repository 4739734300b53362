"""Lock a data set: perturb every image a little, so that a model trained on the result fails on ordinary images.

    python lock.py --orig-data ./data/cifar10 --lock-data ./data \\
        --resume-path ./logs/checkpoints/dir/resnet50/checkpoint.pt.best --lock-method basic

Every image is attacked by targeted PGD in an L2 ball, each class towards another by a fixed map, and the
attacks of a method are blended and laid side by side. Writes, for train and test, a file of images and one of
labels, and prints how well the lock took. Method and constants: arXiv:2002.03793.
"""

import time
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

import utils
from models.base import load_classifier
from utils import DATASETS, SPLITS, UserError, lock_suffix, locked_path, number, to_float, to_uint8

# True class -> target class, in CIFAR-10's order. T2 keeps class 9 and T4 class 7, as the original does.
TARGET_MAPS = {
    "T1": (8, 3, 1, 0, 2, 4, 9, 6, 7, 5),
    "T2": (4, 2, 3, 5, 7, 1, 8, 0, 6, 9),
    "T3": (6, 2, 9, 1, 0, 7, 5, 3, 4, 8),
    "T4": (3, 9, 6, 1, 5, 8, 4, 7, 0, 2),
}

# The sides of a locked image, from left to right; each side is one attack, or a blend of two.
METHODS = {
    "basic": (("T1",),),
    "mixup": (("T1", "T2"),),
    "horiz": (("T1",), ("T2",)),
    "mixandcat": (("T1", "T2"), ("T3", "T4")),
}


def project(images, centers, eps):
    """The images [N, C, H, W] moved into the L2 balls of radius eps around their centers, then into [0, 1]."""
    delta = (images - centers).renorm(p=2, dim=0, maxnorm=eps)
    return (centers + delta).clamp(0, 1)


def attack(classifier, images, targets, eps, step_size, steps, on_step=lambda: None):
    """Targeted PGD in an L2 ball, without random start; equals robustness' AttackerModel (use_best=True).

    images [N, C, H, W] in [0, 1], targets [N]; eps and step_size in units of those pixels. Returns, image by
    image, the iterate of least cross-entropy to its target, of steps + 1: the image itself and the last included.
    on_step is called after each evaluation.
    """
    x, best = images, images
    best_losses = torch.full((len(images),), torch.inf, device=images.device)
    for step in range(steps + 1):
        x = x.detach().requires_grad_(step < steps)
        losses = F.cross_entropy(classifier(x), targets, reduction="none")
        better = losses.detach() < best_losses
        best_losses = torch.where(better, losses.detach(), best_losses)
        best = torch.where(better[:, None, None, None], x.detach(), best)
        if step < steps:
            # summed, not averaged: no image's gradient depends on the size of its batch
            (gradient,) = torch.autograd.grad(losses.sum(), x)
            norms = gradient.flatten(1).norm(dim=1)[:, None, None, None]
            x = project(x.detach() - step_size * gradient / (norms + 1e-10), images, eps)
        on_step()
    return best


def combine(attacked, method, alpha=0.5, lambd=0.5):
    """Put the attacks of a method together.

    attacked maps the name of a target map to images [N, C, H, W]. A blend is lambd of its first attack and
    1 - lambd of its second; of two sides, the left takes the columns [0, int(alpha * W)).
    """
    sides = [
        attacked[names[0]] if len(names) == 1 else lambd * attacked[names[0]] + (1 - lambd) * attacked[names[1]]
        for names in METHODS[method]
    ]
    if len(sides) == 1:
        return sides[0]
    column = int(alpha * sides[0].shape[-1])
    return torch.cat([sides[0][..., :column], sides[1][..., column:]], dim=-1)


def attacks_of(methods):
    """The names of the target maps that the methods need, each once."""
    return list(dict.fromkeys(name for method in methods for side in METHODS[method] for name in side))


@torch.no_grad()
def measure(classifier, images, locked, labels, targets):
    """What is known of a batch, as one number or truth value an image, by name.

    images and locked uint8 [N, 3, H, W]: the originals, and what is delivered; targets [maps, N].
    """
    images, locked = to_float(images), to_float(locked)
    predictions = classifier(locked).argmax(1)
    return {
        "to_target": (predictions == targets).any(0),
        "to_true": predictions == labels,
        "l2": (locked - images).flatten(1).norm(dim=1),
        "psnr": peak_signal_noise_ratio(locked, images, data_range=1.0, reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(locked, images, data_range=1.0, reduction="none"),
    }


def lock_batch(classifier, images, labels, sources, args, on_step):
    """Lock images uint8 [N, 3, H, W] with labels int64 [N] by each of args.lock_method, attacking each map once.

    sources says what the targets are computed from: "labels", or "predictions" of the base classifier. Returns,
    by method, a pair of the locked images uint8 and what was measured, one number or truth value an image, by name.
    """
    originals = to_float(images)
    with torch.no_grad():
        predictions = classifier(originals).argmax(1)
    classes = {"labels": labels, "predictions": predictions}[sources]
    targets, attacked, reached = {}, {}, {}
    for name in attacks_of(args.lock_method):
        targets[name] = torch.tensor(TARGET_MAPS[name], device=images.device)[classes]
        attacked[name] = attack(
            classifier, originals, targets[name], args.eps, args.attack_lr, args.attack_steps, on_step
        )
        with torch.no_grad():
            reached[name] = classifier(attacked[name]).argmax(1) == targets[name]
    results = {}
    for method in args.lock_method:
        names = attacks_of([method])
        locked = to_uint8(combine(attacked, method, args.alpha, args.lambd))
        results[method] = (
            locked,
            {
                "base": predictions == labels,
                **{name: reached[name] for name in names},
                **measure(classifier, images, locked, labels, torch.stack([targets[name] for name in names])),
            },
        )
    return results


def lock_split(classifier, images, labels, split, args, device):
    """Lock a whole split, a batch at a time, in its order; returns what lock_batch does, on the CPU.

    The target is computed from the true label on the training set, and on the test set from what the base
    classifier predicts, so that an image without a label can be locked too.
    """
    parts = {method: [] for method in args.lock_method}
    measured = {method: defaultdict(list) for method in args.lock_method}
    sources = "labels" if split == "train" else "predictions"
    evaluations = len(attacks_of(args.lock_method)) * (args.attack_steps + 1)
    with tqdm(
        desc=split,
        unit="image",
        total=len(images) * evaluations,
        unit_scale=1 / evaluations,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}",
    ) as progress:
        for start in range(0, len(images), args.batch_size):
            batch = slice(start, start + args.batch_size)
            inputs, truth = images[batch].to(device), labels[batch].to(device)
            advance = partial(progress.update, len(inputs))
            results = lock_batch(classifier, inputs, truth, sources, args, advance)
            for method, (locked, measurements) in results.items():
                parts[method].append(locked.cpu())
                for name, values in measurements.items():
                    measured[method][name].append(values.float().cpu())
    return {
        method: (torch.cat(parts[method]), {name: torch.cat(values) for name, values in measured[method].items()})
        for method in args.lock_method
    }


def report(measured, method):
    """How well a lock took, as lines of text, from the measurements of lock_split."""
    attacks = ", ".join(f"{name} {measured[name].mean():.2%}" for name in attacks_of([method]))
    changed = measured["l2"] > 0  # the PSNR of an image that is as it was is infinite
    psnr = measured["psnr"][changed].mean()
    return (
        f"  base classifier, on the originals  {measured['base'].mean():.2%} right\n"
        f"  attacks that reach their target    {attacks}\n"
        f"  locked images, sent to a target    {measured['to_target'].mean():.2%}, "
        f"still given the true label {measured['to_true'].mean():.2%}\n"
        f"  L2 distance to the originals       mean {measured['l2'].mean():.3f}, largest {measured['l2'].max():.3f}\n"
        f"  likeness                           PSNR {psnr:.2f} dB, "
        f"SSIM {measured['ssim'].mean():.4f}" + ("" if changed.all() else f", {(~changed).sum()} images unchanged")
    )


def parse_arguments():
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="cifar", help="the data set to lock (cifar and cifar10 are one)")
    add("--orig-data", default="./data/cifar10", help="its folder (default: %(default)s)")
    add("--lock-data", default="./data", help="folder to write the locked files to (default: %(default)s)")
    add(
        "--resume-path",
        default="./logs/checkpoints/dir/resnet50/checkpoint.pt.best",
        help="checkpoint of the base classifier (default: %(default)s)",
    )
    add("--arch", default="resnet50", help="architecture of the base classifier (default: %(default)s)")
    add(
        "--lock-method",
        choices=[*METHODS, "all"],
        nargs="+",
        default=["basic"],
        help="how attacks are combined; several share their attacks (default: basic)",
    )
    add("--eps", type=number(float, 0), default=0.5, help="L2 radius, in pixels of [0, 1] (default: %(default)s)")
    add("--attack-lr", type=number(float, 0), default=0.1, help="L2 length of a step (default: %(default)s)")
    add("--attack-steps", type=number(int, 0), default=100, help="steps an attack (default: %(default)s)")
    add("--alpha", type=number(float, 0, 1), default=0.5, help="share of the left side (default: %(default)s)")
    add("--lambd", type=number(float, 0, 1), default=0.5, help="weight of a blend's first (default: %(default)s)")
    add("--batch-size", type=number(int, 1), default=128, help="images attacked at once (default: %(default)s)")
    add("--subset", type=number(int, 1), help="lock only the first SUBSET images of each split")
    add(
        "--manual-seed",
        type=number(int, 0, 2**63),
        default=23,
        help="seed of torch; the attack itself draws nothing (default: %(default)s)",
    )
    add("--workers", type=int, default=8, help="accepted as the original's, not used: images are read as one tensor")
    add("--overwrite", action="store_true", help="replace locked files of the same name")
    args = parser.parse_args()
    args.lock_method = list(METHODS) if "all" in args.lock_method else list(dict.fromkeys(args.lock_method))
    return args


def paths_of(split, method, args):
    """The paths of a split's images and labels, locked by a method."""
    suffix = lock_suffix(method, args.alpha, args.lambd)
    return [locked_path(args.lock_data, split, kind, suffix) for kind in ("image", "label")]


def main():
    args = parse_arguments()
    paths = [path for split in SPLITS for method in args.lock_method for path in paths_of(split, method, args)]
    torch.manual_seed(args.manual_seed)
    device, reason = utils.pick_device()
    classifier = load_classifier(args.resume_path, args.arch, args.dataset).to(device)
    stale = [path for path in paths if path.exists()]
    if stale and not args.overwrite:
        raise UserError(f"{stale[0]} exists; name another folder with --lock-data, or replace it with --overwrite")
    splits = {split: DATASETS[args.dataset].load(args.orig_data, split == "train") for split in SPLITS}
    utils.make_folder(args.lock_data)
    print(f"Locking {args.dataset} by {', '.join(args.lock_method)} with {args.arch}, on {device} ({reason})")
    for split, (images, labels) in splits.items():
        images, labels = images[: args.subset], labels[: args.subset].clone()
        start = time.time()
        results = lock_split(classifier, images, labels, split, args, device)
        seconds = time.time() - start
        while stale:  # all of them before the first new one, so that files of two locks never stand side by side
            stale.pop().unlink()
        print(f"{split}: {len(images)} images in {seconds:.0f} s, {len(images) / seconds:.1f} a second")
        for method, (locked, measured) in results.items():
            image_path, label_path = paths_of(split, method, args)
            for path, tensor in {image_path: locked, label_path: labels}.items():
                utils.write_file(path, lambda file, tensor=tensor: torch.save([tensor], file))
            print(f"{image_path}\n{report(measured, method)}")


if __name__ == "__main__":
    utils.run_command(main)
