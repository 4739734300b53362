"""Run many experiments, and gather what experiments found: a table in Markdown, and a picture of the curves.

    python -m experiments

prints the table of every run below experiments/, seeds put together, beside the paper's numbers, and

    python -m experiments --run --work-path experiments/cifar10/vgg19 --lock-method basic horiz --seed 0 1 2 --jobs 3

first trains each combination of work paths, methods, seeds and variants, several at the same time. Any other flag is
handed on to train.py (--epochs 40). The same command goes on after an interruption, and trains nothing twice.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib import image
from matplotlib.figure import Figure
from tqdm import tqdm

import utils
from lockfiles import METHODS
from utils import UserError

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

# arXiv:2002.03793, accuracy in % on the original and on the locked test set of CIFAR-10, after full training.
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


def run(command, threads):
    """Run a command; returns its exit code, and the last line that it printed, or its error."""
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else f"exit code {done.returncode}"


def run_all(args, rest):
    """Run every command, args.jobs at a time; raises UserError where one fails, after all of them."""
    todo = list(commands(args, rest))
    threads = max(1, torch.get_num_threads() // args.jobs)
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run", disable=None) as progress:
        for command, (code, line) in zip(todo, pool.map(lambda command: run(command, threads), todo)):
            failed += code != 0
            progress.write(f"{' '.join(command[3:])}: {line}" if code else line)
            progress.update()
    if failed:
        raise UserError(f"{failed} of {len(todo)} runs failed, see above; the same command runs them again")


# Gather


def gather(folders):
    """The content of every result.json below the folders, put together where only the seed differs.

    Returns a dict from (data set, architecture, method with its parameters, name, epochs) to a list of results.
    """
    groups = {}
    for path in sorted(itertools.chain(*(Path(folder).rglob("result.json") for folder in folders))):
        try:
            result = {**json.loads(path.read_text()), "folder": path.parent}
            method = result["lock_method"]
            method += "".join(
                f" {name} {result[name]:g}" for name in ("alpha", "lambd") if result.get(name, 0.5) != 0.5
            )
            key = result["dataset"], result["architecture"], method, result["name"], result["epochs"]
            groups.setdefault(key, []).append(result)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: not a result of train.py, or damaged; delete it, and run that again") from error
    order = ["", *VARIANTS]
    return dict(sorted(groups.items(), key=lambda item: (item[0][:3], [*order, item[0][3]].index(item[0][3]))))


def spread(values):
    """The mean of some numbers, and their standard deviation where there are several, as text."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(groups):
    """The accuracies of every group, as a table in Markdown."""
    lines = [
        "| data set | model | method | variant | epochs | seeds | original, % | locked, % | paper, original / locked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, architecture, method, name, epochs), results in groups.items():
        original, locked = (spread([result[key] for result in results]) for key in ("orig_acc", "locked_acc"))
        paper = PAPER.get((architecture, method)) if dataset == "cifar10" and not name else None
        theirs = f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else ""
        cells = dataset, architecture, method, name or "plain", epochs, len(results), original, locked, theirs
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(groups, path):
    """Write a picture of the curves: a panel for each model and variant, a colour for each method.

    A line is the mean of the seeds, and the band around it goes from the least to the largest.
    """
    panels = {}
    for key, results in groups.items():
        dataset, architecture, method, name, _ = key
        panels.setdefault(f"{architecture} on {dataset}{name and ', '}{name}", []).append((method, results))
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, members) in zip(axes.flat, panels.items()):
        axis.set(title=title, xlabel="epoch", ylabel="accuracy, %", ylim=(0, 100))
        for index, (method, results) in enumerate(members):
            draw(axis, results, "locked_acc", f"{method}, locked", f"C{index}", "-")
            draw(axis, results, "orig_acc", f"{method}, original", f"C{index}", "--")
        axis.legend(fontsize="small")
    save(figure, path, "--plot")


def draw(axis, results, key, label, color, style):
    """Draw what results have of a key at each epoch that all of them evaluated."""
    curves = [{record["epoch"]: record[key] for record in result["history"]} for result in results]
    epochs = sorted(set.intersection(*map(set, curves)))
    values = [[curve[epoch] for curve in curves] for epoch in epochs]
    axis.plot(epochs, [mean(value) for value in values], style, color=color, label=label)
    axis.fill_between(
        epochs, [min(value) for value in values], [max(value) for value in values], color=color, alpha=0.2
    )


def show(groups, path):
    """Write a picture of the images that the runs of each lock method saw: originals, locked, and the difference."""
    folders = {method: results[0]["folder"] for (*_, method, _, _), results in reversed(groups.items())}
    figure = Figure(figsize=(10, 3.2 * len(folders)), layout="constrained")
    for axis, (method, folder) in zip(figure.subplots(len(folders), squeeze=False)[:, 0], reversed(folders.items())):
        axis.set_axis_off()
        axis.set_title(f"{method}: originals, locked images, ten times the difference", loc="left")
        axis.imshow(image.imread(Path(folder, "images.png")))
    save(figure, path, "--images")


def save(figure, path, flag):
    """Write a figure; raises UserError, naming the flag, where the path's suffix is no picture's."""
    try:
        figure.savefig(path, dpi=100)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {utils.first_line(error)}") from error


def parse_arguments():
    """The arguments, and the flags for train.py."""
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--work-path", nargs="+", default=["experiments"], help="folders of experiments (default: all)")
    add("--plot", metavar="FILE", help="also draw the curves, into this PNG, PDF or SVG file")
    add("--images", metavar="FILE", help="also show the images that each lock method made, in this file")
    add("--run", action="store_true", help="first train what is not trained yet")
    add("--lock-method", nargs="+", choices=[*METHODS, "all"], default=[None], help="default: that of config.yaml")
    add("--seed", nargs="+", type=utils.number(int, 0, 2**63), default=[None], help="default: that of config.yaml")
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
    for name, known in {"lock_method": METHODS, "variant": VARIANTS}.items():
        given = getattr(args, name)
        setattr(args, name, list(known) if "all" in given else list(dict.fromkeys(given)))
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
    utils.run_command(main, if_interrupted="the same command goes on from here")
