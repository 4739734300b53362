"""Config files, schedules, augmentation and checkpoints."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import nn

import train
from config import CONFIG, CONFIG_HELP, load_config
from data import SPLITS
from utils import UserError, flatten

CONFIGS = sorted((Path(__file__).parent.parent / "experiments").glob("*/*/config.yaml"))

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
MINIMAL = "{architecture: preresnet20, dataset: cifar10, orig_data_path: ./data}"


def config_of(tmp_path, text, **overrides):
    (tmp_path / "config.yaml").write_text(text)
    return load_config(tmp_path / "config.yaml", overrides)


def test_a_cifar_zoo_config_loads_unchanged(tmp_path):
    config = config_of(tmp_path, CIFAR_ZOO)
    assert config.orig_data_path == "./data"
    assert config.augmentation.cutout is True and config.mixup is True
    assert config.locked_test_label == "./data/test_label_basic"
    assert flatten(config).keys() == flatten(CONFIG).keys()


def test_the_experiments_are_there():
    names = {path.parent.name for path in CONFIGS}
    assert names == {"alexnet", "densenet100bc", "preresnet8", "preresnet20", "preresnet110", "vgg19"}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.parent.name for path in CONFIGS])
def test_shipped_configs(path):
    config = load_config(path, {})
    assert config.architecture == path.parent.name
    assert config.augmentation.normalize is False
    for split in SPLITS:
        for kind in ("image", "label"):
            assert Path(config[f"locked_{split}_{kind}"]).name == f"{split}_{kind}_basic"


def test_every_key_is_explained():
    assert CONFIG_HELP.keys() == flatten(CONFIG).keys()


def test_overrides(tmp_path):
    overrides = {"epochs": "7", "lr_scheduler.lr_epochs": "[2, 4]", "optimize.weight_decay": "5e-4", "ckpt_name": "1e3"}
    config = config_of(tmp_path, MINIMAL, **overrides)
    assert (config.epochs, config.lr_scheduler.lr_epochs) == (7, [2, 4])
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
        (MINIMAL[:-1] + ", optimize: 3}", "optimize: expected keys below it, like momentum"),
        (MINIMAL[:-1] + ", lr_scheduler: {lr_epochs: [1, b]}}", "lr_scheduler.lr_epochs: expected a list of epochs"),
        ("{dataset: cifar10, orig_data_path: ./data}", "config.yaml: the key 'architecture' is missing"),
        ("architecture", "config.yaml: expected keys and values"),
        ("a: [", "config.yaml: cannot be read"),
    ],
)
def test_mistakes_in_a_config(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        config_of(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("architecture", "preresnet21", "architecture: unknown name 'preresnet21'; known are alexnet, .*preresnet20"),
        ("dataset", "cifar100", "dataset: unknown name 'cifar100'; known are"),
        ("lr_scheduler.type", "COS", "lr_scheduler.type: unknown name 'COS'; known are STEP, COSINE, HTD"),
        ("epochs", "0", "epochs is 0"),
        ("optimize.momentum", "0", "nesterov needs a momentum"),
        ("optimize.weight_decay", "-1", "optimize.weight_decay is -1.0"),
        ("lr_scheduler.base_lr", ".nan", "lr_scheduler.base_lr is nan"),
        ("augmentation.length", "-5", "augmentation.length is -5"),
        ("ckpt_name", "a/b", "ckpt_name is 'a/b'"),
        ("seed", "99999999999999999999", "seed is 9"),
    ],
)
def test_values_that_a_config_cannot_have(tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, MINIMAL, **{key: value})


def test_schedules(tmp_path):
    def rates(kind, epochs, *at):
        config = config_of(tmp_path, MINIMAL, **{"lr_scheduler.type": kind, "epochs": str(epochs)})
        return [train.learning_rate(config, epoch) for epoch in at]

    assert rates("STEP", 250, 0, 99, 100, 149, 150, 200, 249) == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4, 1e-4])
    assert rates("COSINE", 100, 0, 50, 100) == pytest.approx([0.1, 0.05, 0])
    assert rates("COSINE", 40, 10) == pytest.approx([0.05 * (1 + math.sqrt(0.5))])
    assert rates("HTD", 90, 0, 60, 90) == pytest.approx([0.1, 0.05, 0.05 * (1 - math.tanh(3))], rel=1e-4)


def test_random_crop_cuts_out_of_the_padded_image():
    images = torch.randint(1, 256, (40, 3, 6, 5), dtype=torch.uint8)
    crops = train.random_crop(images, padding=2)
    windows = F.pad(images, [2] * 4).unfold(2, 6, 1).unfold(3, 5, 1)  # [N, 3, 5, 5, 6, 5]
    found = (windows == crops[:, :, None, None]).all(dim=(1, 4, 5)).view(40, 25)
    assert (found.sum(1) == 1).all()
    assert len(found.nonzero()[:, 1].unique()) > 12  # places differ from image to image


def test_random_flip():
    images = torch.rand(200, 3, 4, 4)
    flipped = train.random_flip(images)
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], images.flip(-1), images))
    assert 60 < mirrored.sum() < 140


def test_cutout():
    holes = (train.cutout(torch.ones(500, 3, 32, 32), holes=1, length=8) == 0).all(dim=1)
    areas = holes.sum(dim=(1, 2))
    assert areas.max() == 64 and areas.min() >= 16  # cut off at a corner, a quarter is left
    rows, columns = holes.any(dim=2).sum(1), holes.any(dim=1).sum(1)
    assert torch.equal(rows * columns, areas)
    assert holes.any(dim=0).all()
    assert torch.equal(train.cutout(torch.ones(2, 3, 8, 8), holes=0, length=8), torch.ones(2, 3, 8, 8))


def test_mixup():
    inputs = torch.eye(6)[:, :, None, None]
    blend, others, weight = train.mixup(inputs, torch.arange(6), alpha=0.4)
    expected = weight * torch.eye(6) + (1 - weight) * torch.eye(6)[others]
    assert 0 < weight < 1
    assert train.mixup(inputs, torch.arange(6), alpha=0)[2] == 1
    torch.testing.assert_close(blend[:, :, 0, 0], expected)


def test_normalize_does_what_it_says(tmp_path):
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    plain = config_of(tmp_path, MINIMAL)
    torch.testing.assert_close(train.as_inputs(images, plain), torch.full((1, 3, 2, 2), 0.2))
    normal = config_of(tmp_path, MINIMAL, **{"augmentation.normalize": "True"})
    torch.testing.assert_close(
        train.as_inputs(images, normal)[0, :, 0, 0], torch.tensor([-1.4405, -1.4153, -1.2264]), atol=1e-4, rtol=0
    )


def test_training_and_evaluation_count_right():
    """A linear model of two grey levels: all right, then, with the labels swapped, all wrong."""
    config = EasyDict(CONFIG | {"batch_size": 4, "test_batch": 3})
    config.augmentation.random_crop = False
    images = torch.tensor([0, 255] * 5, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4)
    labels = torch.tensor([0, 1] * 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model[1].weight.data = torch.stack([-torch.ones(48), torch.ones(48)]) / 10
    model[1].bias.data = torch.tensor([2.4, -2.4])
    loss, accuracy = train.evaluate(model, images, labels, config)
    expected = F.cross_entropy(model(images / 255), labels).item()
    assert accuracy == 100 and loss == pytest.approx(expected)
    assert train.evaluate(model, images, 1 - labels, config)[1] == 0
    frozen = torch.optim.SGD(model.parameters(), lr=0)
    assert train.train_epoch(model, images, labels, frozen, config) == pytest.approx((expected, 100), abs=1e-6)


def two_tones(n, labels):
    """n images, black and white by turns, with the labels given by turns."""
    images = torch.tensor([0, 255] * (n // 2), dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4)
    return images, torch.tensor(labels * (n // 2))


class Recorder:
    """Stands for a SummaryWriter, and keeps what is written."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_an_epoch_trains_on_the_locked_images_and_tells_the_test_sets_apart():
    """Black is 0 and white 1, but the other way round on the locked test set: all wrong there, and all right here."""
    config = EasyDict(CONFIG | {"epochs": 3, "eval_freq": 3, "batch_size": 8, "test_batch": 4})
    config.augmentation.random_crop = False
    config.lr_scheduler.lr_epochs = [1, 2]
    data = {
        "locked_train": two_tones(200, [0, 1]), "locked_test": two_tones(10, [1, 0]), "original": two_tones(20, [0, 1])
    }  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    # starts by taking black for 1 and white for 0, so that only training on locked_train sets it right
    model[1].weight.data = torch.tensor([[0.001], [-0.001]]).expand(2, 48).clone()
    model[1].bias.data = torch.tensor([-0.01, 0.01])
    optimizer = torch.optim.SGD(model.parameters(), lr=123)
    writers, lines = {name: Recorder() for name in ("run", "locked", "original")}, []
    assert train.run_epoch(model, optimizer, data, 2, config, writers, lines.append) is None
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    record = train.run_epoch(model, optimizer, data, 3, config, writers, lines.append)
    assert (record["epoch"], record["locked_acc"], record["orig_acc"]) == (3, 0, 100)
    assert record["orig_loss"] < 0.7 < record["locked_loss"]
    assert writers["run"].scalars["learning rate", 3] == pytest.approx(0.001)
    assert writers["run"].scalars["loss/train", 3] == record["train_loss"]
    for name, short in {"locked": "locked", "original": "orig"}.items():
        expected = {("accuracy/test", 3): record[f"{short}_acc"], ("loss/test", 3): record[f"{short}_loss"]}
        assert writers[name].scalars == expected
    assert "locked   0.00 % (loss " in lines[1] and "original 100.00 % (loss 0." in lines[1]


def test_mixup_weighs_both_targets_in_the_loss(monkeypatch):
    """With a weight of 1/4, blends of 0 and 1 in equal parts are three quarters of the other class."""
    config = EasyDict(CONFIG | {"mixup": True, "batch_size": 10})
    config.augmentation.random_crop = False
    monkeypatch.setattr(train, "mixup", lambda inputs, targets, alpha: (inputs, 1 - targets, 0.25))
    images, labels = two_tones(10, [0, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([2.0, 0.0])
    frozen = torch.optim.SGD(model.parameters(), lr=0)
    losses = F.cross_entropy(torch.tensor([[2.0, 0.0]] * 2), torch.tensor([0, 1]), reduction="none")
    expected = (0.25 * losses[0] + 0.75 * losses[1]).item()
    assert train.train_epoch(model, images, labels, frozen, config) == pytest.approx((expected, 25))


def test_augment_does_what_the_config_says(tmp_path):
    images = torch.randint(1, 256, (60, 3, 8, 8), dtype=torch.uint8)
    off = {f"augmentation.{name}": "False" for name in ("random_crop", "random_horizontal_filp", "cutout")}
    plain = train.augment(images, config_of(tmp_path, MINIMAL, **off))
    assert torch.equal(plain, images / 255)
    for name in off:
        alone = train.augment(images, config_of(tmp_path, MINIMAL, **off | {name: "True"}))
        assert not torch.equal(alone, plain)
        flips = (alone == plain.flip(-1)).all(dim=(1, 2, 3)).any()
        assert flips == (name == "augmentation.random_horizontal_filp")
        assert (alone == 0).any() == (name != "augmentation.random_horizontal_filp")  # padding, or holes


def test_pictures():
    originals = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    locked = originals.clone()
    locked[0] += 5
    grid = train.pictures(originals, locked)
    assert grid.shape == (3, 3 * 20, 3 * 14)  # three rows of two, two pixels apart, enlarged three times
    rows = grid[0, 3 * 3 :: 3 * 6, 3 * 3 :: 3 * 6]
    expected = torch.tensor([[100, 100], [105, 100], [127.5 + 50, 127.5]]) / 255
    torch.testing.assert_close(rows, expected)


def test_summary():
    accuracies = [(1, 50, 58), (2, 95, 30), (3, 94, 21)]
    history = [{"epoch": e, "locked_acc": locked, "orig_acc": orig} for e, locked, orig in accuracies]
    config = EasyDict(architecture="vgg19", dataset="cifar10", seed=4)
    assert train.summary(config, "50_horiz", history) == {
        "architecture": "vgg19", "dataset": "cifar10", "lock_method": "horiz", "seed": 4, "epochs": 3,
        "locked_acc": 94, "orig_acc": 21, "best_epoch": 2, "best_locked_acc": 95, "orig_acc_at_best": 30,
        "max_orig_acc": 58,
    }  # fmt: skip
    assert json.dumps(history)
