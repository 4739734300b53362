"""What experiments found: every result.json, seeds put together, and the table of them beside the paper's numbers."""

import itertools
import json
import os
import re
from pathlib import Path
from statistics import mean, stdev

import utils
from config import DEFAULTS, FREE_ON_RESUME
from data import canonical_name
from experiments.variants import VARIANTS
from methods import METHODS, PARAMETERS
from utils import flatten

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


# What of a training its control may be without, and the keys that tell how it is done
AUGMENTATIONS = {
    "augmentation.cutout": ("augmentation.holes", "augmentation.length"),
    "mixup": ("mixup_alpha",),
    "cutmix": ("cutmix_alpha",),
}


def find_results(folder):
    """The real path of every result.json below a folder; links are followed, and no folder is looked at twice. Raises
    OSError where one cannot be read."""

    def unreadable(error):
        if not isinstance(error, FileNotFoundError):  # which train.py --overwrite has deleted meanwhile
            raise error

    seen = set()
    for root, subfolders, files in os.walk(folder, onerror=unreadable, followlinks=True):
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
        result = {**json.loads(utils.read_file(path)), "folder": path.parent}
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

    Returns a list of lists of results. Copies of a result count once, one with its picture rather than one without.
    """
    groups = {}
    for path in sorted({path for folder in folders for path in find_results(folder)}):
        result = read_result(path)
        copies = groups.setdefault(result["group"], {})
        if result["id"] not in copies or (path.parent / "images.png").exists():
            copies[result["id"]] = result
    found = sorted(([*group.values()] for group in groups.values()), key=place_in_table)
    columns = "dataset", "architecture", "method", "name", "lock_name", "epochs"
    rows = [tuple(group[0][column] for column in columns) for group in found]
    for group, difference in zip(found, tell_apart(rows, [group[0]["settings"] for group in found])):
        for result in group:
            result["label"] = ", ".join(filter(None, [result["name"] or "plain", difference]))
    return found


def settings_of(result):
    """What makes a run another one, but for the seed, as a flat dict: the keys of its config that are not as by
    default, and the settings of its lock. Of a lock without a manifest, its path and the hash of all data are known."""
    free = FREE_ON_RESUME - {"eval_freq"}  # the largest accuracy on the way is one of so many
    config = {
        key: value
        for key, value in flatten(result["config"]).items()
        if key not in ("seed", "dataset")  # cifar and cifar10 are one
        if key not in free or (key == "locked_train_image" and not result["lock"])
        if value != DEFAULTS.get(key)  # a run that is older than a key has none
    }
    if result["lock"]:
        return config | flatten({"lock": result["lock"]["settings"]})
    return config | ({"data_sha256": result["data_sha256"]} if "data_sha256" in result else {})


def training_of(result):
    """What a training was, but for its lock, seed and precision. Of the AUGMENTATIONS it has only those that are on."""
    free = FREE_ON_RESUME | {"seed", "precision", *AUGMENTATIONS, *itertools.chain(*AUGMENTATIONS.values())}
    config, lock = DEFAULTS | flatten(result["config"]), result["lock"]
    training = {key: value for key, value in config.items() if key not in free} | {"dataset": result["dataset"]}
    training |= {key: [config[how] for how in keys] for key, keys in AUGMENTATIONS.items() if config[key]}
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
    parameters = [f" {name} {result[name]:g}" for name, usual in PARAMETERS.items() if result.get(name, usual) != usual]
    return result["lock_method"] + "".join(parameters)


def lock_settings(result):
    """What a result's lock is, as a flat dict: its settings, or where it has no manifest, where its files lie."""
    return {key: value for key, value in result["settings"].items() if key.startswith("lock")}


def same_lock(one, other):
    """Whether two results are of the same lock."""
    return lock_settings(one) == lock_settings(other)


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
    the way, which is what stopping there would have given; and those of its control."""
    columns = "data set", "model", "method", "variant", "lock", "epochs", "runs", "original, %"
    columns += "best original, %", "locked, %", "control, original / locked", "paper, original / locked"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups:
        first, paper = group[0], group[0]["paper"]
        cells = [first[key] for key in ("dataset", "architecture", "method", "label", "lock_name", "epochs")]
        cells.append(len(group))
        cells += [mean_std([result[key] for result in group]) for key in ("orig_acc", "max_orig_acc", "locked_acc")]
        cells.append(control_accuracies(first, groups))
        cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        lines.append(f"| {' | '.join(utils.printable(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def control_of(result, groups):
    """The group that was trained as a result was, but on original images, perhaps without its AUGMENTATIONS; None where
    there is no such group, or where the result is a control itself. Of several, the first by what counts most: that it
    was tested on the same lock, has the same AUGMENTATIONS, the same precision."""
    wanted = result["training"] | VARIANTS["control"]
    if wanted == result["training"]:  # it is a control itself
        return None

    def is_control(other):
        lacking = wanted.keys() - other["training"].keys()
        return other["training"].items() <= wanted.items() and lacking <= AUGMENTATIONS.keys()

    def likeness(group):
        other = group[0]
        same_precision = other["config"].get("precision") == result["config"].get("precision")
        return same_lock(other, result), other["training"] == wanted, same_precision

    return max((group for group in groups if is_control(group[0])), key=likeness, default=None)


def control_accuracies(result, groups):
    """The accuracies of a result's control, as text: on original images, and where it was tested on the same lock, on
    locked ones; '' without a control."""
    control = control_of(result, groups)
    if not control:
        return ""
    keys = ("orig_acc", "locked_acc") if same_lock(control[0], result) else ("orig_acc",)
    return " / ".join(mean_std([each[key] for each in control]) for key in keys)
