"""Run many experiments, and gather what experiments found: a table in Markdown, and a picture of the curves.

    python -m experiments

prints the table of every run below experiments/, seeds put together, beside the paper's numbers, and

    python -m experiments --run --work-path experiments/cifar10/vgg19 --lock-method basic horiz --seed 0 1 2 --jobs 3

first trains each combination of work paths, methods, seeds and variants, several at the same time. Any other flag is
handed on to train.py (--epochs 40). The same command goes on after an interruption, and trains nothing twice.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev

import torch
from matplotlib import image
from matplotlib.figure import Figure
from tqdm import tqdm

import utils
from config import FREE_ON_RESUME
from data import canonical_name
from lockfiles import METHODS
from utils import UserError, flatten

# Ways to train, as train.py's keys: as the paper does, a control, and what is known to weaken locks of this kind.
VARIANTS = {
    "plain": {},
    "control": {"train_on": "original"},
    "grayscale": {"preprocess.grayscale": True},
    "blur": {"preprocess.blur": 1.0},
    "bits2": {"preprocess.bits": 2},
    "jpeg10": {"preprocess.jpeg_quality": 10},
    "cutout": {"augmentation.cutout": True},
    "mixup": {"mixup": True},
    "cutmix": {"cutmix": True},
    "adversarial": {"adversarial.eps": 0.5},
}
# What costs accuracy where there is no lock, too, has a control that tells how much.
VARIANTS |= {
    f"control_{name}": {**VARIANTS["control"], **keys}
    for name, keys in VARIANTS.items()
    if any(key.startswith(("preprocess.", "adversarial.")) for key in keys)
}

# From the original's README: accuracy in % on the original and on the locked test set of CIFAR-10.
PAPER = {
    ("densenet100bc", "basic"): (22.78, 94.70),
    ("densenet100bc", "horiz"): (29.69, 94.62),
    ("densenet100bc", "mixandcat"): (32.92, 94.45),
    ("preresnet110", "basic"): (20.67, 94.64),
    ("preresnet110", "horiz"): (32.65, 94.49),
    ("preresnet110", "mixandcat"): (37.21, 94.03),
    ("vgg19", "basic"): (28.77, 93.58),
    ("vgg19", "horiz"): (48.13, 94.30),
    ("vgg19", "mixandcat"): (55.00, 93.06),
}

# Run

TRAIN = str(Path(__file__).parents[1] / "train.py")


def commands(args, rest):
    """The command of train.py for each combination of what args hold."""
    for work, method, variant, seed in itertools.product(args.work_path, args.lock_method, args.variant, args.seed):
        command = [sys.executable, TRAIN, "--work-path", work, "--resume"]
        command += ["--lock-method", method] if method else []
        command += ["--seed", str(seed)] if seed is not None else []
        command += ["--name", variant] if variant != "plain" else []
        for key, value in VARIANTS[variant].items():
            command += [f"--{key}", str(value)]
        yield command + rest


def run(command, slots, threads, running):
    """Run a command, and keep its process in the list running meanwhile; returns its exit code and what it said last.

    It takes a number from the queue slots meanwhile, and the GPU of that number, counted around; on a CPU so many
    threads.
    """
    slot = slots.get()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = {"OMP_NUM_THREADS": str(threads), **os.environ, "LOCAL_RANK": str(slot)}
    try:
        with subprocess.Popen(command, **options) as child:
            running.append(child)
            out, error = child.communicate()
            running.remove(child)
    finally:  # or, where no process can be started, the next run would wait for the number forever
        slots.put(slot)
    lines = (error if child.returncode else out).strip().splitlines()
    return child.returncode, lines[-1] if lines else f"exit code {child.returncode}"


def run_all(args, rest):
    """Run every command, args.jobs at a time; raises UserError where one fails, after all of them."""
    todo, running, failed = list(commands(args, rest)), [], 0
    slots, threads = SimpleQueue(), max(1, torch.get_num_threads() // args.jobs)
    for slot in range(args.jobs):
        slots.put(slot)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run", disable=None) as progress:
        futures = {pool.submit(run, command, slots, threads, running): command for command in todo}
        try:
            for future in as_completed(futures):
                code, line = future.result()
                failed += code != 0
                progress.write(f"{' '.join(futures[future][2:])}: {line}" if code else line)
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(running):
                child.terminate()  # its checkpoints are whole at any time
            raise
    if failed:
        raise UserError(f"{failed} of {len(todo)} runs failed, see above; the same command tries them again")


# Gather


def gather(folders):
    """The content of every result.json below the folders, and its folder, put together where only the seed differs.

    Returns a list of lists of results. Of a result that was copied there is one.
    """
    groups = {}
    for path in sorted({path.resolve() for folder in folders for path in Path(folder).rglob("result.json")}):
        try:
            result = {"name": "", **json.loads(path.read_text()), "folder": path.parent}
            result["dataset"] = canonical_name(result["dataset"])
            result.update({key: float(result[key]) for key in ("locked_acc", "orig_acc")})
            result["method"] = method_of(result)
            same = "{dataset} {architecture:s} {method} {name:s} {epochs:d}".format(**result)
            config = {key: value for key, value in flatten(result["config"]).items() if key not in FREE_ON_RESUME}
            result["curves"] = {
                key: {record["epoch"]: float(record[key]) for record in result["history"]}
                for key in ("locked_acc", "orig_acc")
            }
            result["lock_name"] = lock_of(result)
            lock = result["lock"] and result["lock"]["settings"]
            group = groups.setdefault(json.dumps([same, {**config, "seed": None}, lock]), {})
            group[json.dumps([result["seed"], result["history"]])] = result
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a result of train.py, or damaged; take it away, or run that again") from error
    return sorted(([*group.values()] for group in groups.values()), key=place_in_table)


def method_of(result):
    """The lock method of a result, and the parameters that differ from the paper's."""
    parameters = [f" {name} {result[name]:g}" for name in ("alpha", "lambd") if result.get(name, 0.5) != 0.5]
    return result["lock_method"] + "".join(parameters)


def lock_of(result):
    """The base classifier of a result's lock, with the start of its checkpoint's SHA-256, eps and steps."""
    if not result["lock"]:
        return "no manifest"
    return "{arch:s} {base_sha256:.7s}, eps {eps:g}, {attack_steps} steps".format(**result["lock"]["settings"])


def place_in_table(group):
    """What groups are sorted by: plain runs before the variants, those in their order, and any other name last."""
    first = group[0]
    names = ["", *VARIANTS, first["name"]]
    return first["dataset"], first["architecture"], first["method"], names.index(first["name"])


def spread(values):
    """The mean of some numbers, and their standard deviation where there are several, as text."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(groups):
    """The accuracies of every group, as a table in Markdown: after the last epoch, and the largest on original images
    on the way, which is what stopping there would have given."""
    columns = "data set", "model", "method", "variant", "lock", "epochs", "runs", "original, %", "at most, %"
    columns += "locked, %", "paper, original / locked"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups:
        first = group[0]
        known = PAPER if first["dataset"] == "cifar10" and not first["name"] else {}
        paper = known.get((first["architecture"], first["method"]))
        cells = [first[key] for key in ("dataset", "architecture", "method")]
        cells += [first["name"] or "plain", first["lock_name"], first["epochs"], len(group)]
        most = [max(result["curves"]["orig_acc"].values()) for result in group]
        for values in ([result["orig_acc"] for result in group], most, [result["locked_acc"] for result in group]):
            cells.append(spread(values))
        cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(groups, path):
    """Write a picture of the curves: a panel for each model, variant and lock, a colour for each method.

    A line is the mean of the seeds, and the band around it goes from the least to the largest.
    """
    panels, methods = {}, sorted({group[0]["method"] for group in groups})
    for group in groups:
        title = "{architecture} on {dataset}, {}\n{lock_name}".format(group[0]["name"] or "plain", **group[0])
        panels.setdefault(title, []).append(group)
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    figure.suptitle("Accuracy on locked test images (solid) and on original ones (dashed), %")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, members) in zip(axes.flat, panels.items()):
        axis.set(title=title, xlabel="epoch", ylim=(0, 100))
        for group in members:
            color = f"C{methods.index(group[0]['method'])}"
            draw(axis, group, "locked_acc", group[0]["method"], color, "-")
            draw(axis, group, "orig_acc", None, color, "--")
        axis.legend(fontsize="small")
    with utils.naming(path):
        figure.savefig(path, dpi=100)


def draw(axis, results, key, label, color, style):
    """Draw what results have of a key at each epoch that all of them evaluated."""
    curves = [result["curves"][key] for result in results]
    epochs = sorted(set.intersection(*map(set, curves)))
    values = [[curve[epoch] for curve in curves] for epoch in epochs]
    axis.plot(epochs, [mean(value) for value in values], style, color=color, label=label)
    axis.fill_between(
        epochs, [min(value) for value in values], [max(value) for value in values], color=color, alpha=0.2
    )


def show(groups, path):
    """Write a picture of the images that the runs of each lock method saw: originals, locked, and the difference."""
    folders = {}
    for group in groups:
        folder = next((result["folder"] for result in group if (result["folder"] / "images.png").exists()), None)
        if folder:
            folders.setdefault("{dataset}, {method}".format(**group[0]), folder)
    if not folders:
        raise UserError("--images: there is no images.png beside any result.json; train.py writes it")
    figure = Figure(figsize=(10, 3.2 * len(folders)), layout="constrained")
    for axis, (method, folder) in zip(figure.subplots(len(folders), squeeze=False)[:, 0], folders.items()):
        axis.set_axis_off()
        axis.set_title(f"{method}: originals, locked images, ten times the difference", loc="left")
        axis.imshow(image.imread(Path(folder, "images.png")))
    with utils.naming(path):
        figure.savefig(path, dpi=100)


def picture(text):
    """A converter of a flag's text to the path of a picture, in a folder that there is."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".pdf", ".svg") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: name a PNG, PDF or SVG file, in a folder that there is")
    return path


def parse_arguments():
    """The arguments, and the flags for train.py."""
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add(
        "--work-path",
        nargs="+",
        type=os.path.normpath,
        default=["experiments"],
        help="folders of experiments (default: all)",
    )
    add("--plot", type=picture, metavar="FILE", help="also draw the curves, into this PNG, PDF or SVG file")
    add("--images", type=picture, metavar="FILE", help="also show the images that each lock method made, in this file")
    add("--run", action="store_true", help="first train what is not trained yet")
    add("--lock-method", nargs="+", choices=[*METHODS, "all"], default=[None], help="default: that of config.yaml")
    add("--seed", nargs="+", type=utils.parse_seed, default=[None], help="default: that of config.yaml")
    add(
        "--variant",
        nargs="+",
        choices=[*VARIANTS, "all"],
        default=["plain"],
        help="train on originals as a control, or against the lock (default: plain)",
    )
    add("--jobs", type=utils.number(int, 1, 1000), default=1, help="runs at the same time (default: %(default)s)")
    args, rest = parser.parse_known_args()
    if rest and not args.run:
        raise UserError(f"unknown flag {rest[0]}; flags of train.py go with --run")
    if args.run and args.work_path == ["experiments"]:
        raise UserError("--run needs --work-path: the folders of the experiments to run")
    for flag in ("--name", "--resume", "--overwrite"):
        if any(flag == given.partition("=")[0] for given in rest):
            raise UserError(f"{flag}: --run names its runs by variant, and goes on with them; leave it out")
    for name, known in {"lock_method": METHODS, "variant": VARIANTS, "seed": [], "work_path": []}.items():
        given = getattr(args, name)
        setattr(args, name, list(known) if known and "all" in given else list(dict.fromkeys(given)))
    return args, rest


def main():
    args, rest = parse_arguments()
    if args.run:
        run_all(args, rest)
    groups = gather(args.work_path)
    if not groups:
        raise UserError(f"{', '.join(args.work_path)}: holds no result.json; run train.py, or --run")
    print(table(groups))
    if args.plot:
        plot(groups, args.plot)
    if args.images:
        show(groups, args.images)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends what is running
    utils.run_command(main, if_interrupted="the same command goes on from here")
