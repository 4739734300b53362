"""What lock.py, train.py and models/base.py share: user errors, data sets, locked files, config files, devices."""

import argparse
import difflib
import math
import os
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml
from easydict import EasyDict
from torchvision.datasets import CIFAR10

from models import MODELS

SPLITS = ("train", "test")


# User errors


class UserError(Exception):
    """A mistake of the user's. The message is one line: the file, key or flag, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of a script's docstring, whose errors are UserErrors, and that takes no abbreviated flags."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf):
    """A converter of a flag's text to a finite number, int or float, from low to high."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError
        return value

    parse.__name__ = f"number from {low}" + (f" to {high}" if high < math.inf else "")  # argparse shows it
    return parse


def run_command(main, if_interrupted="nothing more was written"):
    """Call main(); a mistake of the user's becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"interrupted: {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, torch.cuda.OutOfMemoryError) as error:
        message = "the GPU's memory is full; take smaller batches" if isinstance(error, RuntimeError) else error
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def check_known(name, known, what):
    """Raise UserError, listing the known names, where name is none of them; what says where it stands."""
    if name not in known:
        raise UserError(f"{what}: unknown name '{name}'; known are {', '.join(known)}")


def did_you_mean(word, known):
    """'; did you mean ...?' with the nearest of the known words, or nothing where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


# Data sets


class Dataset(NamedTuple):
    """load(root, train) returns images uint8 [N, 3, H, W] and labels int64 [N].

    mean and std are those of the training set's pixels in [0, 1], a number for each channel.
    """

    load: callable
    mean: tuple
    std: tuple


def load_cifar10(root, train):
    """CIFAR-10 (Krizhevsky, 2009), in the order of its batch files; raises UserError where it is absent or damaged."""
    try:
        data = CIFAR10(root, train=train)
    except RuntimeError as error:  # torchvision checks every file's MD5
        raise UserError(
            f"{root}: CIFAR-10 is not there, or a file of it is damaged; download it with "
            f"python -c \"from torchvision.datasets import CIFAR10; CIFAR10('{root}', download=True)\""
        ) from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def load_digits(root, train):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels enlarged to 3x32x32; the last 360 are the test set.

    They come inside scikit-learn (from UCI's Optical Recognition of Handwritten Digits): root is not read.
    """
    from sklearn import datasets  # here, because only this data set needs it, and it is slow to import

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).reshape(-1, 1, 8, 8)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    part = slice(None, -360) if train else slice(-360, None)
    return to_uint8(images)[part], torch.from_numpy(labels)[part].long()


CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
DIGITS_STATISTICS = (0.3054,) * 3, (0.3228,) * 3  # of the training set, after enlarging

DATASETS = {
    "cifar": Dataset(load_cifar10, *CIFAR_STATISTICS),  # robustness' name for it
    "cifar10": Dataset(load_cifar10, *CIFAR_STATISTICS),  # CIFAR-ZOO's
    "digits": Dataset(load_digits, *DIGITS_STATISTICS),
}


def to_uint8(images):
    """Pixels in [0, 1], any shape, to the nearest of 0..255."""
    return (images * 255).round().to(torch.uint8)


def to_float(images):
    """uint8 pixels, any shape, to float32 in [0, 1]."""
    return images.float() / 255


# Locked files

# The lock methods, and the parameters that each reads, in the order in which a file's name gives them.
LOCK_METHODS = {"basic": (), "mixup": ("lambd",), "horiz": ("alpha",), "mixandcat": ("alpha", "lambd")}


def lock_suffix(method, alpha=0.5, lambd=0.5):
    """The end of a locked file's name: the original's basic, 50_mixup, 50_horiz and mixandcat.

    The original's mixandcat carries neither parameter; here it does where one differs from 0.5,
    as 30_50_mixandcat for alpha 0.3, so that two such locks never share a name.
    """
    values = {"alpha": alpha, "lambd": lambd}
    percents = [f"{100 * values[name]:.12g}" for name in LOCK_METHODS[method]]  # int(100 * 0.29) would be 28
    if method == "mixandcat" and percents == ["50", "50"]:
        percents = []
    return "_".join([*percents, method])


def parse_suffix(suffix):
    """The method and its parameters, by name, from the end of a locked file's name."""
    *percents, method = suffix.split("_")
    return method, {name: float(percent) / 100 for name, percent in zip(LOCK_METHODS.get(method, ()), percents)}


def locked_path(folder, split, kind, suffix):
    """Path of a locked file; split is train or test, kind image or label."""
    return Path(folder) / f"{split}_{kind}_{suffix}"


def load_locked(image_path, label_path, lock_flags=""):
    """Locked images uint8 [N, 3, H, W] and labels int64 [N], from a pair of files.

    Reads what lock.py writes, and the original's lists of float32 batches in [0, 1], which are rounded to
    the nearest 8-bit value. Raises UserError naming the file where one is absent, damaged or does not fit.
    lock_flags, such as " --dataset digits", go into the command that the error names.
    """
    images, labels = read_tensors(image_path, lock_flags), read_tensors(label_path, lock_flags)
    if images.is_floating_point():
        rounding = 0.5 / 255
        if not ((images > -rounding) & (images < 1 + rounding)).all():
            raise UserError(f"{image_path}: images of floats must lie in [0, 1]; lock again")
        images = to_uint8(images)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise UserError(f"{image_path}: expected images [N, 3, H, W], found {images.dtype} {list(images.shape)}")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8) or labels.dim() != 1:
        raise UserError(f"{label_path}: expected labels [N], found {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise UserError(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels: lock again")
    return images, labels.long()


def read_tensors(path, lock_flags=""):
    """One tensor, from a file that holds a list of tensors; never unpickles anything but tensors."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make it with {lock_command(path)}{lock_flags}")
    try:
        return torch.cat(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises several kinds for a damaged file; all mean the same here
        raise UserError(f"{path}: not a list of tensors, or damaged ({first_line(error)}); lock again") from error


def lock_command(path):
    """The lock.py command that makes a locked file, as its name tells."""
    method, parameters = parse_suffix("_".join(Path(path).name.split("_")[2:]) or "basic")
    flags = "".join(f" --{name} {value:g}" for name, value in parameters.items() if value != 0.5)
    return f"python lock.py --lock-data {Path(path).parent} --lock-method {method}{flags}"


def write_file(path, save):
    """Call save(file) on a temporary file beside path, and put it in path's place when it is wholly on the disk."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path):
    """Make a folder that files can be written to; raises OSError where that cannot be."""
    Path(path).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def first_line(error):
    """What an error says, short enough for a line."""
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0][:150]


# Config files

# Every key of a config.yaml with its default; where that is a type, the file must give the key.
# The keys are CIFAR-ZOO's and the original's, seed is new.
CONFIG = {
    "architecture": str,
    "dataset": str,
    "orig_data_path": str,
    "locked_train_image": "./data/train_image_basic",
    "locked_train_label": "./data/train_label_basic",
    "locked_test_image": "./data/test_image_basic",
    "locked_test_label": "./data/test_label_basic",
    "ckpt_path": "./",
    "ckpt_name": "ckpt",
    "num_classes": 10,
    "use_gpu": True,
    "input_size": 32,
    "epochs": 250,
    "batch_size": 128,
    "test_batch": 200,
    "eval_freq": 2,
    "workers": 4,
    "seed": 0,
    "optimize": {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    "mixup": False,
    "mixup_alpha": 0.4,
    "augmentation": {
        "normalize": False,
        "random_crop": True,
        "random_horizontal_filp": True,  # the original's spelling
        "cutout": False,
        "holes": 1,
        "length": 8,
    },
    "lr_scheduler": {
        "type": "STEP",
        "base_lr": 0.1,
        "lr_epochs": [100, 150, 200],
        "lr_mults": 0.1,
        "min_lr": 0.0,
        "lower_bound": -6.0,
        "upper_bound": 3.0,
    },
}
# What train.py --help says of them.
CONFIG_HELP = {
    "architecture": "one of models/, as preresnet110",
    "dataset": "cifar10 or digits",
    "orig_data_path": "folder of the original data set",
    "locked_train_image": "locked file",
    "locked_train_label": "locked file",
    "locked_test_image": "locked file",
    "locked_test_label": "locked file",
    "ckpt_path": "folder of the checkpoints, below the run's",
    "ckpt_name": "name of the checkpoints, without .pth.tar",
    "num_classes": "number of classes",
    "use_gpu": "train on the GPU, if there is one",
    "input_size": "side of the images in pixels",
    "epochs": "passes over the training set",
    "batch_size": "images in a training step",
    "test_batch": "images evaluated at once",
    "eval_freq": "evaluate every VALUE epochs, at the first and at the last",
    "workers": "accepted, not used: images stay on the device",
    "seed": "seed of weights, order and augmentation",
    "optimize.momentum": "of SGD",
    "optimize.weight_decay": "of SGD",
    "optimize.nesterov": "Nesterov's momentum",
    "mixup": "blend training images in pairs",
    "mixup_alpha": "of the blend's Beta distribution",
    "augmentation.normalize": "subtract the data set's mean, divide by its standard deviation",
    "augmentation.random_crop": "crop out of the image padded by 4 zeros",
    "augmentation.random_horizontal_filp": "mirror half of the images",
    "augmentation.cutout": "blank out squares",
    "augmentation.holes": "squares an image",
    "augmentation.length": "side of a square in pixels",
    "lr_scheduler.type": "STEP, COSINE or HTD",
    "lr_scheduler.base_lr": "learning rate at the start",
    "lr_scheduler.lr_epochs": "STEP: epochs at which it drops, as [100, 150, 200]",
    "lr_scheduler.lr_mults": "STEP: factor of a drop",
    "lr_scheduler.min_lr": "COSINE, HTD: learning rate at the end",
    "lr_scheduler.lower_bound": "HTD: where on the tanh it starts",
    "lr_scheduler.upper_bound": "HTD: where on the tanh it ends",
}
ALIASES = {"data_path": "orig_data_path"}  # CIFAR-ZOO's name: ours


def flatten(tree, prefix=""):
    """{'a': {'b': 1}} as {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def load_config(path, overrides):
    """Read a config.yaml over the defaults; overrides maps flat keys ('optimize.momentum') to strings.

    Returns an EasyDict with every key of CONFIG. Raises UserError naming the file and the key for an unknown
    key, a value that the key cannot have, and a key that is missing.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; the work path is a folder with a config.yaml")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, like 'epochs: 250'")
    defaults, config = flatten(CONFIG), EasyDict(deepcopy(CONFIG))
    given = {ALIASES.get(key, key): (value, path) for key, value in flatten(content).items()}
    for key, text in overrides.items():
        # text stays text where text is wanted: a folder named 1e3 is no number
        as_text = defaults[key] is str or isinstance(defaults[key], str)
        given[key] = (text if as_text else parse_value(text), f"--{key}")
    for key, (value, where) in given.items():
        if isinstance(CONFIG.get(key), dict):
            raise UserError(f"{where}: {key}: expected keys below it, like {', '.join(CONFIG[key])}")
        if key not in defaults:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(key, defaults)}")
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = convert(value, defaults[key], f"{where}: {key}")
    missing = [key for key, default in defaults.items() if default is str and key not in given]
    if missing:
        raise UserError(f"{path}: the key '{missing[0]}' is missing")
    check_values(config, path)
    return config


def parse_value(text):
    """The YAML value of a flag, or the text itself where it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def convert(value, default, where):
    """value as the type of default; raises UserError where it is of another type."""
    kind = default if isinstance(default, type) else type(default)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, which has no dot, as text
        except ValueError:
            pass
    wrong_item = kind is list and isinstance(value, list) and any(type(item) is not int for item in value)
    if type(value) is not kind or wrong_item:
        names = {str: "text", int: "a whole number", float: "a number", bool: "True or False", list: "a list of epochs"}
        raise UserError(f"{where}: expected {names[kind]}, found {value!r}")
    return value


# The least and the largest value of each key that is a number.
MANY = 10**9
RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "test_batch", "eval_freq", "input_size", "num_classes"), (1, MANY)),
    **dict.fromkeys(("mixup_alpha", "optimize.weight_decay", "augmentation.holes", "augmentation.length"), (0, MANY)),
    **dict.fromkeys(("lr_scheduler.base_lr", "lr_scheduler.min_lr", "lr_scheduler.lr_mults"), (0, MANY)),
    **dict.fromkeys(("lr_scheduler.lower_bound", "lr_scheduler.upper_bound"), (-MANY, MANY)),
    "optimize.momentum": (0, 1),
    "seed": (0, 2**63),
}


def check_values(config, path):
    """Raise UserError where a value of the config is not one that it can have."""
    check_known(config.architecture, MODELS, f"{path}: architecture")
    check_known(config.dataset, DATASETS, f"{path}: dataset")
    check_known(config.lr_scheduler.type, ("STEP", "COSINE", "HTD"), f"{path}: lr_scheduler.type")
    values = flatten(config)
    for key, (low, high) in RANGES.items():
        if not (math.isfinite(values[key]) and low <= values[key] <= high):
            raise UserError(f"{path}: {key} is {values[key]}; it must lie between {low} and {high}")
    if config.optimize.nesterov and config.optimize.momentum == 0:
        raise UserError(f"{path}: optimize.nesterov needs a momentum; set it to False")
    if Path(config.ckpt_name).name != config.ckpt_name:
        raise UserError(f"{path}: ckpt_name is '{config.ckpt_name}'; it must be a file's name, without a folder")


# Devices


def pick_device(use_gpu=True):
    """The device to compute on, and why, as a pair (torch.device, str)."""
    if use_gpu and torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    threads = f"{torch.get_num_threads()} threads"
    return torch.device("cpu"), f"{threads}, no GPU was found" if use_gpu else threads
