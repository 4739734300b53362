"""The keys of a config.yaml: defaults, what they mean, which values they can have, and how a file is read."""

from pathlib import Path
from typing import NamedTuple

import yaml
from easydict import EasyDict

from data import DATASETS, canonical_name
from models import MODELS
from utils import COMPILE, MAX_SEED, PRECISIONS, UserError, check_known, did_you_mean, flatten, nest


class Key(NamedTuple):
    """A key of config.yaml: its default, of the type of its values; the text of --help; what it can be; and whether a
    file or a flag must give it."""

    default: object
    help: str
    low: float = -(10**9)
    high: float = 10**9
    choices: tuple = ()
    required: bool = False


# The keys are CIFAR-ZOO's and the authors', but for seed, precision, compile, cutmix, cutmix_alpha, train_on,
# subset, pretrained, enlarge, preprocess and adversarial, which are new.
KEYS = {
    "architecture": Key("", "one of models/, or torchvision/NAME", choices=tuple(MODELS), required=True),
    "dataset": Key("", "cifar10, digits or folder", choices=tuple(DATASETS), required=True),
    "orig_data_path": Key("", "folder of the original data set", required=True),
    "locked_train_image": Key("./data/train_image_basic", "locked file"),
    "locked_train_label": Key("./data/train_label_basic", "locked file"),
    "locked_test_image": Key("./data/test_image_basic", "locked file"),
    "locked_test_label": Key("./data/test_label_basic", "locked file"),
    "ckpt_path": Key("./", "folder of the checkpoints, below the run's"),
    "ckpt_name": Key("ckpt", "name of the checkpoints, without .pth.tar"),
    "num_classes": Key(10, "number of classes", 1),
    "use_gpu": Key(True, "train on the GPU, if there is one"),
    "input_size": Key(32, "accepted, not used: images tell their size themselves"),
    "epochs": Key(250, "passes over the training set", 1),
    "batch_size": Key(128, "images in a training step", 1),
    "test_batch": Key(200, "images evaluated at once", 1),
    "eval_freq": Key(2, "evaluate every VALUE epochs, and after the first and the last", 1),
    "workers": Key(4, "accepted, not used: images stay on the device"),
    "seed": Key(0, "seed of weights, order and augmentation", 0, MAX_SEED),
    "precision": Key(
        "auto",
        "auto (as begun, or half precision where that is faster), float32, bfloat16 or float16",
        choices=("auto", *PRECISIONS),
    ),
    "compile": Key(
        "auto",
        "auto (long runs on a GPU), always, never: torch.compile; on a GPU also a CUDA graph",
        choices=("auto", *COMPILE),
    ),
    "optimize.momentum": Key(0.9, "momentum of SGD", 0, 1),
    "optimize.weight_decay": Key(1e-4, "weight decay of SGD", 0),
    "optimize.nesterov": Key(True, "Nesterov's momentum"),
    "mixup": Key(False, "blend training images in pairs"),
    # with a smaller alpha, float32 would draw 0.5 instead of 0 or 1
    "mixup_alpha": Key(0.4, "alpha of the Beta distribution of the blending weight", 0.01),
    "cutmix": Key(False, "put a piece of another image into each training image"),
    "cutmix_alpha": Key(1.0, "alpha of the Beta distribution of the piece's area", 0.01),
    "train_on": Key("locked", "locked or original images: a control", choices=("locked", "original")),
    "subset": Key(0, "train on the first VALUE images only; 0: on all", 0),
    "pretrained": Key("", "weights to begin with: a checkpoint of train.py, or a state dict, of this architecture"),
    "enlarge": Key(1, "how many times as high and as wide the model sees images", 1, 16),
    "preprocess.grayscale": Key(False, "take the colours away, in training and test sets"),
    # at most 2, for images of at least 8x8 pixels
    "preprocess.blur": Key(0.0, "standard deviation in pixels of a Gaussian blur, in training and test sets", 0, 2),
    "preprocess.bits": Key(8, "bits kept of each colour channel, in training and test sets", 1, 8),
    "preprocess.jpeg_quality": Key(0, "compress by JPEG of this quality, in training and test sets; 0: do not", 0, 100),
    "adversarial.eps": Key(0.0, "adversarial training: L2 radius, in pixels of [0, 1]; 0: none", 0),
    "adversarial.attack_lr": Key(0.1, "adversarial training: L2 length of a step", 0),
    "adversarial.attack_steps": Key(7, "adversarial training: steps of an attack", 0),
    "augmentation.normalize": Key(False, "subtract the data set's mean, divide by its standard deviation"),
    "augmentation.random_crop": Key(True, "crop out of the image padded by 4 zeros"),
    "augmentation.random_horizontal_filp": Key(True, "mirror half of the images"),  # the authors' spelling
    "augmentation.cutout": Key(False, "blank out squares"),
    "augmentation.holes": Key(1, "squares per image", 0),
    "augmentation.length": Key(8, "side of a square in pixels", 0),
    "lr_scheduler.type": Key("STEP", "STEP, COSINE or HTD", choices=("STEP", "COSINE", "HTD")),
    "lr_scheduler.base_lr": Key(0.1, "learning rate at the start", 0),
    "lr_scheduler.lr_epochs": Key([100, 150, 200], "STEP: epochs at which it drops, as [100, 150, 200]"),
    "lr_scheduler.lr_mults": Key(0.1, "STEP: factor of a drop", 0),
    "lr_scheduler.min_lr": Key(0.0, "COSINE, HTD: learning rate at the end", 0),
    "lr_scheduler.lower_bound": Key(-6.0, "HTD: where on the tanh it starts"),
    "lr_scheduler.upper_bound": Key(3.0, "HTD: where on the tanh it ends"),
}
DEFAULTS = {name: key.default for name, key in KEYS.items()}
CONFIG = nest(DEFAULTS)
# A run may be resumed with other values of these keys: the data are compared themselves, not by their paths.
FREE_ON_RESUME = {"eval_freq", "test_batch", "use_gpu", "compile", "workers", "input_size"}
FREE_ON_RESUME |= {key for key in CONFIG if key.startswith(("locked_", "orig_data", "ckpt_"))}
ALIASES = {"data_path": "orig_data_path"}  # CIFAR-ZOO's name: ours


def changes(before, config):
    """The keys that make a config another run than an earlier one: {key: (then, now)}. before is the earlier config,
    flat; a key that it lacks had its default then.

    A schedule of STEPs can go on for longer, and a precision of auto is the one that the run was begun in.
    """
    free_if = {"epochs": config.lr_scheduler.type == "STEP", "precision": config.precision == "auto"}
    free = FREE_ON_RESUME | {key for key, may in free_if.items() if may}
    before = DEFAULTS | before
    return {key: (before[key], now) for key, now in flatten(config).items() if key not in free and before[key] != now}


def read_config_file(path):
    """The values of a config.yaml by flat key ('optimize.momentum'); raises UserError where it cannot be read, or names
    a key twice."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; the work path is a folder with a config.yaml")
    try:
        content = yaml.load(Path(path).read_bytes(), Loader)
        flat = flatten(content) if isinstance(content, dict) else None
    except Exception as error:  # a file that is no YAML fails in many ways; all mean the same here
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if flat is None:
        raise UserError(f"{path}: expected keys and values, like 'epochs: 250'")
    for key in map(str, content):
        section, dot, _ = key.partition(".")
        if dot and section in content:
            raise UserError(f"{path}: {key} stands beside {section}; put it below that")
    for alias, key in ALIASES.items():
        if {alias, key} <= content.keys():
            raise UserError(f"{path}: {alias} and {key} are one key; give one of them")
    return {ALIASES.get(key, key): value for key, value in flat.items()}


def load_config(path, overrides):
    """Read a config.yaml over the defaults; overrides maps flat keys to strings.

    Returns an EasyDict with every key of CONFIG. Raises UserError naming the file and the key for an unknown
    key, a value that the key cannot have, and a key that is missing.
    """
    given = read_config_file(path)
    where = {key: f"{path}: {key}" for key in [*KEYS, *given]}
    for key, text in overrides.items():
        given[key], where[key] = parse_flag(text, type(KEYS[key].default)), f"--{key}"
    values = dict(DEFAULTS)
    for key, value in given.items():
        if isinstance(CONFIG.get(key), dict):
            raise UserError(f"{where[key]}: expected keys below it, like {', '.join(CONFIG[key])}")
        if key not in KEYS:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(key, KEYS)}")
        values[key] = convert(value, type(KEYS[key].default), where[key])
    missing = [name for name, key in KEYS.items() if key.required and name not in given]
    if missing:
        raise UserError(f"{path}: the key '{missing[0]}' is missing")
    values["dataset"] = canonical_name(values["dataset"])
    config = EasyDict(nest(values))
    check_values(config, where)
    return config


class Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML would take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                problem = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def parse_flag(text, kind):
    """The value of a flag, or the text itself where it is none of that kind.

    Numbers are read as by Python: to YAML, 010 is 8, and 1:30 is 90.
    """
    try:
        return kind(text) if kind in (str, int, float) else yaml.safe_load(text)
    except Exception:  # text that is no YAML fails in many ways
        return text


def convert(value, kind, where):
    """A value as one of a kind, which is a type; raises UserError where it is of another."""
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, which has no dot, as text
        except (ValueError, OverflowError):
            pass
    wrong_item = kind is list and isinstance(value, list) and any(type(item) is not int for item in value)
    if type(value) is not kind or wrong_item:
        names = {str: "text", int: "a whole number", float: "a number", bool: "True or False", list: "a list of epochs"}
        raise UserError(f"{where}: expected {names[kind]}, found {value!r}")
    return value


def check_values(config, where):
    """Raise UserError where a value of the config is not one that it can have; where says how to name each."""
    for name, value in flatten(config).items():
        key = KEYS[name]
        if key.choices:
            check_known(value, key.choices, where[name])
        elif isinstance(value, (int, float)) and not key.low <= value <= key.high:  # nor NaN
            raise UserError(f"{where[name]} is {value}; it must lie between {key.low} and {key.high}")
    if config.adversarial.eps > 0 and config.augmentation.normalize:
        raise UserError(f"{where['adversarial.eps']} is in pixels of [0, 1]; set augmentation.normalize to False")
    if config.mixup and config.cutmix:
        raise UserError(f"{where['cutmix']} and mixup exclude each other; set one of them to False")
    if config.optimize.nesterov and config.optimize.momentum == 0:
        raise UserError(f"{where['optimize.nesterov']} needs a momentum; set it to False")
    ckpt_path = Path(config.ckpt_path)
    if ckpt_path.anchor or ".." in ckpt_path.parts:
        raise UserError(f"{where['ckpt_path']} is '{config.ckpt_path}'; it must be a folder below the run's, as ./")
    if Path(config.ckpt_name).name != config.ckpt_name:
        raise UserError(f"{where['ckpt_name']} is '{config.ckpt_name}'; it must be a file's name, without a folder")
