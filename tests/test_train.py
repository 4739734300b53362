"""The training loop: schedules, what is trained and evaluated, what is reported."""

import copy
import json
import math
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import nn

import inputs
import runs
import train
import utils
from augmentation import as_inputs
from config import CONFIG
from data import read_image
from tests.conftest import config_of, learner_of, new_learner, two_tones
from utils import PRECISIONS, UserError


def float32_config(**keys):
    """The default config, in float32, with other keys."""
    return EasyDict(copy.deepcopy(CONFIG) | {"precision": "float32"} | keys)


def test_schedules(tmp_path):
    def rates(kind, epochs, *at):
        config = config_of(tmp_path, **{"lr_scheduler.type": kind, "epochs": str(epochs)})
        return [train.learning_rate(config, epoch) for epoch in at]

    assert rates("STEP", 250, 0, 99, 100, 149, 150, 200, 249) == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4, 1e-4])
    halved = config_of(tmp_path, **{"lr_scheduler.lr_mults": "0.5", "lr_scheduler.lr_epochs": "[3, 5]"})
    assert [train.learning_rate(halved, epoch) for epoch in (2, 3, 5)] == pytest.approx([0.1, 0.05, 0.025])
    assert rates("COSINE", 100, 0, 50, 100) == pytest.approx([0.1, 0.05, 0])
    assert rates("COSINE", 40, 10) == pytest.approx([0.05 * (1 + math.sqrt(0.5))])
    assert rates("HTD", 90, 0, 60, 90) == pytest.approx([0.1, 0.05, 0.05 * (1 - math.tanh(3))], rel=1e-4)
    bounds = {"lr_scheduler.min_lr": "0.02", "lr_scheduler.lower_bound": "-2", "lr_scheduler.upper_bound": "2"}
    for kind, start in {"COSINE": 0.1, "HTD": 0.06 + 0.04 * math.tanh(2)}.items():
        config = config_of(tmp_path, **{"lr_scheduler.type": kind, "epochs": "2"} | bounds)
        assert [train.learning_rate(config, epoch) for epoch in (0, 1, 2)] == pytest.approx([start, 0.06, 0.12 - start])


def test_training_and_evaluation_count_right():
    """A linear model of two grey levels: all right, then, with the labels swapped, all wrong."""
    config = float32_config(batch_size=4, test_batch=3)
    images = torch.tensor([0, 255] * 5, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4)
    labels = torch.tensor([0, 1] * 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model[1].weight.data = torch.stack([-torch.ones(48), torch.ones(48)]) / 10
    model[1].bias.data = torch.tensor([2.4, -2.4])
    loss, accuracy = train.evaluate(model, images, labels, config)
    expected = F.cross_entropy(model(images / 255), labels).item()
    assert accuracy == 100 and loss == pytest.approx(expected)
    assert train.evaluate(model, images, 1 - labels, config)[1] == 0
    config.augmentation.random_crop = False  # which is for training alone
    step = train.make_step(learner_of(model, lr=0), config)
    assert train.train_epoch(step, images, labels, config) == pytest.approx((expected, 100), abs=1e-6)
    config.augmentation.normalize, config.dataset = True, "cifar10"
    normalized = F.cross_entropy(model(as_inputs(images, config)), labels).item()
    assert normalized < 0.1 * expected
    assert train.evaluate(model, images, labels, config)[0] == pytest.approx(normalized, abs=1e-6)
    assert train.train_epoch(step, images, labels, config)[0] == pytest.approx(normalized, abs=1e-6)


class Recorder:
    """Stands for a SummaryWriter, and keeps what is written."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_an_epoch_trains_on_the_training_set_and_tells_the_test_sets_apart():
    """Black is 0 and white 1, but the other way round on the locked test set: all wrong there, and all right here."""
    config = float32_config(epochs=3, eval_freq=3, batch_size=8, test_batch=4)
    config.augmentation.random_crop = False
    config.lr_scheduler.lr_epochs = [1, 2]
    data = {
        "train": two_tones(200, [0, 1]), "locked": two_tones(10, [1, 0]), "original": two_tones(20, [0, 1])
    }  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    # starts by taking black for 1 and white for 0, so that only training on the training set sets it right
    model[1].weight.data = torch.tensor([[0.001], [-0.001]]).expand(2, 48).clone()
    model[1].bias.data = torch.tensor([-0.01, 0.01])
    learner = learner_of(model, lr=123)
    writers, lines = {name: Recorder() for name in ("run", "locked", "original")}, []
    assert train.run_epoch(learner, train.make_step(learner, config), data, 2, config, writers, lines.append) is None
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    record = train.run_epoch(learner, train.make_step(learner, config), data, 3, config, writers, lines.append)
    assert (record["epoch"], record["locked_acc"], record["orig_acc"]) == (3, 0, 100)
    assert record["orig_loss"] < 0.7 < record["locked_loss"]
    assert writers["run"].scalars["learning rate", 3] == pytest.approx(0.001)
    assert writers["run"].scalars["loss/train", 3] == record["train_loss"]
    assert writers["run"].scalars["accuracy/train", 3] == record["train_acc"]
    assert record["train_loss"] < 1 < record["train_acc"]
    for name, short in {"locked": "locked", "original": "orig"}.items():
        expected = {("accuracy/test", 3): record[f"{short}_acc"], ("loss/test", 3): record[f"{short}_loss"]}
        assert writers[name].scalars == expected
    assert "locked   0.00 % (loss " in lines[1] and "original 100.00 % (loss 0." in lines[1]


def flat(model):
    """All the weights of a model, in one tensor."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_is_what_is_computed_in(precision, tmp_path):
    """Convolutions compute in it, weights stay float32, and what two steps do to them is what float32 does, nearly."""
    changes, seen = {}, set()
    for name in ("float32", precision):
        torch.manual_seed(0)
        config = config_of(tmp_path, architecture="preresnet8", precision=name, batch_size="32")
        learner = new_learner(config)
        seen.clear()
        for module in learner.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        before = flat(learner.model)
        images, labels = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(64) % 10
        assert learner.scaler.is_enabled() == (name == "float16")
        assert learner.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        if name == "float16":
            learner.scaler.scale(torch.ones(()))  # makes the state that load_state_dict sets
            learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 128.0})
        train.train_epoch(train.make_step(learner, config), images, labels, config)
        train.evaluate(learner.model, images, labels, config)
        changes[name] = flat(learner.model) - before
        assert changes[name].dtype == torch.float32
    assert seen == {PRECISIONS[precision]}
    assert train.forward(learner.model, images / 255, config).dtype == torch.float32  # so that losses are exact
    assert F.cosine_similarity(changes["float32"], changes[precision], dim=0) > 0.99


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch):
    config, model = EasyDict(CONFIG), nn.Linear(1, 1)
    monkeypatch.setattr(train, "train_epoch", lambda *_: (math.nan, 10.0))
    with pytest.raises(UserError, match="epoch 3: the loss is nan; start again with --overwrite"):
        train.run_epoch(learner_of(model, lr=0.1), None, {"train": ()}, 3, config, {}, print)


def test_a_model_that_predicts_nan_is_not_scored():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model[1].bias.data.fill_(math.nan)
    data = {"locked": two_tones(10, [0, 1]), "original": two_tones(10, [0, 1])}
    config = float32_config()
    with pytest.raises(UserError, match="epoch 3: the loss is nan"):
        train.evaluate_both(model, data, 3, config, {})


def test_blended_targets_count_by_their_weight(monkeypatch):
    """With a weight of 1/4, blends of 0 and 1 in equal parts are three quarters of the other class."""
    config = float32_config(batch_size=10)
    config.augmentation.random_crop = False
    blended = torch.tensor([[0.25, 0.75]] * 10)
    monkeypatch.setattr(train, "make_mixer", lambda config: lambda inputs, targets: (inputs, blended))
    led_away_from = []
    monkeypatch.setattr(train, "attack", lambda model, x, targets, *_, **__: led_away_from.append(targets) or x)
    images, labels = two_tones(10, [0, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model[1].weight.data.zero_()
    model[1].bias.data = torch.tensor([2.0, 0.0])
    step = train.make_step(learner_of(model, lr=0), config)
    losses = F.cross_entropy(torch.tensor([[2.0, 0.0]] * 2), torch.tensor([0, 1]), reduction="none")
    expected = (0.25 * losses[0] + 0.75 * losses[1]).item()
    assert train.train_epoch(step, images, labels, config) == pytest.approx((expected, 25))
    assert not led_away_from
    config.adversarial.eps = 0.5
    assert train.train_epoch(step, images, labels, config) == pytest.approx((expected, 25))
    assert torch.equal(led_away_from[0], blended)


def test_adversarial_training_trains_on_what_it_led_astray(tmp_path):
    """Each batch is moved as far as the radius allows, to where the loss is larger than on the images themselves."""
    off = {f"augmentation.{name}": "False" for name in ("random_crop", "random_horizontal_filp")}
    config = config_of(tmp_path, **off, precision="float32", **{"adversarial.eps": "0.5"})
    images, labels = torch.randint(60, 200, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6)
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Dropout(0.9)), []
    model.register_forward_hook(lambda model, inputs, output: seen.append((model.training, inputs[0].detach())))
    step = train.make_step(learner_of(model, lr=0), config)
    loss, _ = train.train_epoch(step, images, labels, config)
    assert [training for training, _ in seen] == [False] * 8 + [True]  # seven steps, and then it trains
    originals, attacked = seen[0][1], seen[-1][1]
    torch.testing.assert_close((attacked - originals).flatten(1).norm(dim=1), torch.full((6,), 0.5))
    order = (originals[:, None] == images / 255).all(dim=(2, 3, 4)).nonzero()[:, 1]
    before, after = (F.cross_entropy(model[:2](x), labels[order], reduction="none") for x in (originals, attacked))
    assert (after > before).all()


def test_pictures(tmp_path):
    originals = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    locked = originals.clone()
    locked[0] += 5
    grid = runs.pictures(originals, locked)
    assert grid.shape == (3, 3 * 20, 3 * 14)  # three rows of two, two pixels apart, enlarged three times
    data = {"original": (originals, None), "locked": (locked[:1], None)}  # as where a trial lock has fewer than ten
    runs.write_pictures(data, tmp_path / "images.png")
    assert read_image(tmp_path / "images.png").shape == (3, 3 * 20, 3 * 8)
    rows = grid[0, 3 * 3 :: 3 * 6, 3 * 3 :: 3 * 6]
    expected = torch.tensor([[100, 100], [105, 100], [127.5 + 50, 127.5]]) / 255
    torch.testing.assert_close(rows, expected)


def test_summary():
    accuracies = [(1, 50, 58), (2, 95, 30), (3, 94, 21)]
    history = [{"epoch": e, "locked_acc": locked, "orig_acc": orig} for e, locked, orig in accuracies]
    config = EasyDict(architecture="vgg19", dataset="cifar10", seed=4)
    result = runs.summary(config, "50_horiz", "jpeg", history)
    assert result == {
        "architecture": "vgg19", "dataset": "cifar10", "lock_method": "horiz", "alpha": 0.5, "name": "jpeg", "seed": 4,
        "epochs": 3,
        "locked_acc": 94, "orig_acc": 21, "best_epoch": 2, "best_locked_acc": 95, "orig_acc_at_best": 30,
        "max_orig_acc": 58,
    }  # fmt: skip
    assert runs.outcome(result) == (
        "vgg19, horiz, jpeg, seed 4, 3 epochs: locked 94.00 %, original 21.00 % "
        "(best locked 95.00 % at epoch 2, original then 30.00 %; largest original 58.00 %)"
    )


def test_two_steps_are_sgd_by_its_definition():
    """With Nesterov's momentum and weight decay as the config says (Sutskever et al., 2013, in torch's form)."""
    config = float32_config(optimize=EasyDict(momentum=0.8, weight_decay=0.1, nesterov=True))
    config.lr_scheduler.base_lr = 0.5
    model, inputs, targets = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.rand(6, 3, 4, 4), torch.arange(6) % 2
    expected, step = copy.deepcopy(model), train.make_step(train.make_learner(model, config), config)
    momenta = [torch.zeros_like(weights) for weights in expected.parameters()]
    for _ in range(2):
        step(inputs, targets)
        gradients = torch.autograd.grad(F.cross_entropy(expected(inputs), targets), expected.parameters())
        for weights, gradient, momentum in zip(expected.parameters(), gradients, momenta):
            gradient = gradient + 0.1 * weights.data
            momentum.mul_(0.8).add_(gradient)
            weights.data -= 0.5 * (gradient + 0.8 * momentum)
    torch.testing.assert_close(flat(model), flat(expected))


@pytest.mark.parametrize(
    "key, value, on",
    [
        ("mixup_alpha", "9", {"mixup": "True"}),
        ("cutmix_alpha", "9", {"cutmix": "True"}),
        ("augmentation.holes", "3", {"augmentation.cutout": "True"}),
        ("augmentation.length", "4", {"augmentation.cutout": "True"}),
        ("adversarial.attack_lr", "0.3", {"adversarial.eps": "0.5"}),
        ("adversarial.attack_steps", "1", {"adversarial.eps": "0.5"}),
    ],
)
def test_a_key_is_one_that_training_reads(tmp_path, key, value, on):
    images, labels, trained = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8), []
    for change in ({}, {}, {key: value}):
        torch.manual_seed(0)
        config = config_of(tmp_path, architecture="preresnet8", precision="float32", **on, **change)
        learner = new_learner(config)
        train.train_epoch(train.make_step(learner, config), images, labels, config)
        trained.append(flat(learner.model))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_the_fingerprint_is_of_all_images_and_labels():
    data = {name: (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=int)) for name in ("train", "test")}
    found = {inputs.hash_data(data)}
    for images, labels in data.values():
        for tensor in (images, labels):
            tensor += 1
            found.add(inputs.hash_data(data))
    assert len(found) == 5


def test_each_epoch_takes_every_image_once_in_an_order_of_its_own():
    images, labels, seen = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10), []

    def step(inputs, targets):
        seen.append(targets)
        return torch.zeros(2)

    for _ in range(2):
        train.train_epoch(step, images, labels, float32_config(batch_size=4))
    first, second = torch.cat(seen).view(2, 10).tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_evaluation_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 2)).train()
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8), torch.zeros(6, dtype=int)
    train.evaluate(model, images, labels, float32_config())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("count, batch_size, alone", [(5, 2, True), (5, 1, True), (6, 5, True), (6, 2, False)])
def test_an_image_that_would_be_a_batch_of_its_own_is_told(count, batch_size, alone):
    """Before training, of which nothing is left in the model."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=f"batch_size {batch_size}: leaves the last of") if alone else nullcontext():
        utils.check_last_batch(model, torch.rand(1, 3, 4, 4), count, batch_size, "batch_size")
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # which takes one image, of several pixels
    utils.check_last_batch(convolution, torch.rand(1, 3, 4, 4), count, batch_size, "batch_size")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not convolution[1].num_batches_tracked


def test_a_result_is_that_of_a_finished_run_only_with_its_epochs_data_and_config(tmp_path):
    def is_finished(data_hash="abc", **keys):
        return runs.finished_outcome(path, config_of(tmp_path, **keys), data_hash) is not None

    path = tmp_path / "result.json"
    config, history = config_of(tmp_path, epochs="2"), [{"epoch": 2, "locked_acc": 90, "orig_acc": 20}]
    result = {**runs.summary(config, "basic", "", history), "data_sha256": "abc", "config": config}
    damaged = [{**result, "config": None}, {**result, "locked_acc": "a"}, {"epochs": 2, "data_sha256": "abc"}]
    result, *damaged = map(json.dumps, [result, *damaged])
    for content, finished in {result: "2", **dict.fromkeys([*damaged, "{", "[]"], "")}.items():
        path.write_text(content)
        assert [epochs for epochs in "123" if is_finished(epochs=epochs)] == list(finished)
    path.write_text(result)
    assert is_finished(epochs="2") and not is_finished("abd", epochs="2") and not is_finished(epochs="2", seed="1")


def test_a_run_that_starts_again_empties_its_folder_alone(tmp_path):
    """Not what a link in it leads to."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "seed0"
    for path in (elsewhere / "kept", folder / "locked" / "events", folder / "log.txt", folder / ".lock"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    (folder / "checkpoints").symlink_to(elsewhere)
    runs.prepare_folder(folder, Namespace(resume=False, overwrite=True))
    assert [path.name for path in folder.iterdir()] == [".lock"] and (elsewhere / "kept").exists()


def test_a_start_of_which_no_epoch_was_kept_is_not_noted(tmp_path):
    for first in (1, 3, 3):
        starts = runs.note_start(tmp_path / "made_with.json", range(first, 6), torch.device("cpu"))
    assert [start["from_epoch"] for start in starts] == [1, 3]
