"""The checkpoints of a training run: what they keep, the order in which they are written, and what is refused."""

import errno
import itertools
import json
import os
import threading
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models import mobilenet_v2

import checkpoints
import train
from tests.conftest import config_of, flip_bit, learner_of, new_learner, two_tones
from utils import UserError, flatten, serialize


def test_the_state_of_a_float16_training_is_kept(tmp_path):
    config = config_of(tmp_path, architecture="preresnet8", precision="float16")
    learners = [new_learner(config) for _ in range(2)]
    images, labels = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 10
    learners[0].scaler.load_state_dict(learners[0].scaler.state_dict() | {"scale": 2.0**100})  # too much: it is halved
    train.train_epoch(train.make_step(learners[0], config), images, labels, config)
    momentum = [state["momentum_buffer"] for state in learners[0].optimizer.state.values()]
    assert momentum and not any(buffer.any() for buffer in momentum)  # the step was left out
    checkpoints.restore(checkpoints.snapshot(learners[0], 1, [], config, "data"), learners[1], config, "data")
    assert learners[1].scaler.get_scale() == learners[0].scaler.get_scale() == 2.0**99
    for mine, theirs in zip(learners[0].model.parameters(), learners[1].model.parameters()):
        assert torch.equal(mine, theirs)


def test_a_snapshot_stays_as_it_is_while_training_goes_on(tmp_path):
    config = config_of(tmp_path, architecture="preresnet8", precision="float32")
    learner, images, labels = new_learner(config), *two_tones(16, [0, 1])
    before = learner.model.fc.weight.detach().clone()
    snapshots = [checkpoints.snapshot(learner, 1, [], config, "data")]
    for group in learner.optimizer.param_groups:
        group["lr"].fill_(0.5)
    train.train_epoch(train.make_step(learner, config), images, labels, config)
    snapshots.append(checkpoints.snapshot(learner, 2, [], config, "data"))
    assert torch.equal(snapshots[0]["model"]["fc.weight"], before)
    then, now = ([leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)] for state in snapshots)
    assert len(now) > 50 and not any(torch.equal(*pair) for pair in zip(then, now, strict=True))


def test_what_runs_in_the_background_takes_turns_and_tells_its_errors():
    done, go_on = [], threading.Event()

    def wait_and_append(value):
        go_on.wait()
        done.append(value)

    with checkpoints.background() as start:
        start(wait_and_append, 1)
        assert done == []  # it did not wait
        go_on.set()
        start(done.append, 2)
        start(done.append, 3)
    assert done == [1, 2, 3]
    for later in ([], [partial(done.append, 4)]):
        with pytest.raises(ZeroDivisionError), checkpoints.background() as start:
            for function in [partial(divmod, 1, 0), *later]:
                start(function)
    assert done == [1, 2, 3]


def test_the_first_of_equally_good_epochs_is_the_best():
    kept, history, learner = [], [{"epoch": 1, "locked_acc": 50.0}], learner_of(nn.Linear(1, 1), lr=0)
    for epoch, accuracy in {2: 50.0, 3: 51.0}.items():
        history.append({"epoch": epoch, "locked_acc": accuracy})
        kept.append(checkpoints.is_best(checkpoints.snapshot(learner, epoch, history, {}, "")))
    assert kept == [False, True]


def test_a_checkpoint_of_something_else(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "ckpt.pth.tar")
    with pytest.raises(UserError, match="ckpt.pth.tar: damaged"):
        checkpoints.recover(tmp_path / "ckpt.pth.tar", log=print)


def test_a_run_goes_on_from_the_checkpoint_before_alone(tmp_path):
    path = tmp_path / "ckpt.pth.tar"
    state = dict.fromkeys(checkpoints.CHECKPOINT_KEYS, 1) | {"history": '[{"epoch": 1, "locked_acc": 50}]'}
    torch.save(state, checkpoints.beside(path, "previous"))
    assert checkpoints.is_begun(path) and checkpoints.recover(path, log=print)["epoch"] == 1


@pytest.mark.parametrize("number, kind", [(errno.EACCES, PermissionError), (errno.EIO, OSError)])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, number, kind):
    """Nor is it deleted for the one before it."""
    path = tmp_path / "ckpt.pth.tar"
    for each in (path, checkpoints.beside(path, "previous")):
        torch.save(dict.fromkeys(checkpoints.CHECKPOINT_KEYS, 1), each)
    load = torch.load

    def denied(file, **options):
        if file == path:
            raise OSError(number, os.strerror(number))
        return load(file, **options)

    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(kind, match=f"'{path}'"):
        checkpoints.recover(path, log=print)
    assert path.exists()


def test_a_run_that_comes_from_a_cpu_draws_anew_on_a_gpu(monkeypatch, tmp_path):
    config, seeds, learner = config_of(tmp_path, seed="5"), [], learner_of(nn.Linear(1, 1), lr=0)
    state = checkpoints.snapshot(learner, 3, [], config, "")
    assert state["cuda_rng"] is None
    monkeypatch.setattr(checkpoints, "on_gpu", lambda learner: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    checkpoints.restore(state, learner, config, "")
    assert seeds == [8]


def test_a_run_on_a_gpu_draws_on_from_where_it_was(monkeypatch, tmp_path):
    config, given, learner = config_of(tmp_path), [], learner_of(nn.Linear(1, 1), lr=0)
    monkeypatch.setattr(checkpoints, "on_gpu", lambda learner: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(3))
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    checkpoints.restore(checkpoints.snapshot(learner, 3, [], config, ""), learner, config, "")
    assert torch.equal(*given, torch.arange(3))


def test_the_learning_rate_and_momentum_are_the_configs(tmp_path):
    config = config_of(tmp_path, architecture="preresnet8")
    learner = new_learner(config)
    lr, state = learner.optimizer.param_groups[0]["lr"], checkpoints.snapshot(learner, 1, [], config, "")
    state["optimizer"]["param_groups"][0].update(lr=7.0, momentum=0.1)
    checkpoints.restore(state, learner, config, "")
    (group,) = learner.optimizer.param_groups
    assert torch.equal(group["lr"], lr) and group["momentum"] == 0.9


def test_a_run_that_is_older_than_a_key_goes_on(tmp_path):
    config, learner = config_of(tmp_path), learner_of(nn.Linear(1, 1), lr=0)
    state = checkpoints.snapshot(learner, 1, [], config, "")
    state["config"] = json.dumps({key: value for key, value in flatten(config).items() if key != "pretrained"})
    checkpoints.restore(state, learner, config, "")


def test_what_a_run_may_change(tmp_path):
    config, learner = config_of(tmp_path), learner_of(nn.Linear(1, 1), lr=0)
    state = checkpoints.snapshot(learner, 1, [], config, "")
    free = {"compile": "never", "use_gpu": "False", "test_batch": "7", "eval_freq": "7", "ckpt_name": "x"}
    checkpoints.restore(state, learner, config_of(tmp_path, **free), "")
    with pytest.raises(UserError, match="trained with batch_size 128, but it is 7 now"):
        checkpoints.restore(state, learner, config_of(tmp_path, batch_size="7"), "")
    for schedule in ("STEP", "COSINE", "HTD"):  # at the first, an epoch's learning rate does not depend on their number
        keys = {"lr_scheduler.type": schedule}
        state = checkpoints.snapshot(learner, 1, [], config_of(tmp_path, **keys), "")
        error = pytest.raises(UserError, match="trained with epochs 250, but it is 300 now")
        with nullcontext() if schedule == "STEP" else error:
            checkpoints.restore(state, learner, config_of(tmp_path, epochs="300", **keys), "")


@pytest.mark.parametrize("stopped_after", range(4))
def test_the_best_checkpoint_is_the_best_of_those_kept(tmp_path, monkeypatch, stopped_after):
    """Whichever write the run was stopped after, and also where an epoch, trained again, is not the best any more."""
    path, history, learner, writes = tmp_path / "ckpt.pth.tar", [], learner_of(nn.Linear(1, 1), lr=0), itertools.count()
    write = checkpoints.write_file

    def write_or_stop(*args):
        if next(writes) == stopped_after:
            raise KeyboardInterrupt
        write(*args)

    def keep(epoch, accuracy):
        history.append({"epoch": epoch, "locked_acc": accuracy})
        checkpoints.write_checkpoint(path, checkpoints.snapshot(learner, epoch, history, {}, ""))

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(checkpoints, "write_file", write_or_stop)
        keep(1, 50.0)
        keep(2, 51.0)
    state = checkpoints.recover(path, log=print)
    assert (state["epoch"] if state else 0) == (stopped_after + 1) // 2
    history[:] = json.loads(state["history"]) if state else []
    if len(history) < 2:
        keep(len(history) + 1, 49.0)
    for _ in range(2):
        best = checkpoints.load_whole(checkpoints.beside(path, "best"))
        assert best["epoch"] == checkpoints.best_record(history)["epoch"]
        checkpoints.recover(path, log=print)  # which leaves it as it is, where the last one is worse


def test_a_model_begins_with_pretrained_weights(tmp_path):
    """All but those of the last layer, where they are for another number of classes."""
    learner = new_learner(config_of(tmp_path, architecture="preresnet8", num_classes="5"))
    given = {"of_a_run": checkpoints.snapshot(learner, 1, [], {}, ""), "state_dict": learner.model.state_dict()}
    for name, content in given.items():
        torch.save(content, tmp_path / name)
        for classes, random in (10, ["fc.weight", "fc.bias"]), (5, []):
            model = train.make_model(config_of(tmp_path, architecture="preresnet8", num_classes=str(classes)))
            before = {key: value.clone() for key, value in model.state_dict().items()}
            line = checkpoints.load_pretrained(model, tmp_path / name)
            assert line == f"pretrained: {tmp_path / name}" + ", but fc.weight, fc.bias are random" * bool(random)
            for key, value in model.state_dict().items():
                assert torch.equal(value, before[key] if key in random else given["state_dict"][key])


def test_torchvisions_weights_fit(tmp_path):
    torch.save(mobilenet_v2().state_dict(), tmp_path / "weights")
    model = train.make_model(config_of(tmp_path, architecture="mobilenet_v2"))
    line = checkpoints.load_pretrained(model, tmp_path / "weights")
    assert line.endswith("but classifier.1.weight, classifier.1.bias are random")


def test_pretrained_weights_that_cannot_be(tmp_path):
    model = train.make_model(config_of(tmp_path, architecture="preresnet8"))
    files = {"text": b"weights", "other": serialize(nn.Linear(1, 1).state_dict()), "numbers": serialize({"model": 1})}
    sound = serialize(model.state_dict())
    files["flipped"] = flip_bit(sound, len(sound) // 2)  # among the weights
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, reason in {
        "absent": "no such file", "text": "not a file of weights", "numbers": "not a file of weights",
        "flipped": "not a file of weights", "other": "not of this architecture",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"pretrained: .*{name}: {reason}"):
            checkpoints.load_pretrained(model, tmp_path / name)
