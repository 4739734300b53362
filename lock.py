"""Lock a data set: perturb every image a little, so that a model trained on the result fails on ordinary images.

    python lock.py --orig-data ./data/cifar10 --lock-data ./data \\
        --resume-path ./logs/checkpoints/dir/resnet50/checkpoint.pt.best --lock-method basic

Every image is attacked by targeted PGD in an L2 ball, each class towards another by a fixed map, and the
attacks of a method are blended and laid side by side. Writes, for train and test, a file of images and one of
labels, and a manifest that says how they were made and how strong the lock is. A command that was interrupted
goes on where it was when it is given again. The method: Hu et al., 2020, arXiv:2002.03793.

    python lock.py --verify ./data
    python lock.py --unlock --key KEYFILE --lock-data ./data --orig-data ./unlocked
"""

import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lockfiles
import sealing
import shards
import utils
from attack import attack
from data import DATASETS, SPLITS, to_float, to_uint8
from graphs import Compiled
from lockfiles import Paths, sha256
from methods import METHODS, PARAMETERS, attacks_of, combine, given_parameters, target_maps
from models.base import FoldedClassifier, check_size, load_classifier
from ranks import Ranks
from utils import COMPILE, PRECISIONS, UserError, number, parse_seed, write_file

# How many images of 32x32 pixels to attack at once: so many that a GPU waits for no launch, few enough for its memory.
BATCH_SIZES = {"cuda": 500, "cpu": 128}


@torch.no_grad()
def measure(classifier, images, locked, labels, targets):
    """Measurements of each image of a batch, by name, as tensors [N].

    images and locked uint8 [N, 3, H, W]: the originals, and what is delivered; labels int64 [N], targets [maps, N].
    to_target and to_true say whether the classifier takes it for one of the targets, and for the label; l2 is the
    distance in pixels of [0, 1], and psnr in dB, infinite where nothing was changed.
    """
    # here, because a mistake in the flags is told seconds sooner without it
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images, locked = to_float(images), to_float(locked)
    predictions = classifier(locked).argmax(1)
    return {
        "to_target": (predictions == targets).any(0),
        "to_true": predictions == labels,
        "l2": (locked - images).flatten(1).norm(dim=1),
        "psnr": peak_signal_noise_ratio(locked, images, data_range=1.0, reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(locked, images, data_range=1.0, reduction="none"),
    }


def lock_batch(classifier, folded, maps, args, images, labels, split, methods, on_step):
    """Lock images uint8 [N, 3, H, W] with labels int64 [N] by each of the methods, attacking each target map once.

    The folded classifier is what is attacked; the classifier itself predicts and measures. maps gives each target map
    by name, a list; on_step is called after each evaluation of an attack. Returns, by method, a pair of the locked
    images uint8 and what was measured, one number an image, by name; all of it on the CPU.
    """
    originals = to_float(images)
    with torch.no_grad():
        predictions = classifier(originals).argmax(1)
        if not folded(originals).isfinite().all():
            remedy = "" if args.precision == "float32" else "choose --precision float32, or "
            raise UserError(f"the base classifier gives NaN or infinity: {remedy}train it again")
    # what the classifier predicts, on the test set: so that an image without a label can be locked too
    classes = labels if split == "train" else predictions
    targets, attacked, reached = {}, {}, {}
    for name in attacks_of(methods):
        targets[name] = torch.tensor(maps[name], device=images.device)[classes]
        attacked[name] = attack(
            folded, originals, targets[name], args.eps, args.attack_lr, args.attack_steps, on_step=on_step
        )
        with torch.no_grad():
            reached[name] = classifier(attacked[name]).argmax(1) == targets[name]
    results = {}
    for method in methods:
        names = attacks_of([method])
        locked = to_uint8(combine(attacked, method, args.alpha, args.lambd))
        measured = {
            "base": predictions == labels,
            **{name: reached[name] for name in names},
            **measure(classifier, images, locked, labels, torch.stack([targets[name] for name in names])),
        }
        results[method] = locked.cpu(), {name: values.float().cpu() for name, values in measured.items()}
    return results


def lock_split(lock_one, images, labels, split, locks, args, device, ranks):
    """Lock a split, one batch a rank at a time; writes a shard for each batch and method that has none yet.

    images are uint8 [N, 3, H, W], and labels int64 [N]. lock_one is lock_batch, given what is the same for every batch;
    locks gives the Paths of each method.
    """
    starts = range(0, len(images), args.batch_size)
    todo = list(ranks.on_rank0(shards.missing, locks, split, starts).items())
    if not todo:
        return
    if len(todo) < len(starts):
        ranks.say(f"{split}: going on after {len(starts) - len(todo)} of {len(starts)} batches")
    sizes = {start: min(args.batch_size, len(images) - start) for start, _ in todo}
    count, t0 = sum(sizes.values()), time.time()
    with tqdm(
        desc=split,
        unit="image",
        total=count,
        smoothing=0,  # between two attacks, and two batches, it stands still
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}",
        disable=ranks.rank > 0,
    ) as progress:
        for index in range(0, len(todo), ranks.world_size):
            together = todo[index : index + ranks.world_size]  # a batch for each rank
            results = error = None
            if ranks.rank < len(together):
                start, methods = together[ranks.rank]
                batch = [tensor[start : start + sizes[start]].to(device) for tensor in (images, labels)]
                evaluations = (args.attack_steps + 1) * len(attacks_of(methods))  # of each image
                on_step = partial(advance, progress, sum(sizes[start] for start, _ in together) / evaluations)
                results, error = utils.attempt(lock_one, *batch, split, methods, on_step)
            made = ranks.gather((results or {}, utils.environment(device)))
            ranks.on_rank0(shards.write_all, locks, split, [start for start, _ in together], made)
            ranks.abort_if_any(error)  # only now: the others' batches are written
    seconds = time.time() - t0
    ranks.say(f"{split}: {count} images in {seconds:.0f} s, {count / seconds:.1f} a second")


def advance(progress, images):
    """Let a tqdm advance by images, which need not be whole, but not beyond its total, as their rounded sum might."""
    progress.update(min(images, progress.total - progress.n))


# The report


def report(summary):
    """How strong a lock is, as lines of text, from the numbers of shards.summarize."""
    attacks = ", ".join(f"{name} {share:.2%}" for name, share in summary["attacks"].items())
    psnr = "infinite" if summary["psnr"] is None else f"{summary['psnr']:.2f} dB"
    unchanged = f", {summary['unchanged']} images unchanged" if summary["unchanged"] else ""
    to_target, to_true = f"{summary['to_target']:.2%}", f"{summary['to_true']:.2%}"
    return (
        f"  base classifier, on the originals  {summary['base_accuracy']:.2%} right\n"
        f"  attacks that reach their target    {attacks}\n"
        f"  locked images, sent to a target    {to_target}, still given the true label {to_true}\n"
        f"  L2 distance to the originals       mean {summary['l2_mean']:.3f}, largest {summary['l2_max']:.3f}\n"
        f"  likeness                           PSNR {psnr}, SSIM {summary['ssim']:.4f}{unchanged}"
    ) + "".join(f"\n  WEAK: {line}" for line in weaknesses(summary))


def weaknesses(summary):
    """What a lock with these numbers of shards.summarize lacks, and what to do about it, as lines."""
    if summary["base_accuracy"] < 0.5:
        yield "the base classifier is wrong on most originals: was it trained on them, and long enough?"
    if min(summary["attacks"].values()) < 0.9:
        yield "many attacks miss their target: raise --eps and --attack-lr, or --attack-steps"
    if summary["to_true"] > 0.25:
        remedy = "lock by basic"
        if len(summary["attacks"]) == 1:  # a target can be the true class where the classifier predicts another
            remedy = "raise --eps and --attack-lr, or train a better base classifier"
        yield f"many locked images are still given their true label: {remedy}"


def describe(paths, manifest):
    """The report of a lock, as text."""
    lines = [f"{paths.manifest}: {', '.join(manifest['files'])}"]
    for split, summary in manifest["report"].items():
        lines += [f"{split}, {summary['images']} images", report(summary)]
    return "\n".join(lines)


# Lock, verify, unlock


def load_inputs(args):
    """The splits by name, the base classifier on its device, the device, and why it was chosen."""
    splits = {split: DATASETS[args.dataset].load(args.orig_data, split, args.subset) for split in SPLITS}
    classes = splits["train"].classes
    if len(classes) < 2:
        raise UserError(f"{args.orig_data}: images of one class cannot be sent to another; lock at least two classes")
    device, reason = utils.set_up_device()
    classifier = load_classifier(args.resume_path, args.arch, args.dataset, len(classes))
    check_size(classifier, to_float(splits["train"].images[:1]), args.arch)
    # channels_last is the order in which convolutions are fast
    return splits, classifier.to(device, memory_format=torch.channels_last), device, reason


def lock_dataset(args, ranks):
    """Lock both splits of a data set by each of the methods, or what is left of that to do."""
    splits, classifier, device, reason = ranks.everywhere(load_inputs, args)
    classes = splits["train"].classes
    locks = {method: Paths(args.lock_data, suffix) for method, suffix in suffixes_of(args).items()}
    maps, base_sha256 = target_maps(len(classes), args.manual_seed), sha256(utils.read_file(args.resume_path))
    hashes = shards.hash_originals(splits)
    asked = {method: shards.asked_settings(method, classes, hashes, maps, base_sha256, args) for method in locks}
    chosen, why = ranks.on_rank0(choose, args, locks, asked, classifier, splits, device)
    vars(args).update(chosen)
    settings = {method: each | chosen for method, each in asked.items()}
    ranks.on_rank0(check_alike, ranks.gather(settings))
    folded = FoldedClassifier(classifier, PRECISIONS[args.precision])
    if args.compile == "always":
        batch_size = min(args.batch_size, len(splits["train"].labels))
        folded.model.forward = Compiled(folded.model.forward, batch_size, ranks.say)
    with ExitStack() as stack:
        ranks.on_rank0(stack.enter_context, utils.exclusive(args.lock_data))
        manifests = ranks.on_rank0(shards.prepare, locks, asked, chosen, args)
        todo = {method: paths for method, paths in locks.items() if not manifests[method]}
        if todo:
            where = f"{device} ({reason})" + (f" and {ranks.world_size - 1} more" if ranks.world_size > 1 else "")
            ranks.say(f"Locking {args.dataset} by {', '.join(todo)} with {args.arch}, on {where}")
            ranks.say(utils.describe_precision(args.precision, why, args.compile))
        for name in attacks_of(todo):
            kept = [classes[index] for index, target in enumerate(maps[name]) if index == target]
            if kept:
                ranks.say(f"the target map {name} sends {', '.join(kept)} to itself")
        lock_one = partial(lock_batch, classifier, folded, maps, args)
        for split, (images, labels, *_) in splits.items():
            lock_split(lock_one, images, labels, split, todo, args, device, ranks)
        ranks.on_rank0(write_locks, locks, manifests, settings, splits, args)


def suffixes_of(args):
    """What the files of each method end in, by method."""
    return {method: lockfiles.lock_suffix(method, args.alpha, args.lambd) for method in args.lock_method}


def check_alike(settings):
    """Raise UserError where the processes of torchrun, which may run on several machines, are to make different locks.

    settings are those of each process, by method, in the order of the ranks.
    """
    for rank, other in enumerate(settings):
        for key in utils.differing(settings[0], other):
            raise UserError(
                f"torchrun: rank {rank} has another {key} than rank 0; give every machine the same images, base "
                "classifier and flags"
            )


def write_locks(locks, manifests, settings, splits, args):
    """Write the files of every lock, or what a finished one lacks of them, and say how strong each is."""
    key = sealing.read_key(args.key_out) if args.key_out else None
    for method, paths in locks.items():
        if manifests[method]:
            print(f"{paths.manifest}: finished already, with the same settings (--overwrite locks again)")
            manifest = shards.add_outputs(paths, manifests[method], splits, args.format, key)
        else:
            manifest = shards.finish(paths, settings[method], splits, args.format, key)
        print(describe(paths, manifest))
    for method, paths in locks.items():  # only now: with --overwrite, a method without its shards would be locked again
        if not manifests[method]:
            shards.forget(paths)


def choose(args, locks, asked, classifier, splits, device):
    """Precision, compile and batch size, by name: from the flags, or else as a lock was begun, or else what suits the
    device. And why that precision.

    The number of methods does not count, so that each gets the same files as alone.
    """
    begun = shards.earlier_choices(locks, asked, args.overwrite)
    precision, why = utils.pick_precision(args.precision, device, classifier, begun.get("precision"))
    faster = device.type == "cuda" or (precision == "bfloat16" and utils.bfloat16_unit())
    passes = (args.attack_steps + 1) * sum(len(part.labels) for part in splits.values())
    compile = utils.pick_compile(args.compile, faster, passes, begun.get("compile"))
    batch_size = args.batch_size or begun.get("batch_size") or default_batch_size(splits["train"].images, device)
    return {"precision": precision, "compile": compile, "batch_size": batch_size}, why


def default_batch_size(images, device):
    """How many images [N, C, H, W] to attack at once, by their size."""
    height, width = images.shape[2:]
    return max(1, BATCH_SIZES[device.type] * 32 * 32 // (height * width))


def verify(folder):
    """Check every lock in a folder against its manifest; raises UserError where a file is absent or has changed."""
    locks, wrong = lockfiles.locks_in(folder), 0
    interrupted = sorted(Path(folder).glob(".lock_*"))
    for path in interrupted:
        print(f"{utils.printable(path)}: an interrupted lock; the command that began it finishes it")
    for paths in lockfiles.locks_without_manifest(folder):
        wrong += 1
        print(f"{paths.manifest}: absent, so the files of its lock cannot be checked; get it, or take them away")
    if not locks and not wrong:
        remedy = "finish its lock first" if interrupted else "name a folder that was given as --lock-data"
        raise UserError(f"--verify {folder}: holds no lock_*.json; {remedy}")
    for paths in locks:
        errors = []
        try:
            manifest = lockfiles.read_manifest(paths)
            for check in (lockfiles.check_files, lockfiles.check_unlisted, lockfiles.check_tree):
                errors += check(paths, manifest)
        except (UserError, OSError) as error:  # the manifest is damaged, or a folder cannot be read
            errors.append(error)
        wrong += len(errors)
        print(describe(paths, manifest) if not errors else "\n".join(map(utils.printable, errors)))
    if wrong:
        raise UserError(f"--verify {folder}: files that are not as they were locked: {wrong}, see above")
    print(f"{folder}: every file of {', '.join(paths.manifest.name for paths in locks)} is as it was locked")


def find_sealed(args, key):
    """The Paths and the manifest of the lock to unlock: of those named, if any, that the key has sealed, the one of the
    most images."""
    locks, named = lockfiles.locks_in(args.lock_data), suffixes_of(args).values()
    manifests = {paths: lockfiles.read_manifest(paths) for paths in locks if not named or paths.suffix in named}
    sealed = {paths: manifest for paths, manifest in manifests.items() if manifest["sealed_with"]}
    if not sealed:
        remedy = "lock with --key-out"
        others = [paths.suffix for paths in locks if paths.file("train", "sealed").exists()]
        if named and others:
            remedy = f"name another of {', '.join(others)} by --lock-method, --alpha and --lambd, or {remedy}"
        which = f" {' or '.join(named)}" if named else ""
        raise UserError(f"--lock-data {args.lock_data}: holds no sealed lock{which}; {remedy}")
    fingerprint = sealing.fingerprint(key)
    mine = [(paths, manifest) for paths, manifest in sealed.items() if manifest["sealed_with"] == fingerprint]
    if not mine:
        keys = ", ".join(manifest["sealed_with"] for manifest in sealed.values())
        raise UserError(
            f"--key {args.key}: not the key that {args.lock_data} was sealed with: its fingerprint is {fingerprint}, "
            f"and sealed_with in the manifest is {keys}"
        )
    return max(mine, key=lambda item: item[1]["report"]["train"]["images"])  # a trial may lie beside it


def unlock(args):
    """Write the original images of a sealed lock, bit for bit, to --orig-data."""
    key = sealing.read_key(args.key)
    paths, manifest = find_sealed(args, key)
    originals = {}
    for split in SPLITS:
        locked, _ = lockfiles.load_split(paths, split, manifest)
        content = lockfiles.read_checked(paths, manifest, paths.file(split, "sealed"))
        originals[split] = sealing.unseal(content, locked, key, f"{paths.suffix} {split}")
    write_originals(Path(args.orig_data), originals, args.format or lockfiles.formats_of(paths, manifest))
    for split, original in originals.items():
        print(
            f"{split}: {len(original.images)} images in {args.orig_data}, bit for bit as {paths.manifest} sealed them"
        )


def write_originals(out, originals, formats):
    """Write Splits in the formats to a new folder, or to one to which an interrupted call had moved no file yet."""
    staging = out / ".unlocking"
    with utils.exclusive(out):
        if any(not path.name.startswith(".") for path in out.iterdir()):  # .lock, or what macOS leaves behind
            whose = " (some are of an interrupted --unlock)" if staging.exists() else ""
            remedy = "name a folder that is empty or not there yet"
            raise UserError(f"--orig-data {out}: holds files already{whose}; {remedy}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for split, original in originals.items():
            if "png" in formats:
                lockfiles.write_tree(staging / split, original)
            if "tensor" in formats:
                for kind, tensor in {"image": original.images, "label": original.labels}.items():
                    write_file(Paths(staging, "original").file(split, kind), lockfiles.to_bytes(tensor))
        utils.sync_disks()
        for path in staging.iterdir():
            path.rename(out / path.name)
        staging.rmdir()


# The command line


def parse_arguments():
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="cifar", help="the data set to lock (cifar and cifar10 are one)")
    add("--orig-data", help="its folder, or the one to unlock to (default: ./data/cifar10, but none with --unlock)")
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
        help="how attacks are combined; several share their attacks (default: basic; with --unlock: that of the most "
        "images)",
    )
    add("--eps", type=number(float, 0), default=0.5, help="L2 radius, in pixels of [0, 1] (default: %(default)s)")
    add("--attack-lr", type=number(float, 0), default=0.1, help="L2 length of a step (default: %(default)s)")
    add("--attack-steps", type=number(int, 0, 10**6), default=100, help="steps of an attack (default: %(default)s)")
    add("--alpha", type=number(float, 0, 1), help="horiz and mixandcat: share of the left side (default: 0.5)")
    add("--lambd", type=number(float, 0, 1), help="mixup and mixandcat: weight of a blend's first (default: 0.5)")
    add(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="of the gradients and losses; auto: half precision where that is faster, or as the lock was begun "
        "(default: %(default)s)",
    )
    add(
        "--compile",
        choices=["auto", *COMPILE],
        default="auto",
        help="use torch.compile, which takes up to a minute; auto: as begun, or for a long lock on a GPU, or in "
        "bfloat16 on a CPU (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=number(int, 1),
        help=f"images attacked at once (default: as begun, or of 32x32 pixels {BATCH_SIZES['cuda']} on a GPU and "
        f"{BATCH_SIZES['cpu']} on a CPU, of larger ones fewer)",
    )
    add("--subset", type=number(int, 1), help="lock only the first SUBSET images of each split")
    add(
        "--manual-seed",
        type=parse_seed,
        default=23,
        help="seed of the target maps of more than ten classes; the attack draws nothing (default: %(default)s)",
    )
    add("--workers", type=int, default=8, help="accepted, not used: images are read as one tensor")
    add("--overwrite", action="store_true", help="lock again what is finished, or was begun with other settings")
    add(
        "--format",
        choices=["tensor", "png"],
        nargs="+",
        help="files of tensors, a tree of PNG files, or both (default: tensor; with --unlock: as locked)",
    )
    add("--key-out", metavar="KEYFILE", help="seal the originals with the key in this file, made if it does not exist")
    add("--verify", metavar="DIR", help="only check the locked files in a folder against their manifests")
    add("--unlock", action="store_true", help="only restore the sealed originals of --lock-data, to --orig-data")
    add("--key", metavar="KEYFILE", help="the key to unlock with")
    return complete_arguments(parser.parse_args())


def complete_arguments(args):
    """The arguments with the defaults that depend on others; raises UserError where some do not go together."""
    if bool(args.unlock) != bool(args.key):
        raise UserError("--unlock and --key KEYFILE go together")
    if args.unlock and args.verify:
        raise UserError("--verify only checks a lock, --unlock only unlocks it: give one of them")
    if args.unlock and not args.orig_data:
        raise UserError("--unlock needs --orig-data: a new folder for the originals")
    args.orig_data = args.orig_data or "./data/cifar10"
    if not args.unlock:
        args.format = args.format or ["tensor"]
    methods = args.lock_method or ([] if args.unlock else ["basic"])
    args.lock_method = list(METHODS) if "all" in methods else list(dict.fromkeys(methods))
    vars(args).update(PARAMETERS | given_parameters(args, args.lock_method))
    check_folders(args)
    return args


def check_folders(args):
    """Raise UserError where what is to be kept secret would lie in the folder that is handed out, where a lock would
    replace the originals, or where a lock would lie among the originals in a folder, and be a class of theirs."""
    secrets = {"--key-out": args.key_out, "--orig-data": args.unlock and args.orig_data}
    if args.dataset == "folder" and not args.unlock:  # other data sets are locked into ./data, where anything may lie
        secrets["--resume-path"] = args.resume_path
    for flag, path in secrets.items():
        if path and utils.lies_in(path, args.lock_data):
            raise UserError(f"{flag} {path}: lies in the folder that is handed out; name another place")
    if args.unlock or args.verify:
        return
    replaced = any(utils.lies_in(args.orig_data, Path(args.lock_data, end)) for end in suffixes_of(args).values())
    together = utils.lies_in(args.orig_data, args.lock_data) or utils.lies_in(args.lock_data, args.orig_data)
    if replaced or (args.dataset == "folder" and together):
        raise UserError(
            f"--lock-data {args.lock_data}: what is handed out and the originals in {args.orig_data} lie in one "
            "another; name another folder"
        )


def main():
    ranks = Ranks()
    args = ranks.everywhere(parse_arguments)
    if args.verify:
        ranks.on_rank0(verify, args.verify)
    elif args.unlock:
        ranks.on_rank0(unlock, args)
    else:
        lock_dataset(args, ranks)
    ranks.close()


if __name__ == "__main__":
    utils.run_command(main, if_interrupted="the same command goes on with a lock; --verify and --unlock begin anew")
