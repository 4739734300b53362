import json
import os
import shutil
import sys

# The tests compare bit for bit, which a GPU does not promise: all but those of test_gpu.py run on the CPU everywhere.
if not os.environ.get("TEST_ON_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["PYTHON_COLORS"] = "0"  # they read what commands print, to which FORCE_COLOR would add colours

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoints
import data
import lock
import lockfiles
import train
import utils
from config import load_config
from models import base

ROOT = Path(__file__).parents[1]
MINIMAL = "{architecture: preresnet20, dataset: cifar10, orig_data_path: ./data}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def digits_are_read_once():
    """Commands in this process get copies of the digits; a test of how they are read calls data.load_digits itself."""
    read = cache(partial(data.load_digits, None))

    def load(root, split, count=None):
        images, labels, classes, names = read(split).first(count)
        return data.Split(images.clone(), labels.clone(), [*classes], [*names])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "digits", data.DATASETS["digits"]._replace(load=load))
        yield


def call(main, *arguments):
    """Run a command's main function with its arguments, as the shell would, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        utils.run_command(main)


@pytest.fixture
def command():
    return call


@pytest.fixture
def user_error(command, capsys):
    """Runs a command that must end in one line on standard error and exit code 2; returns the line. Its attribute
    printed is then what the command wrote to standard output."""

    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command(main, *arguments)
        run.printed, error = capsys.readouterr()
        lines = error.strip().splitlines()
        assert exit.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def compiles(monkeypatch):
    """Lets torch.compile run what it would compile; returns a list that grows by one whenever it does."""
    runs = []

    def backend(graph_module, example_inputs, **options):
        def run(*args):
            runs.append(None)
            return graph_module(*args)

        return run

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile, backend=backend))
    torch.compiler.reset()
    return runs


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder in which commands 1 and 2 have run: two epochs, and the first 96 images locked by two methods.

    All tests share it, and none writes to it.
    """
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "commit", lambda: "0" * 40)  # whatever is committed while the tests run
        call(base.main, *base_flags(place), "--epochs", 2, "--precision", "float32")
        call(lock.main, *lock_flags(place), "--lock-method", "basic", "horiz")
    return place


@pytest.fixture
def work(place, tmp_path):
    return make_work_path(tmp_path / "work", place)


def make_work_path(work, place):
    """A work path, with the config of a short training on the shared lock."""
    work.mkdir(exist_ok=True)
    (work / "config.yaml").write_text(
        f"{{architecture: preresnet8, dataset: digits, orig_data_path: none, eval_freq: 3, "
        f"locked_train_image: {place}/train_image_basic, locked_train_label: {place}/train_label_basic, "
        f"locked_test_image: {place}/test_image_basic, locked_test_label: {place}/test_label_basic}}"
    )
    return work


def run_of(work):
    """The folder of the run in a work path, and its result."""
    folder = work / "basic" / "seed0"
    return folder, json.loads((folder / "result.json").read_text())


@pytest.fixture
def locked(place, tmp_path):
    """A copy of the folder with the two locks, whose files a test may change."""
    copy_locks(place, tmp_path / "locked")
    return tmp_path / "locked"


def copy_locks(place, folder):
    """Copy the files of the two locks to a new folder."""
    folder.mkdir()
    for path in place.glob("*_*"):
        shutil.copy(path, folder)


@pytest.fixture
def photos(tmp_path):
    """A folder of PNG files: the first 48 digits of each split."""
    for split in data.SPLITS:
        lockfiles.write_tree(tmp_path / "photos" / split, data.load_digits(None, split).first(48))
    return tmp_path / "photos"


def base_flags(out_dir, photos=None):
    """Flags that train a preresnet8, on the digits or on a folder of photos, in the folder out_dir/base."""
    images = ["--dataset", "folder", "--data", photos] if photos else ["--dataset", "digits"]
    return [*images, "--adv-train", 0, "--arch", "preresnet8", "--out-dir", out_dir, "--exp-name", "base"]


def lock_flags(place, folder=None):
    """Flags that lock the first 96 digits, in short, into a folder."""
    return ["--dataset", "digits", "--arch", "preresnet8", "--resume-path", place / "base" / "checkpoint.pt.best",
            "--lock-data", folder or place, "--attack-steps", 3, "--subset", 96, "--batch-size", 40]  # fmt: skip


def manifest_of(folder, suffix="basic"):
    return json.loads((folder / f"lock_{suffix}.json").read_text())


def names_in(folder):
    """The names in a folder, sorted, without that of the file that keeps processes apart: some versions of filelock
    delete it."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def forbid_attacks(monkeypatch):
    monkeypatch.setattr(lock, "attack", lambda *args, **options: pytest.fail("an attack was computed"))


def flip_bit(content, position):
    """Bytes with one bit of the byte at a position flipped."""
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


class Malicious:
    """Unpickled by Python, it ends the process."""

    def __reduce__(self):
        return exec, ("raise SystemExit('this ran')",)


def small_classifier(classes=10):
    """An untrained network with the layers that matter to an attack: convolutions, batch norm, a kink, pooling."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
    for parameter in model.parameters():  # larger weights than PyTorch's, so that an attack moves the losses
        parameter.data *= 2
    return model.eval().requires_grad_(False)


def new_learner(config, device="cpu"):
    """What trains a new model, as train.py does."""
    return train.make_learner(train.make_model(config).to(device), config)


def config_of(tmp_path, text=MINIMAL, **overrides):
    """The config of a file with this text."""
    (tmp_path / "config.yaml").write_text(text)
    return load_config(tmp_path / "config.yaml", overrides)


def learner_of(model, lr):
    """A Learner of the model by plain SGD, in float32."""
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(float(lr)), fused=True)
    return checkpoints.Learner(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def two_tones(n, labels):
    """n images, black and white by turns, with the labels given by turns."""
    images = torch.tensor([0, 255] * (n // 2), dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4)
    return images, torch.tensor(labels * (n // 2))
