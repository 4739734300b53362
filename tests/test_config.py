"""Config files: keys, values, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from config import CONFIG, FREE_ON_RESUME, load_config
from data import SPLITS
from tests.conftest import MINIMAL, ROOT, config_of
from utils import UserError, flatten, nest

CIFAR10 = "alexnet densenet100bc mobilenet_v2 preresnet110 preresnet20 resnet18 resnet20 torchvision_resnet18".split()
SHIPPED = [f"cifar10/{name}" for name in (*CIFAR10, "vgg11", "vgg19", "vit")] + ["digits/preresnet8"]

# What Python says of the 30th of February
NO_DAY = "day 30 must be in range" if sys.version_info >= (3, 14) else "day is out of range"

# A file as CIFAR-ZOO ships it, with its older and its newer keys.
CIFAR_ZOO = """
# net architecture
architecture: preresnet20

# log and checkpoint
data_path: ./data
ckpt_path: ./
ckpt_name: preresnet20

num_classes: 10
dataset: cifar10 # cifar100
use_gpu: True
input_size: 32
epochs: 250
batch_size: 128
test_batch: 200
eval_freq: 2
workers: 4

optimize:
  momentum: 0.9
  weight_decay: 0.0001
  nesterov: True

mixup: True
mixup_alpha: 0.4

augmentation:
  normalize: True
  random_crop: True
  random_horizontal_filp: True
  cutout: True
  holes: 1
  length: 8

lr_scheduler:
  type: HTD
  base_lr: 0.1
  lr_epochs: [100, 150, 200]
  lr_mults: 0.1
  min_lr: 0.0
  lower_bound: -6.0
  upper_bound: 3.0
"""


def test_a_cifar_zoo_config_loads_unchanged(tmp_path):
    config = config_of(tmp_path, CIFAR_ZOO)
    assert config.orig_data_path == "./data"
    assert config.augmentation.cutout is True and config.mixup is True
    assert config.locked_test_label == "./data/test_label_basic"
    assert config_of(tmp_path, CIFAR_ZOO, dataset="cifar") == config  # robustness' name
    found, defaults = flatten(config), flatten(CONFIG)
    assert found.keys() == defaults.keys()
    assert {key for key in found if found[key] != defaults[key]} == {  # that file has the paper's values
        "architecture", "dataset", "orig_data_path", "ckpt_name", "mixup", "augmentation.normalize",
        "augmentation.cutout", "lr_scheduler.type",
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_in_any_unicode(tmp_path, encoding):
    """As editors on Windows write it, whatever letters Python takes for the system's."""
    (tmp_path / "config.yaml").write_bytes(MINIMAL.replace("./data", "./Bildér").encode(encoding))
    assert load_config(tmp_path / "config.yaml", {}).orig_data_path == "./Bildér"


def test_a_tree_and_its_flat_form():
    tree = {"a": {"b": {"c": 1}, "d": [2]}, "e": "f"}
    assert flatten(tree) == {"a.b.c": 1, "a.d": [2], "e": "f"}
    assert nest(flatten(tree)) == tree
    assert flatten({"a": {}, "b": {"c": {}}}) == {"a": {}, "b.c": {}}


def test_the_countermeasures_are_those_of_the_results():
    """With other defaults, new runs would be others than those in results/."""
    assert (CONFIG["mixup_alpha"], CONFIG["cutmix_alpha"]) == (0.4, 1.0)
    assert CONFIG["adversarial"] == {"eps": 0.0, "attack_lr": 0.1, "attack_steps": 7}


def test_the_keys_that_may_change_when_a_run_is_resumed():
    """Those that say where files are, how often it is evaluated, and on what it computes."""
    files = {key for key in CONFIG if key.startswith("locked_")} | {"orig_data_path", "ckpt_path", "ckpt_name"}
    assert FREE_ON_RESUME == files | {"eval_freq", "test_batch", "use_gpu", "compile", "workers", "input_size"}


def test_no_other_config_is_shipped():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tracked = subprocess.run(["git", "ls-files", "experiments/*.yaml"], cwd=ROOT, capture_output=True, text=True).stdout
    assert sorted(tracked.split()) == sorted(f"experiments/{name}/config.yaml" for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs(name):
    """They alone: a user's own lie beside them."""
    config = load_config(ROOT / "experiments" / name / "config.yaml", {})
    assert config.architecture.replace("/", "_") == Path(name).name
    assert config.augmentation.normalize is False
    assert config.epochs == {"preresnet8": 10, "densenet100bc": 300}.get(config.architecture, 250)
    folder = Path("data/digits" if config.dataset == "digits" else "data")  # to which make demo and lock.py write
    for split in SPLITS:
        for kind in ("image", "label"):
            assert Path(config[f"locked_{split}_{kind}"]) == folder / f"{split}_{kind}_basic"


def test_overrides(tmp_path):
    overrides = {"epochs": "7", "lr_scheduler.lr_epochs": "[2, 4]", "optimize.weight_decay": "5e-4", "ckpt_name": "1e3"}
    overrides["seed"] = "010"  # which is 8 in YAML
    config = config_of(tmp_path, **overrides)
    assert (config.epochs, config.seed, config.lr_scheduler.lr_epochs) == (7, 10, [2, 4])
    assert (config.optimize.weight_decay, config.ckpt_name) == (5e-4, "1e3")
    assert CONFIG["epochs"] == 250 and CONFIG["lr_scheduler"]["lr_epochs"] == [100, 150, 200]


@pytest.mark.parametrize(
    "text, message",
    [
        (MINIMAL[:-1] + ", epoch: 3}", r"config.yaml: unknown key 'epoch'; did you mean 'epochs'\?"),
        (
            MINIMAL[:-1] + ", optimize: {momentun: 0.9}}",
            "unknown key 'optimize.momentun'; did you mean 'optimize.momentum'",
        ),
        (MINIMAL[:-1] + ", epochs: many}", "config.yaml: epochs: expected a whole number, found 'many'"),
        (MINIMAL[:-1] + ", epochs: True}", "epochs: expected a whole number, found True"),
        (MINIMAL[:-1] + ", mixup: 1}", "mixup: expected True or False, found 1"),
        (MINIMAL[:-1] + ", optimize: {momentum: {}}}", "optimize.momentum: expected a number, found {}"),
        (MINIMAL[:-1] + ", optimize: {}}", "optimize: expected keys below it, like momentum"),
        (MINIMAL[:-1] + ", foo: {}}", "unknown key 'foo'"),
        (MINIMAL[:-1] + ", lr_scheduler: {base_lr: .nan}}", "lr_scheduler.base_lr is nan"),
        (MINIMAL[:-1] + f", lr_scheduler: {{base_lr: {10**401}}}}}", "lr_scheduler.base_lr: expected a number"),
        (MINIMAL[:-1] + ", optimize: 3}", "optimize: expected keys below it, like momentum"),
        (MINIMAL[:-1] + ", lr_scheduler: {lr_epochs: [1, b]}}", "lr_scheduler.lr_epochs: expected a list of epochs"),
        ("{dataset: cifar10, orig_data_path: ./data}", "config.yaml: the key 'architecture' is missing"),
        ("architecture", "config.yaml: expected keys and values"),
        ("a: [", "config.yaml: cannot be read"),
        (MINIMAL[:-1] + ", ckpt_name: 2024-02-30}", f"config.yaml: cannot be read .{NO_DAY}"),
        (MINIMAL[:-1] + ", optimize: &itself {momentum: *itself}}", "config.yaml: cannot be read .maximum recursion"),
        (MINIMAL[:-1] + ", epochs: !!int ''}", "config.yaml: cannot be read"),
        (
            "epochs: 1\noptimize: {momentum: 0.9}\nepochs: 2",
            "config.yaml: cannot be read .epochs is given twice .*line 3",
        ),
        (MINIMAL[:-1] + ", optimize: {momentum: 1, momentum: 0}}", "momentum is given twice"),
        (MINIMAL[:-1] + ", optimize: {momentum: 1}, optimize.momentum: 0}", "optimize.momentum stands beside optimize"),
        (MINIMAL[:-1] + ", data_path: ./b}", "config.yaml: data_path and orig_data_path are one key"),
    ],
)
def test_mistakes_in_a_config(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        config_of(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"architecture": "preresnet21"}, "architecture: unknown name 'preresnet21'; known are alexnet, .*preresnet20"),
        ({"architecture": "resnet34"}, "vit, torchvision/NAME; did you mean 'torchvision/resnet34'"),
        ({"dataset": "cifar100"}, "dataset: unknown name 'cifar100'; known are"),
        ({"lr_scheduler.type": "COS"}, "lr_scheduler.type: unknown name 'COS'; known are STEP, COSINE, HTD"),
        ({"train_on": "originals"}, "train_on: unknown name 'originals'; known are locked, original"),
        ({"precision": "half"}, "precision: unknown name 'half'; known are auto, float32"),
        ({"compile": "yes"}, "compile: unknown name "),
        ({"epochs": "0"}, "--epochs is 0"),
        ({"epochs": "2024-02-30"}, "--epochs: expected a whole number, found '2024-02-30'"),
        ({"optimize.momentum": "0"}, "nesterov needs a momentum"),
        ({"optimize.momentum": "1.1"}, "optimize.momentum is 1.1"),
        ({"optimize.weight_decay": "-1"}, "optimize.weight_decay is -1.0"),
        ({"lr_scheduler.base_lr": "nan"}, "lr_scheduler.base_lr is nan"),
        ({"augmentation.length": "-5"}, "augmentation.length is -5"),
        ({"ckpt_name": "a/b"}, "ckpt_name is 'a/b'"),
        ({"ckpt_path": "../x"}, "ckpt_path is '../x'"),
        ({"seed": "99999999999999999999"}, "seed is 9"),
        ({"eval_freq": "0"}, "eval_freq is 0"),
        ({"batch_size": "0"}, "batch_size is 0"),
        ({"test_batch": "0"}, "test_batch is 0"),
        ({"mixup_alpha": "0"}, "mixup_alpha is 0"),
        ({"cutmix_alpha": "0"}, "cutmix_alpha is 0"),
        ({"preprocess.blur": "3"}, "preprocess.blur is 3"),
        ({"preprocess.bits": "0"}, "preprocess.bits is 0"),
        ({"preprocess.bits": "9"}, "preprocess.bits is 9"),
        ({"preprocess.jpeg_quality": "101"}, "preprocess.jpeg_quality is 101"),
        ({"preprocess.jpeg_quality": "-1"}, "preprocess.jpeg_quality is -1"),
        ({"preprocess.blur": "-1"}, "preprocess.blur is -1"),
        ({"adversarial.eps": "-0.5"}, "adversarial.eps is -0.5"),
        ({"adversarial.attack_steps": "-1"}, "adversarial.attack_steps is -1"),
        ({"lr_scheduler.base_lr": "-0.1"}, "lr_scheduler.base_lr is -0.1"),
        ({"augmentation.holes": "-1"}, "augmentation.holes is -1"),
        ({"subset": "-1"}, "subset is -1"),
        ({"enlarge": "0"}, "enlarge is 0"),
        ({"epochs": str(10**401)}, "epochs is 1000"),
        ({"lr_scheduler.base_lr": str(10**401)}, "base_lr is inf"),
        ({"epochs": "1:30"}, "epochs: expected a whole number, found '1:30'"),
        ({"ckpt_path": "/x"}, "ckpt_path is '/x'; it must be a folder below the run's"),
        ({"adversarial.eps": "0.5", "augmentation.normalize": "True"}, "adversarial.eps is in pixels of"),
        ({"mixup": "True", "cutmix": "True"}, "cutmix and mixup exclude each other"),
    ],
)
def test_values_that_a_config_cannot_have(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, **keys)
