"""Base classifiers: trained, resumed, evaluated, loaded, and what is refused."""

import errno
import math
import re
import shutil
from argparse import Namespace

import dill
import numpy as np
import pytest
import tables
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import utils
from data import DATASETS, Split, to_float
from models import base
from models.base import (
    Batches,
    accuracies,
    attacker_model,
    careful_saving,
    load_base,
    load_classifier,
    one_device,
    read_checkpoint,
    speed_up,
)
from tests.conftest import Malicious, base_flags, flip_bit
from utils import UserError


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint as robustness.train.train_model does, and returns the model and the path."""

    def save(arch="preresnet8", dataset="cifar", options={}, **hyper_parameters):
        model = nn.DataParallel(attacker_model(arch, dataset))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        optimizer.param_groups[0].update(hyper_parameters)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 50).state_dict(),
            "epoch": 3,
            "amp": None,
            "nat_prec1": torch.tensor(94.0),
        }
        torch.save(state, tmp_path / "checkpoint.pt.best", pickle_module=dill, **options)
        return model.module.eval(), tmp_path / "checkpoint.pt.best"

    return save


@pytest.mark.parametrize("arch", base.ROBUSTNESS_MODELS)
def test_an_architecture_of_robustness_tells_as_many_classes_apart_as_asked(arch):
    with torch.device("meta"):
        *_, last = (part for part in attacker_model(arch, "cifar", 7).modules() if isinstance(part, nn.Linear))
    assert last.out_features == 7


@pytest.mark.parametrize("arch", ["resnet18", "preresnet8", "vgg11"])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["today", "torch 1.1"])
def test_robustness_checkpoint(checkpoint, arch, options):
    model, path = checkpoint(arch, options=options)
    images = torch.rand(2, 3, 32, 32)
    expected, _ = model(images)  # AttackerModel normalises, and returns its input too
    assert torch.equal(load_classifier(path, arch, "cifar")(images), expected)


def test_numpy_numbers_in_a_checkpoint(checkpoint):
    """robustness' cyclic and linear schedules compute the learning rate with numpy."""
    _, path = checkpoint(lr=np.float64(0.1), momentum=np.float32(0.5), last=np.array(3, ">i8")[()])
    group = read_checkpoint(path)["optimizer"]["param_groups"][0]
    assert [(type(group[name]), group[name]) for name in ("lr", "momentum", "last")] == [
        (float, 0.1), (float, 0.5), (int, 3),
    ]  # fmt: skip


def test_a_checkpoint_makes_no_numpy_object(checkpoint):
    """With a dtype of his own, the author of a file could have numpy follow pointers that he made up."""

    class Pointers:
        def __reduce__(self):
            return np.dtype, ("f8", False, True), (3, "|", None, None, None, 8, 8, 63)  # all flags: it holds objects

    _, path = checkpoint(momentum=Pointers())
    assert not isinstance(read_checkpoint(path)["optimizer"]["param_groups"][0]["momentum"], np.dtype)
    _, path = checkpoint(momentum=np.array([1.5]))
    with pytest.raises(UserError, match="not a checkpoint of robustness, or damaged"):
        read_checkpoint(path)


def test_checkpoint_saved_on_a_gpu(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    model, path = checkpoint()
    assert all(value.device.type == "cpu" for value in load_base(path, "preresnet8", "cifar").state_dict().values())


def test_normalisation_is_of_the_checkpoint(checkpoint):
    _, path = checkpoint(dataset="digits")
    assert load_base(path, "preresnet8", "cifar").normalizer.new_mean.flatten().tolist() == pytest.approx([0.3054] * 3)


def test_another_architecture(checkpoint):
    _, path = checkpoint("resnet18")
    with pytest.raises(UserError, match="not a checkpoint of --arch resnet50"):
        load_base(path, "resnet50", "cifar")


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UserError, match="--arch: unknown name 'resnet51'; known are .*preresnet20.*resnet50"):
        load_base("anything", "resnet51", "cifar")


def test_absent_and_damaged_checkpoints(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_base(tmp_path / "none", "preresnet8", "cifar")
    _, path = checkpoint()
    content = path.read_bytes()
    for damaged in content[:1000], flip_bit(content, len(content) // 2):  # among the weights
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a checkpoint of robustness, or damaged"):
            load_base(path, "preresnet8", "cifar")


def test_weights_that_are_not_finite(checkpoint):
    model, path = checkpoint()
    state = torch.load(path)
    state["model"]["module.model.model.fc.bias"][0] = float("nan")
    torch.save(state, path)
    with pytest.raises(UserError, match="NaN"):
        load_base(path, "preresnet8", "cifar")


def test_accuracies_are_numbers():
    """Two of four are right at first, three among the best five of six classes."""
    logits = torch.eye(6)[[0, 1, 2, 3]] - torch.eye(6)[[5, 5, 5, 5]]
    found = accuracies(logits, torch.tensor([0, 1, 4, 5]))
    assert found == [50.0, 75.0] and all(type(value) is float for value in found)
    assert accuracies(logits[:, :3], torch.tensor([0, 1, 0, 0]))[1] == 100.0


def test_a_classifier_that_diverges_replaces_no_checkpoint(tmp_path):
    path, sound = tmp_path / "checkpoint", {"model": {"weight": torch.ones(2)}, "epoch": 1}
    diverged = {"model": {"weight": torch.tensor([1.0, math.nan])}, "epoch": 2}
    with careful_saving():
        torch.save(sound, str(path), pickle_module=dill)
        with pytest.raises(UserError, match="epoch 2: the weights hold NaN or infinity; lower --lr"):
            torch.save(diverged, str(path), pickle_module=dill)
    assert torch.load(path)["epoch"] == 1
    torch.save(diverged, str(path))  # as ever


def test_ctrl_c_ends_a_training(tmp_path, command, monkeypatch):
    """Also where it comes while robustness' loop waits for an accuracy; by itself it would go on, and warn."""

    def interrupted(logits, labels):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "accuracies", interrupted)
    with pytest.raises(SystemExit) as exit:
        command(base.main, *base_flags(tmp_path), "--epochs", 1)
    assert exit.value.code == 130


def test_nothing_in_a_checkpoint_runs(tmp_path):
    torch.save({"model": {}, "epoch": Malicious()}, tmp_path / "checkpoint", pickle_module=dill)
    with pytest.raises(UserError, match="not a checkpoint of robustness"):
        load_base(tmp_path / "checkpoint", "preresnet8", "cifar")


def test_batches_are_a_pass_over_the_split():
    images = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 2, 2)
    split, cpu = Split(images, torch.arange(7), None, None), torch.device("cpu")
    orders = []
    for shuffle in (False, True, True):
        batches = Batches(split, cpu, batch_size=3, transform=lambda images: to_float(images) / 2, shuffle=shuffle)
        inputs, labels = (torch.cat(parts) for parts in zip(*batches))
        assert len(batches) == 3
        torch.testing.assert_close(inputs[:, 0, 0, 0], labels / 255 / 2)
        assert labels.sort().values.tolist() == list(range(7))
        orders.append(labels.tolist())
    assert orders[0] == list(range(7)) and orders[0] != orders[1] != orders[2]


def test_robustness_computes_in_no_float16(monkeypatch, capsys):
    """Which auto means on GPUs that have no bfloat16."""
    monkeypatch.setattr(utils, "pick_precision", lambda *args: ("float16", "of this GPU"))
    model = attacker_model("preresnet8", "cifar")
    args = Namespace(precision="auto", compile="never", batch_size=2, adv_train=0, adv_eval=0)
    speed_up(model.model, args, torch.device("cpu"), passes=1)
    assert "in float32 (robustness does not scale the loss" in capsys.readouterr().out


@pytest.mark.parametrize("adversarial", ["adv_train", "adv_eval"])
def test_what_takes_adversarial_examples_is_not_compiled(adversarial, compiles):
    model, flags = attacker_model("preresnet8", "cifar"), {"adv_train": 0, "adv_eval": 0, adversarial: 1}
    args = Namespace(precision="float32", compile="always", batch_size=2, **flags)
    speed_up(model.model, args, torch.device("cpu"), passes=10**9)
    model(torch.rand(2, 3, 32, 32))
    assert not compiles


@pytest.mark.parametrize("dataset", ["cifar", "digits", "folder"])
def test_a_base_classifier_is_normalized_as_its_data_set(dataset):
    normalizer, images = attacker_model("preresnet8", dataset).normalizer, torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in DATASETS[dataset][1:])
    torch.testing.assert_close(normalizer(images), (images - mean) / std)


def test_what_makes_it_fast_leaves_a_network_the_same(compiles):
    """For robustness: the names in its checkpoints, and what it computes, nearly."""
    plain, fast = attacker_model("resnet18", "cifar"), attacker_model("resnet18", "cifar")
    fast.load_state_dict(plain.state_dict())
    seen = []
    fast.model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    args = Namespace(precision="bfloat16", compile="always", batch_size=2, adv_train=0, adv_eval=0)
    speed_up(fast.model, args, torch.device("cpu"), passes=1)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    images = torch.rand(2, 3, 32, 32)
    (expected, _), (logits, _) = (model.eval()(images) for model in (plain, fast))
    assert len(compiles) == 1 and seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0)


def test_robustness_computes_on_one_gpu(monkeypatch):
    """Whichever it asks DataParallel for: none, in evaluating, means all."""
    taken = []
    monkeypatch.setattr(nn.DataParallel, "__init__", lambda self, module, device_ids: taken.append(device_ids))
    with one_device(torch.device("cuda", 1)):
        nn.DataParallel(None)
        nn.DataParallel(None, device_ids=None)
    assert taken == [[1], [1]]


def test_only_digits_are_not_mirrored():
    assert base.AUGMENTATION["digits"] is base.augment_digits
    assert {base.AUGMENTATION[name] for name in ("cifar", "cifar10", "folder")} == {base.augment_photos}
    for augment, mirrored in ((base.augment_digits, False), (base.augment_photos, True)):
        half = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
        half[..., :16] = 255
        means = augment(half)[..., :10].mean((1, 2, 3))
        assert (means < 0.2).any() == mirrored


def test_photos_are_augmented_by_robustness_amounts(monkeypatch):
    """Its RandomCrop(32, padding=4), ColorJitter(0.25, 0.25, 0.25) and RandomRotation(2), one after the other."""
    done = []
    for name in ("random_crop", "color_jitter", "random_rotation"):

        def record(images, *amounts, name=name, **named):
            done.append((name, *amounts, *named.values()))
            return images

        monkeypatch.setattr(base, name, record)
    base.augment_photos(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert done == [("random_crop",), ("color_jitter", 0.25), ("random_rotation", 2)]
    done.clear()
    base.augment_digits(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert done == [("random_crop", 2), ("random_rotation", 2)]


def test_what_adversarial_training_leaves_out(monkeypatch, capsys):
    monkeypatch.setattr(base, "Compiled", lambda *_, **__: pytest.fail("compiled"))
    args = Namespace(precision="float32", compile="always", batch_size=2, adv_train=1, adv_eval=0)
    speed_up(nn.Conv2d(3, 2, 3), args, torch.device("cpu"), passes=1)
    assert "compiled" not in capsys.readouterr().out


def test_a_classifier_in_an_older_form(tmp_path):
    state = attacker_model("preresnet8", "digits").state_dict()
    torch.save({"state_dict": state}, tmp_path / "old")
    assert load_base(tmp_path / "old", "preresnet8", "digits").state_dict().keys() == state.keys()


def test_expressions_that_robustness_takes():
    kinds, periods = base.KINDS, "[(0, 0), (5, 1)]"
    assert float(kinds["eps"]("8/255")) == 8 / 255 and float(kinds["attack-lr"]("1e-1")) == 0.1
    assert kinds["custom-lr-multiplier"]("cyclic") == "cyclic"
    for name in ("custom-lr-multiplier", "custom-eps-multiplier"):
        assert kinds[name](periods) == "[(0.0, 0.0), (5.0, 1.0)]"


def test_a_better_adversarial_accuracy_is_kept(checkpoint, tmp_path):
    _, path = checkpoint()
    torch.save({**torch.load(path), "adv_prec1": 40.0}, path)
    args = Namespace(out_dir=tmp_path.parent, exp_name=tmp_path.name, adv_train=1, resume="none")
    assert base.keep_best(args, 30.0) == 40.0


def test_what_a_training_came_to(checkpoint, tmp_path, capsys):
    _, path = checkpoint()
    torch.save({**torch.load(path), "adv_prec1": 40.0}, path)
    for adversarial, said in {0: "94.00 % on the test set", 1: "40.00 % on the attacked test set"}.items():
        base.report(Namespace(path=tmp_path), adversarial, None)
        assert f"{said} after epoch 3" in capsys.readouterr().out
    path.unlink()
    base.report(Namespace(path=tmp_path), 0, {"epoch": 3})
    assert "No epoch was better" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing was classified right"):
        base.report(Namespace(path=tmp_path), 0, None)


def test_curves_that_cannot_be_written_end_a_training(tmp_path, user_error, monkeypatch):
    """tensorboardX, which robustness writes them with, would let it wait forever."""

    def write(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    line = user_error(base.main, *base_flags(tmp_path), "--epochs", 1)
    assert f"No space left on device: '{tmp_path}/base'" in line
    for store in list(tables.file._open_files.handlers):  # or PyTables would say at the end that it closes it
        store.close()


def test_a_store_on_a_file_system_that_cannot_lock(tmp_path):
    """There HDF5 would fail to lock its file, as it does here, where another has."""
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "store.h5", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tables.open_file(tmp_path / "store.h5", "w").close()


def test_a_base_classifier_is_evaluated_alone(place, photos, command, capsys, monkeypatch, tmp_path):
    """In a folder that holds a classifier, too, and without reading the training images, but for the first; also where
    git fails in more ways than robustness expects: in another user's clone, or one without a commit."""
    monkeypatch.setattr("git.Repo", lambda *args, **options: 1 / 0)
    best = place / "base" / "checkpoint.pt.best"
    command(base.main, *base_flags(tmp_path), "--exp-name", "evaluated", "--eval-only", 1, "--resume", best,
            "--adv-eval", 1, "--constraint", 2, "--eps", 1, "--attack-lr", 1, "--attack-steps", 1)  # fmt: skip
    accuracy = base.read_checkpoint(best)["nat_prec1"]
    out = capsys.readouterr().out
    assert f"accuracy {accuracy:.2f} % on the test set, loss " in out
    assert float(re.search("accuracy (.*) % on the attacked test set, loss ", out)[1]) < accuracy
    shutil.copy(best, tmp_path / "evaluated")
    for name in (["--exp-name", "evaluated"], []):  # a folder that holds a classifier, and a new one
        command(base.main, "--dataset", "digits", "--arch", "preresnet8", "--out-dir", tmp_path, "--eval-only", 1,
                "--resume", best, *name)  # fmt: skip
        out = capsys.readouterr().out
        assert f"accuracy {accuracy:.2f} % on the test set, loss " in out and "attacked" not in out
    max((photos / "train").rglob("*.png")).write_bytes(b"damaged")
    command(base.main, *base_flags(tmp_path, photos), "--exp-name", "photos", "--eval-only", 1, "--resume", best)


def test_mistakes_in_the_base_classifier(place, user_error, tmp_path):
    flags = base_flags(place)
    resume = ["--resume", place / "base" / "checkpoint.pt.latest"]
    for more in ([], resume):  # without its optimizer it would start anew
        assert "holds a classifier already, finished or not" in user_error(base.main, *flags, *more)
    (tmp_path / "base").mkdir()
    shutil.copy(resume[1], tmp_path / "base")  # without a best one, it is still a classifier
    assert "holds a classifier already" in user_error(base.main, *flags, "--out-dir", tmp_path)
    line = user_error(base.main, *flags, "--out-dir", tmp_path, *resume, "--resume-optimizer", 1)  # with another one
    assert "holds a classifier already" in line
    adversarial = ["--adv-train", 1, "--constraint", 2, "--eps", 1, "--attack-lr", 1]
    line = user_error(base.main, *flags, *resume, "--resume-optimizer", 1, *adversarial)
    assert f"{resume[1]}: was trained with another --adv-train" in line
    again = [*resume, "--resume-optimizer", 1, "--exp-name", "new", "--epochs", 1]
    assert f"--epochs 1: {resume[1]} has 2 epochs already; give more" in user_error(base.main, *flags, *again)
    torch.save({"model": torch.load(resume[1])["model"]}, tmp_path / "weights")
    resume = ["--exp-name", "new", "--resume", tmp_path / "weights", "--resume-optimizer", 1]
    assert "weights: holds no optimizer that fits" in user_error(base.main, *flags, *resume)
    assert "--dataset is required" in user_error(base.main, *flags[2:])
    assert "--adv-train required" in user_error(base.main, *flags[:2], *flags[4:])
    assert "unknown name 'resnet49'" in user_error(base.main, *flags, "--exp-name", "new", "--arch", "resnet49")
    line = user_error(base.main, *flags, "--exp-name", "new", "--dataset", "cifar", "--data", tmp_path)
    assert f"{tmp_path}: CIFAR-10 is not there" in line
    for flag in ("--batch-size", "--epochs"):
        line = user_error(base.main, *flags, "--exp-name", "new", flag, 0)
        assert f"argument {flag}: '0' is not a whole number of at least 1" in line
    for eps in ("exit()", -0.5, "1e999"):
        assert f"--eps: {eps}: expected a number" in user_error(base.main, *flags, "--exp-name", "new", "--eps", eps)
    assert "--resume is required" in user_error(base.main, *flags, "--exp-name", "new", "--eval-only", 1)
    assert "--save-ckpt-iters 0" in user_error(base.main, *flags, "--exp-name", "new", "--save-ckpt-iters", 0)
    for text in ("exit()", "[]", "[(10, 1), (5, 1)]", "[(0, 1e999)]", "[(0, -1)]"):
        line = user_error(base.main, *flags, "--exp-name", "new", "--custom-lr-multiplier", text)
        assert f"--custom-lr-multiplier: {text}: expected [(epoch, factor), ...]" in line
    for text in ("exit()", "cyclic"):
        line = user_error(base.main, *flags, "--exp-name", "new", "--custom-eps-multiplier", text)
        assert f"--custom-eps-multiplier: {text}: expected [(epoch, factor), ...]" in line
    evaluated = ["--dataset", "digits", "--arch", "preresnet8", "--eval-only", 1]
    assert "--out-dir is required" in user_error(base.main, *evaluated, "--resume", tmp_path / "weights")
    assert "unrecognized arguments: --config-path" in user_error(base.main, *flags, "--config-path", "x")
    broken = [["--constraint", "unconstrained", "--random-start", 1], ["--constraint", "fourier"]]
    for more in (["--mixed-precision", 1], ["--random-restarts", 1], *broken):
        line = user_error(base.main, *flags, "--exp-name", "new", *more)
        assert "--mixed-precision 1, " in line and "do not work in robustness 1.2.1" in line
    for flag, value in {"--step-lr-gamma": "nan", "--lr": -0.1, "--weight-decay": -1e-4, "--momentum": "inf"}.items():
        line = user_error(base.main, *flags, "--exp-name", "new", flag, value)
        assert f"argument {flag}: '{value}' is not a number of at least 0" in line
    line = user_error(base.main, *flags, "--exp-name", "new", "--arch", "mobilenet_v2", "--batch-size", 359)
    assert "--batch-size 359: leaves the last of 1437 images" in line
    assert not (place / "new").exists()


def test_base_classifier_is_resumed(photos, tmp_path, command):
    """At the next epoch's learning rate; only what is better than the best takes its place, as does a better latest."""
    folder, flags = tmp_path / "base", [*base_flags(tmp_path, photos), "--step-lr", 1]
    command(base.main, *flags, "--epochs", 1)
    latest, best = folder / "checkpoint.pt.latest", folder / "checkpoint.pt.best"
    command(base.main, *flags, "--epochs", 1, "--exp-name", "same")
    weights, same = (torch.load(path)["model"] for path in (latest, tmp_path / "same" / "checkpoint.pt.latest"))
    (folder / "store.2.h5").write_bytes(b"older")
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    for of_best, of_latest, epochs, expected in ((101.0, -1.0, 3, 1), (-1.0, -1.0, 4, 4), (0.0, 101.0, 5, 4)):
        torch.save({**torch.load(best), "nat_prec1": of_best}, best)
        torch.save({**torch.load(latest), "nat_prec1": of_latest}, latest)
        command(base.main, *flags, "--epochs", epochs, "--lr", 7, "--resume", latest, "--resume-optimizer", 1)
        assert torch.load(latest)["epoch"] == epochs
        assert torch.load(best)["epoch"] == expected
    assert torch.load(best)["nat_prec1"] == 101
    assert torch.load(latest)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.00001)
    assert (folder / "store.4.h5").exists() and (folder / "store.2.h5").read_bytes() == b"older"


def test_epochs_that_are_trained_again_replace_the_curves_of_those_before(photos, tmp_path, command):
    flags, folder = base_flags(tmp_path, photos), tmp_path / "base"
    latest = folder / "checkpoint.pt.latest"
    command(base.main, *flags, "--epochs", 1)
    first = latest.read_bytes()
    for epochs in (3, 2):
        latest.write_bytes(first)
        command(base.main, *flags, "--epochs", epochs, "--resume", latest, "--resume-optimizer", 1)
        (events,) = {path.parent for path in folder.rglob("events.*")}
        losses = EventAccumulator(str(events)).Reload().Scalars("nat_train_loss")
        assert [event.step for event in losses] == list(range(epochs))
    command(base.main, *flags, "--eval-only", 1, "--resume", latest)
    assert EventAccumulator(str(events)).Reload().Scalars("nat_train_loss") == losses


def test_a_base_classifier_without_a_schedule_goes_on(photos, tmp_path, command):
    """--step-lr 0, for which robustness makes no schedule: at the learning rate that it was begun with."""
    flags, latest = [*base_flags(tmp_path, photos), "--step-lr", 0], tmp_path / "base" / "checkpoint.pt.latest"
    command(base.main, *flags, "--epochs", 1)
    command(base.main, *flags, "--epochs", 5, "--lr", 7, "--resume", latest, "--resume-optimizer", 1)
    assert torch.load(latest)["epoch"] == 5
    assert torch.load(latest)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1)


def test_a_base_classifier_is_trained_adversarially(photos, tmp_path, command, monkeypatch):
    monkeypatch.setattr(base, "report", lambda *args: None)  # nothing may be classified right
    command(base.main, *base_flags(tmp_path, photos), "--epochs", 1, "--precision", "bfloat16", "--adv-train", 1,
            "--constraint", 2, "--eps", 0.5, "--attack-lr", 0.2, "--attack-steps", 2)  # fmt: skip
    assert "adv_prec1" in base.read_checkpoint(tmp_path / "base" / "checkpoint.pt.latest")


def test_a_list_of_learning_rates_goes_on(photos, tmp_path, command, user_error):
    """At its factors of the learning rate that it began with."""
    latest = tmp_path / "base" / "checkpoint.pt.latest"
    flags = [*base_flags(tmp_path, photos), "--custom-lr-multiplier", "[(0, 1), (1, 0.5)]"]
    command(base.main, *flags, "--epochs", 1)
    command(base.main, *flags, "--epochs", 2, "--lr", 7, "--resume", latest, "--resume-optimizer", 1)
    assert torch.load(latest)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.05)
    line = user_error(base.main, *flags[:-2], "--epochs", 3, "--resume", latest, "--resume-optimizer", 1)
    assert f"{latest}: was begun with --custom-lr-multiplier; give it again" in line


def test_a_base_classifier_is_trained_as_its_flags_say(monkeypatch, command, capsys, tmp_path):
    """What would be trained on, the seed, and the defaults of the digits; the training itself is left out."""
    loaders, seeds, passed, batches, new = [], [], [], base.Batches, base.attacker_model
    passes, speed_up = [], base.speed_up
    monkeypatch.setattr(base, "speed_up", lambda *args: passes.append(args[-1]) or speed_up(*args))
    monkeypatch.setattr(base, "Batches", lambda *args, **more: loaders.append(batches(*args, **more)) or loaders[-1])
    monkeypatch.setattr(base, "attacker_model", lambda *args: seeds.append(torch.initial_seed()) or new(*args))
    monkeypatch.setattr(base, "report", lambda *args: None)
    monkeypatch.setattr(base.import_robustness(), "train_model", lambda *args, **options: passed.append(args))
    for augmented in (1, 0):
        command(base.main, *base_flags(tmp_path), "--exp-name", augmented, "--data-aug", augmented, "--manual-seed", 9,
                "--precision", "bfloat16")  # fmt: skip
        assert "in bfloat16 (as asked for)" in capsys.readouterr().out
    assert seeds == [9, 9] and passes == 2 * [20 * 1437]
    assert [(one.transform, one.shuffle) for one in loaders] == [
        (to_float, False), (base.augment_digits, True), (to_float, False), (to_float, True)
    ]  # fmt: skip
    for args, _, (train_batches, test_batches) in passed:
        assert train_batches.shuffle and (len(train_batches.labels), len(test_batches.labels)) == (1437, 360)
        assert (args.epochs, args.batch_size, args.weight_decay, args.step_lr) == (20, 64, 5e-4, 8)
        assert args.log_iters == 5  # a checkpoint after epochs 1, 6, 11, ...


def test_what_a_base_classifier_is_resumed_with(place, command, monkeypatch, tmp_path):
    """Its weights; and, with its optimizer and schedule, other random numbers than at first."""
    passed, latest = [], place / "base" / "checkpoint.pt.latest"
    monkeypatch.setattr(base, "report", lambda *args: None)
    monkeypatch.setattr(
        base.import_robustness(), "train_model",
        lambda args, model, *_, **more: passed.append((torch.initial_seed(), more["checkpoint"], model.state_dict())),
    )  # fmt: skip
    for on in (1, 0):
        command(base.main, *base_flags(tmp_path), "--exp-name", on, "--resume", latest, "--resume-optimizer", on)
    kept = base.read_checkpoint(latest)
    assert [seed for seed, *_ in passed] == [23 + kept["epoch"], 23]
    assert passed[0][1]["epoch"] == kept["epoch"] and passed[1][1] is None
    for *_, weights in passed:
        assert weights.keys() == kept["model"].keys()
        assert all(torch.equal(value, kept["model"][name]) for name, value in weights.items())
