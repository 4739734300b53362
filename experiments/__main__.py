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
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev
from textwrap import wrap
from threading import Event

import numpy as np
import torch
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import utils
from config import CONFIG, FREE_ON_RESUME
from data import canonical_name
from methods import METHODS, parameters_of
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
# What costs accuracy even without a lock has a control, which tells how much.
VARIANTS |= {
    f"control_{name}": {**VARIANTS["control"], **keys}
    for name, keys in VARIANTS.items()
    if any(key.startswith(("preprocess.", "adversarial.")) for key in keys)
}

# From the README of the authors' code: accuracy in % on the original and on the locked test set of CIFAR-10.
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
        for name in parameters_of([method] if method else []):
            command += [f"--{name}", str(value)] if (value := getattr(args, name)) is not None else []
        command += ["--seed", str(seed)] if seed is not None else []
        command += ["--name", variant] if variant != "plain" else []
        for key, value in VARIANTS[variant].items():
            command += [f"--{key}", str(value)]
        yield command + rest


def run(command, slots, threads, running, stopped):
    """Run a command, and keep its process in the list running meanwhile; returns its exit code and what to tell of it.

    Meanwhile it holds a slot from the queue: it computes on the GPU of that number, modulo their count, or on a CPU
    with so many threads. Once the event stopped is set, nothing goes on that was just being started.
    """
    slot = slots.get()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    options["env"] = {"OMP_NUM_THREADS": str(threads), **os.environ, "LOCAL_RANK": str(slot)}
    try:
        with subprocess.Popen(command, **options) as child:
            running.append(child)
            if stopped.is_set():
                child.terminate()
            out, error = child.communicate()
            running.remove(child)
    finally:  # or, where no process can be started, the next run would wait for the number forever
        slots.put(slot)
    said = (error if child.returncode else out).strip()
    if not said or child.returncode < 0:  # killed: whatever it said before, that was not why
        return child.returncode, f"exit code {child.returncode}"
    # exit code 1 is an error that nobody foresaw: tell all that is known of it; of any other, the last line
    return child.returncode, said if child.returncode == 1 else said.splitlines()[-1]


def run_all(args, rest):
    """Run every command, args.jobs at a time; raises UserError where one fails, after all of them."""
    todo, running, stopped, failed = list(commands(args, rest)), [], Event(), 0
    jobs = min(args.jobs, len(todo))
    slots, threads = SimpleQueue(), max(1, torch.get_num_threads() // jobs)
    for slot in range(jobs):
        slots.put(slot)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), unit="run", disable=None) as progress:
        try:
            futures = {pool.submit(run, command, slots, threads, running, stopped): command for command in todo}
            for future in as_completed(futures):
                code, line = future.result()
                failed += code != 0
                progress.write(f"{shlex.join(futures[future][2:])}: {line}" if code else line)
                progress.update()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(running):
                child.terminate()  # its checkpoints are whole at any time
            raise
    if failed:
        raise UserError(f"{failed} of {len(todo)} runs failed, see above; the same command tries them again")


# Gather


def find_results(folder):
    """The real path of every result.json below a folder; links are followed, and no folder is looked at twice."""
    seen = set()
    for root, subfolders, files in os.walk(folder, followlinks=True):
        root = os.path.realpath(root)
        if root in seen:
            subfolders.clear()
        elif "result.json" in files:
            yield Path(root, "result.json")
        seen.add(root)


def read_result(path):
    """The content of a result.json, with what a table and a plot need of it; raises UserError where it is damaged."""
    remedy = "take it away, and train.py --resume writes it again (by a new training, if its checkpoints are gone)"
    with utils.telling_damage(lambda _: f"{path}: not a result of train.py, or damaged; {remedy}"):
        result = {**json.loads(path.read_text()), "folder": path.parent}
        result["dataset"] = canonical_name(result["dataset"])
        result.update({key: float(result[key]) for key in ("locked_acc", "orig_acc")})
        # of the run whose weights it began with the seed does not count: it may be its own, or the same for all seeds
        result["config"]["pretrained"] = re.sub(r"\bseed\d+\b", "seed*", result["config"].get("pretrained", ""))
        result["method"] = method_of(result)
        result["settings"] = settings_of(result)
        # but for the seed, what makes it this run; :s and :d refuse values of other types
        same = "{dataset} {architecture:s} {method} {name:s} {epochs:d}".format(**result)
        result["group"] = json.dumps([same, result["settings"]], sort_keys=True)
        result["id"] = json.dumps([result["seed"], result["history"]])
        result["curves"] = {
            key: {int(record["epoch"]): float(record[key]) for record in result["history"]}
            for key in ("locked_acc", "orig_acc")
        }
        result["max_orig_acc"] = max(result["curves"]["orig_acc"].values())
        result["lock_name"] = lock_of(result)
        result["paper"] = paper_accuracies(result)
        result["training"] = training_of(result)
        return result


def gather(folders):
    """Every result.json below the folders, as read_result, put together where only the seed differs.

    Returns a list of lists of results. Copies of a result count once.
    """
    groups = {}
    for path in sorted({path for folder in folders for path in find_results(folder)}):
        result = read_result(path)
        groups.setdefault(result["group"], {})[result["id"]] = result
    found = sorted(([*group.values()] for group in groups.values()), key=place_in_table)
    columns = "dataset", "architecture", "method", "name", "lock_name", "epochs"
    rows = [tuple(group[0][column] for column in columns) for group in found]
    for group, difference in zip(found, tell_apart(rows, [group[0]["settings"] for group in found])):
        for result in group:
            result["label"] = ", ".join(filter(None, [result["name"] or "plain", difference]))
    return found


def settings_of(result):
    """What makes a run another one, but for the seed, as a flat dict: the keys of its config that are not as by
    default, and the settings of its lock; a lock without a manifest is known by its path."""
    free = FREE_ON_RESUME - {"eval_freq"}  # the largest accuracy on the way is one of so many
    defaults = flatten(CONFIG)
    config = {
        key: value
        for key, value in flatten(result["config"]).items()
        if key not in ("seed", "dataset")  # cifar and cifar10 are one
        if key not in free or (key == "locked_train_image" and not result["lock"])
        if value != defaults.get(key)  # a run that is older than a key has none
    }
    return config | flatten({"lock": result["lock"]["settings"]} if result["lock"] else {})


def training_of(result):
    """What a training was, but for its lock, seed and precision, and for what has no control of its own."""
    free = FREE_ON_RESUME | {"seed", "precision", *VARIANTS["cutout"], *VARIANTS["mixup"], *VARIANTS["cutmix"]}
    config, lock = flatten(CONFIG) | flatten(result["config"]), result["lock"]
    training = {key: value for key, value in config.items() if key not in free} | {"dataset": result["dataset"]}
    if lock:
        return training | flatten({"original_sha256": lock["settings"]["original_sha256"]["train"]})
    return training | {"orig_data_path": config["orig_data_path"]}


def tell_apart(names, settings):
    """For each name, in which of its settings, a flat dict, it differs from others of that name, as text; '' where it
    is the only one. Hashes, and more than 40 characters, are shown only where nothing less tells them apart."""
    added = [""] * len(names)
    for name in set(names):
        members = [index for index, other in enumerate(names) if other == name]
        ours = [settings[index] for index in members]
        keys = dict.fromkeys(itertools.chain(*ours))
        differing = [key for key in keys if any(one.get(key) != ours[0].get(key) for one in ours)]
        readable = [key for key in differing if "sha256" not in key]
        for shown, width in (readable, 40), (readable, None), (differing, 8), (differing, None):
            texts = [", ".join(f"{key} {str(one[key])[:width]}" for key in shown if key in one) for one in ours]
            if len(set(texts)) == len(members):
                break
        for index, text in zip(members, texts):
            added[index] = text
    return added


def method_of(result):
    """The lock method of a result, and the parameters that differ from the paper's."""
    parameters = [f" {name} {result[name]:g}" for name in ("alpha", "lambd") if result.get(name, 0.5) != 0.5]
    return result["lock_method"] + "".join(parameters)


def lock_of(result):
    """The base classifier of a result's lock, with the start of its checkpoint's SHA-256, eps, steps, and how many
    images it has to train on."""
    if not result["lock"]:
        return "no manifest"
    settings = "{arch:s} {base_sha256:.7s}, eps {eps:g}, {attack_steps} steps".format(**result["lock"]["settings"])
    return f"{settings}, {result['lock']['report']['train']['images']} images"


def place_in_table(group):
    """What groups are sorted by: methods and variants in their orders, plain runs first, and any other name last."""
    first = group[0]
    methods, names = [*METHODS, first["lock_method"]], ["", *VARIANTS, first["name"]]
    order = methods.index(first["lock_method"]), first["method"], names.index(first["name"])
    return first["dataset"], first["architecture"], *order


def paper_accuracies(result):
    """The paper's accuracies for a result's model and method; None where it has none, and for a run with a name,
    pretrained weights, enlarged images, a key of VARIANTS, another eps, or a subset. The base classifier, steps and
    other keys, as epochs, may be others."""
    others = result["settings"].keys() & {"pretrained", "enlarge", "subset", *itertools.chain(*VARIANTS.values())}
    lock = result["lock"]["settings"] if result["lock"] else {"eps": 0.5, "subset": None}
    if result["dataset"] != "cifar10" or result["name"] or others or lock["eps"] != 0.5 or lock["subset"]:
        return None
    return PAPER.get((result["architecture"], result["method"]))


def mean_std(values):
    """The mean of some numbers, and their standard deviation where there are several, as text."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(groups):
    """The accuracies of every group, as a table in Markdown: after the last epoch, and the best on original images on
    the way, which is what stopping there would have given."""
    columns = "data set", "model", "method", "variant", "lock", "epochs", "runs", "original, %"
    columns += "best original, %", "locked, %", "paper, original / locked"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups:
        first, paper = group[0], group[0]["paper"]
        cells = [first[key] for key in ("dataset", "architecture", "method", "label", "lock_name", "epochs")]
        cells.append(len(group))
        cells += [mean_std([result[key] for result in group]) for key in ("orig_acc", "max_orig_acc", "locked_acc")]
        cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def control_of(result, groups):
    """The group that was trained as a result was, but on original images, whatever lock it was tested on; None where
    there is no such group, or where the result is a control itself."""
    wanted = result["training"] | VARIANTS["control"]
    return next((group for group in groups if result["training"] != wanted == group[0]["training"]), None)


# Pictures


def panels_of(groups):
    """Yields (title, groups) for each panel of a picture of curves: the groups of one model, training and lock.

    A control that is drawn beside what it controls has no panel of its own.
    """
    panels, used = {}, [control[0]["training"] for group in groups if (control := control_of(group[0], groups))]
    for group in groups:
        first = group[0]
        if first["training"] not in used:
            name = "{architecture} on {dataset}, {label}".format(**first), first["lock_name"], first["epochs"]
            panels.setdefault((name, json.dumps(first["training"], default=str)), []).append(group)
    trainings = [members[0][0]["training"] for members in panels.values()]
    differences = tell_apart([name for name, _ in panels], trainings)
    for (((model, lock, _), _), members), difference in zip(panels.items(), differences):
        title = "\n".join(wrap(", ".join(filter(None, [model, difference])), 52))
        yield f"{title}\nlock: {lock}", members


def plot_curves(groups, path):
    """Write a picture of the curves: a panel for each model, training and lock, a colour for each method, and in grey
    what a control of that training, if there is one, comes to on original images. Other controls have panels, too.

    A line is the mean of the seeds, and the band around it goes from the least to the largest.
    """
    panels = list(panels_of(groups))
    methods = dict.fromkeys(group[0]["method"] for _, members in panels for group in members)
    colors = {method: f"C{index}" for index, method in enumerate(methods)}
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(4 * columns, 6.5), 3 * rows + 0.5), layout="constrained")
    figure.suptitle("Accuracy on locked test images (solid) and on original ones (dashed), %")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    lines = {}
    for axis, (title, members) in zip(axes.flat, panels):
        axis.set_title(title, fontsize="small", parse_math=False)
        axis.set(xlabel=f"epoch, of {members[0][0]['epochs']}", ylim=(0, 100))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        control = control_of(members[0][0], groups)
        if control:
            lines["control: trained on original images"] = draw(axis, control, "orig_acc", "grey", "--")
        for group in members:
            draw(axis, group, "orig_acc", colors[group[0]["method"]], "--")
            lines[group[0]["method"]] = draw(axis, group, "locked_acc", colors[group[0]["method"]], "-")
    legend = figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    with utils.naming(path):
        figure.savefig(path, dpi=100)


def draw(axis, results, key, color, style):
    """Draw what results have of a key at each epoch that all of them evaluated; returns the line."""
    curves = [result["curves"][key] for result in results]
    epochs = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])  # [results, epochs]
    marker = "." if len(epochs) == 1 else None
    axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2)
    return axis.plot(epochs, values.mean(0), style, color=color, marker=marker)[0]


def images_by_lock(groups):
    """What the runs of each lock saw, by the name of the lock, as pictures [height, width, colours] of rows of images:
    the originals, unless they are those of the lock above, locked images, and the difference.

    A run that saw them preprocessed counts only where there is no other. Raises UserError for a damaged picture.
    """
    locks, found, originals = {}, {}, None
    for group in sorted(groups, key=lambda group: any(key.startswith("preprocess.") for key in group[0]["settings"])):
        name = "{dataset}, {method} ({lock_name})".format(**group[0])
        # lock.eps and so on, or locked_train_image where there is no manifest
        settings = {key: value for key, value in group[0]["settings"].items() if key.startswith("lock")}
        file = next((file for result in group if (file := result["folder"] / "images.png").exists()), None)
        if file:
            locks.setdefault(json.dumps([name, settings], sort_keys=True), (name, settings, file))
    locks = list(locks.values())
    differences = tell_apart([name for name, _, _ in locks], [settings for _, settings, _ in locks])
    for (name, _, file), difference in zip(locks, differences):
        with utils.telling_damage(lambda _: f"{file}: damaged; delete it, and train.py --resume writes it again"):
            rows = image.imread(file)
        height = len(rows) // 3
        repeated = originals is not None and np.array_equal(originals, rows[:height])
        originals = rows[:height]
        found[", ".join(filter(None, [name, difference]))] = rows[height:] if repeated else rows
    return found


def plot_images(groups, path):
    """Write a picture of the images that the runs of each lock saw."""
    found = images_by_lock(groups)
    if not found:
        raise UserError("--images: there is no images.png beside any result.json; train.py writes it")
    heights = [len(rows) / rows.shape[1] for rows in found.values()]
    figure = Figure(figsize=(10, 10 * sum(heights) + 0.3 * len(heights) + 0.4), layout="constrained")
    figure.suptitle("Originals; for each lock, its images and ten times the difference")
    axes = figure.subplots(len(found), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, found.items()):
        axis.set_axis_off()
        axis.set_title(title, loc="left", fontsize="medium", parse_math=False)
        axis.imshow(rows)
    with utils.naming(path):
        figure.savefig(path, dpi=100)


# The command line


def picture_path(text):
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
    add("--plot", type=picture_path, metavar="FILE", help="also draw the curves, into this PNG, PDF or SVG file")
    add("--images", type=picture_path, metavar="FILE", help="also show the images that each lock made, in this file")
    add("--run", action="store_true", help="first train what is not trained yet")
    add("--lock-method", nargs="+", choices=[*METHODS, "all"], default=[None], help="default: that of config.yaml")
    for name in ("alpha", "lambd"):
        add(f"--{name}", type=utils.number(float, 0, 1), help=f"lock.py's --{name}, for methods that it is for")
    add("--seed", nargs="+", type=utils.parse_seed, default=[None], help="default: that of config.yaml")
    add(
        "--variant",
        nargs="+",
        choices=[*VARIANTS, "all"],
        default=["plain"],
        metavar="NAME",
        help=f"all, or some of {', '.join(VARIANTS)}: as the paper trains, on originals as a control, or against the "
        "lock (default: plain)",
    )
    add("--jobs", type=utils.number(int, 1, 1000), default=1, help="runs at the same time (default: %(default)s)")
    return complete_arguments(*parser.parse_known_args())


def complete_arguments(args, rest):
    """The arguments with lists of what is to be run, and the flags for train.py; raises UserError where some do not go
    together."""
    if rest and not args.run:
        raise UserError(f"unknown flag {rest[0]}; flags of train.py go with --run")
    if args.run and args.work_path == ["experiments"]:
        raise UserError("--run needs --work-path: the folders of the experiments to run")
    flags = [given.partition("=")[0] for given in rest if given.startswith("--")]
    for flag in ("--name", "--resume", "--overwrite"):
        if flag in flags:
            raise UserError(
                f"{flag}: --run names its runs by variant, and goes on with them; leave it out (a run whose folder you "
                "delete starts again)"
            )
    # a folder that is named twice is one: two runs cannot write to it
    args.work_path = list({os.path.realpath(path): path for path in args.work_path}.values())
    for name, known in {"lock_method": METHODS, "variant": VARIANTS, "seed": []}.items():
        given = getattr(args, name)
        setattr(args, name, list(known if "all" in given else dict.fromkeys(given)))
    for name in ("alpha", "lambd"):
        if getattr(args, name) is not None and name not in parameters_of(filter(None, args.lock_method)):
            raise UserError(f"--{name}: name a --lock-method that it is for, or leave it out")
    for flag in flags:
        variant = next((name for name in args.variant if flag.removeprefix("--") in VARIANTS[name]), None)
        if variant:
            raise UserError(f"{flag}: --variant {variant} sets it; leave it out, or use train.py with a --name")
    return args, rest


def main():
    args, rest = parse_arguments()
    if args.run:
        run_all(args, rest)
    for folder in args.work_path:
        if not Path(folder).is_dir():
            raise UserError(f"--work-path {folder}: no such folder")
    groups = gather(args.work_path)
    if not groups:
        where = " (--work-path results shows what was measured for the README)"
        here = where if args.work_path == ["experiments"] else ""
        raise UserError(f"{', '.join(args.work_path)}: holds no result.json; run train.py, or --run{here}")
    print(table(groups))
    if args.plot:
        plot_curves(groups, args.plot)
    if args.images:
        plot_images(groups, args.images)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends what is running
    utils.run_command(main, if_interrupted="the same command goes on from here")
