"""The keys of a config.yaml: defaults, what they mean, which values they can have, and how a file is read."""

from copy import deepcopy
from pathlib import Path

import yaml
from easydict import EasyDict

from data import DATASETS
from models import MODELS
from utils import COMPILE, MAX_SEED, PRECISIONS, UserError, check_known, did_you_mean, flatten

# Every key of a config.yaml with its default; where that is a type, the file must give the key.
# The keys are CIFAR-ZOO's and the original's, but for seed, precision, compile, cutmix, cutmix_alpha, train_on,
# preprocess and adversarial, which are new.
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
    "precision": "auto",
    "compile": "auto",
    "optimize": {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
    "mixup": False,
    "mixup_alpha": 0.4,
    "cutmix": False,
    "cutmix_alpha": 1.0,
    "train_on": "locked",
    "preprocess": {"grayscale": False, "blur": 0.0, "bits": 8, "jpeg_quality": 0},
    "adversarial": {"eps": 0.0, "attack_lr": 0.1, "attack_steps": 7},
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
    "dataset": "cifar10, digits or folder",
    "orig_data_path": "folder of the original data set",
    "locked_train_image": "locked file",
    "locked_train_label": "locked file",
    "locked_test_image": "locked file",
    "locked_test_label": "locked file",
    "ckpt_path": "folder of the checkpoints, below the run's",
    "ckpt_name": "name of the checkpoints, without .pth.tar",
    "num_classes": "number of classes",
    "use_gpu": "train on the GPU, if there is one",
    "input_size": "longer side of the images in pixels",
    "epochs": "passes over the training set",
    "batch_size": "images in a training step",
    "test_batch": "images evaluated at once",
    "eval_freq": "evaluate every VALUE epochs, at the first and at the last",
    "workers": "accepted, not used: images stay on the device",
    "seed": "seed of weights, order and augmentation",
    "precision": "auto, float32, bfloat16 or float16; auto: as begun, or less than float32 where that is faster",
    "compile": "auto, always or never: torch.compile, and on a GPU a CUDA graph of the step; auto: on a GPU",
    "optimize.momentum": "of SGD",
    "optimize.weight_decay": "of SGD",
    "optimize.nesterov": "Nesterov's momentum",
    "mixup": "blend training images in pairs",
    "mixup_alpha": "of the blend's Beta distribution",
    "cutmix": "put a piece of another image into each training image",
    "cutmix_alpha": "of the piece's Beta distribution",
    "train_on": "locked or original images: a control",
    "preprocess.grayscale": "take the colours away, in training and test sets",
    "preprocess.blur": "standard deviation in pixels of a Gaussian blur, in training and test sets",
    "preprocess.bits": "bits a colour that are kept, in training and test sets",
    "preprocess.jpeg_quality": "compress by JPEG of this quality, in training and test sets; 0: do not",
    "adversarial.eps": "adversarial training: L2 radius, in pixels of [0, 1]; 0: none",
    "adversarial.attack_lr": "adversarial training: L2 length of a step",
    "adversarial.attack_steps": "adversarial training: steps an attack",
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
# A run may be resumed with other values of these keys: the data are compared themselves, not by their paths. So may
# epochs, where the schedule is STEP. Any other key would make it a different run.
FREE_ON_RESUME = {
    *("eval_freq", "test_batch", "use_gpu", "compile", "workers"),
    *(key for key in CONFIG if key.startswith(("locked_", "orig_data", "ckpt_"))),
}
ALIASES = {"data_path": "orig_data_path"}  # CIFAR-ZOO's name: ours


def load_config(path, overrides):
    """Read a config.yaml over the defaults; overrides maps flat keys ('optimize.momentum') to strings.

    Returns an EasyDict with every key of CONFIG. Raises UserError naming the file and the key for an unknown
    key, a value that the key cannot have, and a key that is missing.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; the work path is a folder with a config.yaml")
    try:
        content = yaml.load(Path(path).read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, like 'epochs: 250'")
    defaults, config = flatten(CONFIG), EasyDict(deepcopy(CONFIG))
    for alias, key in ALIASES.items():
        if {alias, key} <= content.keys():
            raise UserError(f"{path}: {alias} and {key} are one key; give one of them")
    given = {ALIASES.get(key, key): value for key, value in flatten(content).items()}
    where = {key: f"{path}: {key}" for key in [*defaults, *given]}
    for key, text in overrides.items():
        # text stays text where text is wanted: a folder named 1e3 is no number
        as_text = defaults[key] is str or isinstance(defaults[key], str)
        given[key], where[key] = text if as_text else parse_value(text), f"--{key}"
    for key, value in given.items():
        if isinstance(CONFIG.get(key), dict):
            raise UserError(f"{where[key]}: expected keys below it, like {', '.join(CONFIG[key])}")
        if key not in defaults:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(key, defaults)}")
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = convert(value, defaults[key], where[key])
    missing = [key for key, default in defaults.items() if default is str and key not in given]
    if missing:
        raise UserError(f"{path}: the key '{missing[0]}' is missing")
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
        except (ValueError, OverflowError):
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
    **dict.fromkeys(("adversarial.eps", "adversarial.attack_lr", "adversarial.attack_steps"), (0, MANY)),
    "preprocess.blur": (0, 2),  # of images of at least 8x8 pixels
    "preprocess.bits": (1, 8),
    "preprocess.jpeg_quality": (0, 100),
    # a smaller one is not float32's: it draws 0.5, and not 0 or 1
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha"), (0.01, MANY)),
    **dict.fromkeys(("optimize.weight_decay", "augmentation.holes", "augmentation.length"), (0, MANY)),
    **dict.fromkeys(("lr_scheduler.base_lr", "lr_scheduler.min_lr", "lr_scheduler.lr_mults"), (0, MANY)),
    **dict.fromkeys(("lr_scheduler.lower_bound", "lr_scheduler.upper_bound"), (-MANY, MANY)),
    "optimize.momentum": (0, 1),
    "seed": (0, MAX_SEED),
}


def check_values(config, where):
    """Raise UserError where a value of the config is not one that it can have; where says, by key, how to name it."""
    check_known(config.architecture, MODELS, where["architecture"])
    check_known(config.dataset, DATASETS, where["dataset"])
    check_known(config.precision, ("auto", *PRECISIONS), where["precision"])
    check_known(config.compile, COMPILE, where["compile"])
    check_known(config.train_on, ("locked", "original"), where["train_on"])
    check_known(config.lr_scheduler.type, ("STEP", "COSINE", "HTD"), where["lr_scheduler.type"])
    values = flatten(config)
    for key, (low, high) in RANGES.items():
        if not low <= values[key] <= high:  # not so for NaN either
            raise UserError(f"{where[key]} is {values[key]}; it must lie between {low} and {high}")
    if config.adversarial.eps > 0 and config.augmentation.normalize:
        raise UserError(f"{where['adversarial.eps']} is in pixels of [0, 1]; set augmentation.normalize to False")
    if config.mixup and config.cutmix:
        raise UserError(f"{where['cutmix']} and mixup exclude each other; set one of them to False")
    if config.optimize.nesterov and config.optimize.momentum == 0:
        raise UserError(f"{where['optimize.nesterov']} needs a momentum; set it to False")
    ckpt_path = Path(config.ckpt_path)
    if ckpt_path.is_absolute() or ".." in ckpt_path.parts:
        raise UserError(f"{where['ckpt_path']} is '{config.ckpt_path}'; it must be a folder below the run's, as ./")
    if Path(config.ckpt_name).name != config.ckpt_name:
        raise UserError(f"{where['ckpt_name']} is '{config.ckpt_name}'; it must be a file's name, without a folder")
