"""The three commands of the README on the digits, in short, and what they say to a user's mistakes."""

import errno
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import inputs
import lock
import lockfiles
import runs
import train
import utils
from config import KEYS, load_config
from experiments import __main__ as study
from models import base
from tests.conftest import ROOT, call, lock_flags, make_work_path, manifest_of, run_of

PAGES = [ROOT / "README.md", *(ROOT / "results").glob("*.md"), *(ROOT / "docs").glob("*.md")]
TRAIN = ["--epochs", 4, "--batch_size", 32, "--mixup", "True", "--augmentation.cutout", "True", "--ckpt_name", "state"]


def load(place, name):
    return torch.cat(torch.load(place / name))


@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize("suffix", ["basic", "50_horiz"])
def test_locked_files_are_aligned_with_the_data_set(place, split, suffix):
    originals, labels, *_ = data.load_digits(None, split)
    images = load(place, f"{split}_image_{suffix}")
    assert images.dtype == torch.uint8 and images.shape == (96, 3, 32, 32)
    assert load(place, f"{split}_label_{suffix}").dtype == torch.int64
    assert torch.equal(load(place, f"{split}_label_{suffix}"), labels[:96])
    distances = (data.to_float(images) - data.to_float(originals[:96])).flatten(1).norm(dim=1)
    bound = 0.5 if suffix == "basic" else 0.5 * 2**0.5  # two spliced balls reach farther
    assert 0.05 < distances.mean() and distances.max() <= bound + 0.5 / 255 * 3072**0.5
    assert (images != originals[:96]).any(dim=(1, 2, 3)).all()


def test_all_methods_at_once_give_the_files_that_each_gives_alone(place, command, monkeypatch, tmp_path):
    attacks, attack = [], lock.attack
    monkeypatch.setattr(
        lock, "attack", lambda *args, **options: attacks.append(len(args[1])) or attack(*args, **options)
    )
    command(lock.main, *lock_flags(place), "--lock-data", tmp_path, "--lock-method", "all")
    assert sum(attacks) == 4 * (96 + 96)  # four target maps, two splits
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 4 * 5
    for suffix in ("basic", "50_horiz"):
        for name in (f"train_image_{suffix}", f"test_image_{suffix}", f"test_label_{suffix}"):
            assert (tmp_path / name).read_bytes() == (place / name).read_bytes()
        alone, together = (manifest_of(folder, suffix) for folder in (place, tmp_path))
        assert alone["report"] == together["report"]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A work path, in which four epochs were trained without a stop."""
    work = make_work_path(tmp_path_factory.mktemp("whole"), place)
    call(train.main, "--work-path", work, *TRAIN)
    return work


@pytest.fixture
def stopped(work, command, monkeypatch):
    """A work path, in which the same training was stopped in its third epoch."""
    run_epoch = train.run_epoch

    def stop_in_epoch_3(learner, step, data, epoch, *rest):
        record = run_epoch(learner, step, data, epoch, *rest)
        if epoch == 3:
            raise KeyboardInterrupt
        return record

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "run_epoch", stop_in_epoch_3)
        command(train.main, "--work-path", work, *TRAIN)
    time.sleep(1)  # TensorBoard reads files in the order of the seconds they were begun in
    return work


def check_event_files(folder, result):
    """The curves of both accuracies are those of the result's history, once for each evaluation; all else is there."""
    for name, key in {"locked": "locked_acc", "original": "orig_acc"}.items():
        events = EventAccumulator(str(folder / name)).Reload().Scalars("accuracy/test")
        assert [event.step for event in events] == [record["epoch"] for record in result["history"]]
        assert [event.value for event in events] == pytest.approx([record[key] for record in result["history"]])
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, result["epochs"] + 1))
    assert events.Scalars("final/orig_acc")[0].value == pytest.approx(result["orig_acc"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert b"lr_scheduler.base_lr" in events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert len(events.Images("images/originals, locked, 10 x difference")) == 1


def test_what_a_run_leaves_behind(whole, place):
    folder, result = run_of(whole)
    assert [record["epoch"] for record in result["history"]] == [1, 3, 4]  # the first, every third, the last
    assert [start["from_epoch"] for start in result["made_with"]] == [1]
    assert {"state.pth.tar", "state_best.pth.tar", "log.txt", "images.png"} <= {path.name for path in folder.iterdir()}
    log = (folder / "log.txt").read_text()
    assert "no CUDA GPU was found" in log
    assert "  preresnet8, basic, seed 0, 4 epochs: locked " in log.splitlines()[-1]
    shown = train.runs.pictures(data.load_digits(None, "test").images[:10], load(place, "test_image_basic")[:10])
    assert (data.to_float(data.read_image(folder / "images.png")) - shown).abs().max() < 1 / 255
    best = torch.load(folder / "state_best.pth.tar")
    history = json.loads(best["history"])
    assert best["epoch"] == result["best_epoch"] == max(history, key=lambda record: record["locked_acc"])["epoch"]
    check_event_files(folder, result)


def test_a_run_that_is_stopped_and_goes_on_ends_as_one_that_is_not(whole, stopped, command):
    """Every bit of its state, its results, and its curves."""
    command(train.main, "--work-path", stopped, *TRAIN, "--resume")
    (folder, result), (undisturbed, expected) = run_of(stopped), run_of(whole)
    for name in ("state.pth.tar", "state_best.pth.tar"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    starts = result.pop("made_with")
    assert [start["from_epoch"] for start in starts] == [1, 3]  # the third epoch was not kept
    assert "--resume" in starts[1]["command"] and "--resume" not in starts[0]["command"]
    del expected["made_with"]
    assert result == expected
    check_event_files(folder, result)
    (folder / "result.json").unlink()  # as where the process is killed before it is written
    command(train.main, "--work-path", stopped, *TRAIN, "--resume")
    result = run_of(stopped)[1]
    assert result.pop("made_with") == starts and result == expected


def test_a_run_may_end_earlier_than_it_was_to(stopped, command):
    """With an evaluation of its last epoch, though none was due."""
    command(train.main, "--work-path", stopped, *TRAIN, "--resume", "--epochs", 2)
    folder, result = run_of(stopped)
    assert [record["epoch"] for record in result["history"]] == [1, 2] and result["epochs"] == 2
    assert torch.load(folder / "state_best.pth.tar")["epoch"] == result["best_epoch"]
    check_event_files(folder, result)


def test_a_finished_run_is_not_written_again(whole, command, capsys, tmp_path):
    """Whatever its checkpoints are; only a picture that is absent is drawn."""
    work = tmp_path / "finished"
    shutil.copytree(whole, work)
    folder, _ = run_of(work)
    (folder / "images.png").unlink()
    (folder / "state.pth.tar").write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before[folder / "images.png"] = (run_of(whole)[0] / "images.png").read_bytes()
    for more in ([], ["--eval_freq", 2]):
        command(train.main, "--work-path", work, *TRAIN, "--resume", *more)
        out = capsys.readouterr().out.splitlines()
        assert out[-1].startswith("preresnet8, basic, seed 0, 4 epochs: locked ")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_is_trained_on_and_tested_with(place, work, command, monkeypatch):
    """A control trains on as many originals, and a subset is of the training set; preprocessing changes all three sets
    alike, and leaves their hash."""
    (plain, manifest), (control, same), (few, _), (few_originals, _) = (
        inputs.load_data(load_config(work / "config.yaml", keys))
        for keys in ({}, {"train_on": "original"}, {"subset": "7"}, {"subset": "7", "train_on": "original"})
    )
    seen = []
    monkeypatch.setattr(train.runs, "write_pictures", lambda data, *rest: seen.append(data))
    command(train.main, "--work-path", work, "--epochs", 1, "--preprocess.bits", 1)
    bits, kept = seen[0], torch.load(work / "basic" / "seed0" / "ckpt.pth.tar")["data"]
    assert kept == inputs.hash_data(plain) != inputs.hash_data(control)
    originals = data.load_digits(None, "train").first(96)
    assert torch.equal(control["train"][0], originals.images) and torch.equal(control["train"][1], originals.labels)
    assert torch.equal(plain["train"][0], torch.cat(torch.load(place / "train_image_basic"))) and same == manifest
    assert list(plain) == list(bits) == ["train", "locked", "original"]
    assert torch.equal(plain["original"][0], data.load_digits(None, "test").images)  # all, though the lock is of 96
    for name, (images, labels) in plain.items():
        assert torch.equal(bits[name][0], images // 128 * 128) and torch.equal(bits[name][1], labels)
        if name != "train":
            assert torch.equal(control[name][0], images) and torch.equal(few[name][0], images)
    for whole, part in ((plain, few), (control, few_originals)):
        assert all(torch.equal(part["train"][kind], whole["train"][kind][:7]) for kind in (0, 1))


def test_a_model_sees_images_enlarged_in_training_and_in_tests(work, command, monkeypatch):
    seen, make_model = set(), train.make_model

    def make_spied_model(config):
        model = make_model(config)
        model.register_forward_pre_hook(lambda model, inputs: seen.add((model.training, *inputs[0].shape[1:])))
        return model

    monkeypatch.setattr(train, "make_model", make_spied_model)
    command(train.main, "--work-path", work, "--epochs", 1, "--batch_size", 32, "--enlarge", 2)
    assert seen == {(True, 3, 64, 64), (False, 3, 64, 64)}


def test_each_method_and_seed_has_its_own_folder(place, work, command):
    quick = ["--epochs", 1, "--batch_size", 32]
    command(train.main, "--work-path", work, *quick, "--lock-method", "horiz", "--seed", 7)
    result = json.loads((work / "50_horiz" / "seed7" / "result.json").read_text())
    assert (result["lock_method"], result["seed"]) == ("horiz", 7)
    assert result["config"]["locked_test_label"] == f"{place}/test_label_50_horiz"


def test_resume_where_nothing_was_started_starts(work, command, user_error, capsys):
    flags, folder = ["--work-path", work, "--epochs", 1, "--resume", "--use_gpu", False], work / "basic" / "seed0"
    command(train.main, *flags, "--ckpt_path", "checkpoints")
    assert (folder / "checkpoints" / "ckpt.pth.tar").exists()
    out = capsys.readouterr().out
    assert "nothing to resume" in out and "GPU was found" not in out  # none was looked for
    (folder / "result.json").unlink()
    assert f"there is {folder}/checkpoints/ckpt" in user_error(train.main, *flags)  # not where one would go on now


def test_a_run_without_checkpoints_is_not_started_again(place, work, locked, command, user_error, capsys, tmp_path):
    run = ["--work-path", work, "--epochs", 1, "--preprocess.bits", 1]
    command(train.main, *run)
    folder = work / "basic" / "seed0"
    result = (folder / "result.json").read_bytes()
    told = capsys.readouterr().out.splitlines()[-1]
    gone = ["--resume", "--ckpt_name", "other"]
    for same in ([], ["--lock-data", locked]):
        command(train.main, *run, *gone, *same)
        finished = f"{folder}: finished already (--overwrite starts it again)"
        assert capsys.readouterr().out.splitlines() == [finished, told]
    picture = (folder / "images.png").read_bytes()
    (folder / "images.png").unlink()
    command(train.main, *run, *gone)
    assert (folder / "images.png").read_bytes() == picture
    command(lock.main, *lock_flags(place, tmp_path / "other"), "--attack-lr", 0.2)
    lock_data = ["--lock-data", tmp_path / "other"]
    for other in (["--epochs", 2], ["--batch_size", 9], ["--precision", "float16"], lock_data):
        line = user_error(train.main, *run, *gone, *other)
        assert f"{folder}/result.json, but no {folder}/other.pth.tar" in line
    assert (folder / "result.json").read_bytes() == result
    (folder / "result.json").rename(folder / "kept")
    assert f"{folder}/ckpt" in user_error(train.main, *run, "--resume", "--ckpt_name", "other")
    (folder / "ckpt.pth.tar").unlink()
    line = user_error(train.main, *run, "--resume")
    assert f"{folder}/ckpt_best.pth.tar, but no {folder}/ckpt.pth.tar" in line


def test_a_result_is_written_last(work, user_error, monkeypatch):
    """So that a run that has one lacks nothing else."""
    monkeypatch.setattr(runs, "add_hparams", Mock(side_effect=OSError(errno.ENOSPC, "the disk is full")))
    folder = work / "basic" / "seed0"
    assert f"the disk is full: '{folder}'" in user_error(train.main, "--work-path", work, "--epochs", 1)
    assert not (folder / "result.json").exists()


def test_what_a_run_may_be_resumed_with(place, work, command, user_error, capsys, tmp_path):
    """The same data under another path, more epochs where the schedule does not depend on them, and no precision."""
    for path in place.glob("*_basic*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = ["--lock-data", tmp_path]
    run = ["--work-path", work]
    command(train.main, *run, "--epochs", 1, "--precision", "bfloat16")
    command(train.main, *run, "--epochs", 2, "--resume", *moved)
    assert "in bfloat16 (as it was begun)" in capsys.readouterr().out
    line = user_error(train.main, *run, "--epochs", 2, "--resume", "--precision", "float32")
    assert "trained with precision bfloat16, but it is float32 now" in line
    line = user_error(train.main, *run, "--epochs", 1, "--resume")
    assert "the run has 2 epochs already; it cannot end after 1" in line
    assert "give one of them" in user_error(train.main, *run, "--epochs", 3, "--resume", "--overwrite")
    (tmp_path / "lock_basic.json").unlink()
    (tmp_path / "train_image_basic").write_bytes((place / "train_image_50_horiz").read_bytes())
    assert "trained on other data" in user_error(train.main, *run, "--epochs", 2, "--resume", *moved)
    cosine = [*run, "--seed", 1, "--lr_scheduler.type", "COSINE"]
    command(train.main, *cosine, "--epochs", 1)
    line = user_error(train.main, *cosine, "--epochs", 2, "--resume")
    assert "trained with epochs 1, but it is 2 now" in line


def test_a_run_is_never_deleted_unasked(work, command, user_error):
    run = ["--work-path", work, "--epochs", 1]
    command(train.main, *run, "--ckpt_name", "mine")
    folder = work / "basic" / "seed0"
    (folder / "result.json").unlink()
    assert "holds a run already" in user_error(train.main, *run)
    assert "nesterov" in user_error(train.main, *run, "--overwrite", "--optimize.momentum", 0)
    assert (folder / "mine.pth.tar").exists()
    command(train.main, *run, "--overwrite")
    assert not (folder / "mine.pth.tar").exists()
    (folder / "result.json").unlink()
    (folder / "made_with.json").write_text("[{")
    assert "made_with.json: damaged" in user_error(train.main, *run, "--resume")


def test_training_goes_on_from_pretrained_weights(place, work, command, user_error, capsys):
    run = ["--work-path", work, "--epochs", 1, "--precision", "float32"]
    command(train.main, *run, "--seed", 50)
    given = work / "basic" / "seed50" / "ckpt.pth.tar"
    trained = [*run, "--seed", 51, "--pretrained", given, "--lr_scheduler.base_lr", 0]
    for more in ([], ["--seed", 53, "--resume"]):  # as python -m experiments gives it from the start
        command(train.main, *trained, *more)
        assert f"pretrained: {given}\n" in capsys.readouterr().out
    digest = hashlib.sha256(given.read_bytes()).hexdigest()
    before, after = (torch.load(given.parents[1] / seed / "ckpt.pth.tar")["model"] for seed in ("seed50", "seed51"))
    weights = [name for name in before if name.endswith((".weight", ".bias"))]
    assert len(weights) > 10 and all(torch.equal(before[name], after[name]) for name in weights)
    line = user_error(train.main, *run, "--seed", 50, "--overwrite", "--pretrained", place / "none")
    assert "none: no such file" in line and given.exists()
    line = user_error(train.main, *run, "--seed", 50, "--overwrite", "--pretrained", given)  # of the run itself
    assert f"{given}: --overwrite would delete it" in line and given.exists()
    given.rename(work / "gone")  # a run that has begun needs it no more
    command(train.main, *trained, "--epochs", 2, "--resume")
    starts = json.loads((given.parents[1] / "seed51" / "result.json").read_text())["made_with"]
    assert [start.get("pretrained_sha256") for start in starts] == [digest, None]


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB."),
        RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
    ids=lambda error: f"{error!r:.40}",
)
def test_a_full_memory_is_one_line(user_error, error):
    def main():
        raise error

    assert "the memory is full; take smaller batches" in user_error(main)


def test_mistakes_in_training(place, work, user_error, command, tmp_path):
    command(train.main, "--work-path", work, "--epochs", 1)
    assert "holds a run already: go on with --resume" in user_error(train.main, "--work-path", work)
    line = user_error(train.main, "--work-path", work, "--resume", "--batch_size", 8)
    assert "trained with batch_size 128, but it is 8 now" in line
    checkpoint = work / "basic" / "seed0" / "ckpt.pth.tar"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    line = user_error(train.main, "--work-path", work, "--resume")
    assert f"{checkpoint}: damaged" in line and "there is no other; start again with --overwrite" in line
    assert "config.yaml: no such file" in user_error(train.main, "--work-path", tmp_path)
    assert "--epoch; did you mean 'epochs'?" in user_error(train.main, "--work-path", work, "--epoch", 3)
    assert "or 'lr_scheduler.base_lr' or" in user_error(train.main, "--work-path", work, "--lr", 1)
    assert "--blur; did you mean 'preprocess.blur'?" in user_error(train.main, "--work-path", work, "--blur", 1)
    assert "--epochs: expected a whole number, found 'x'" in user_error(
        train.main, "--work-path", work, "--epochs", "x"
    )
    elsewhere = ["--lock-data", tmp_path, "--lock-method", "horiz"]
    assert f"{tmp_path}/train_image_50_horiz: no such file" in user_error(train.main, "--work-path", work, *elsewhere)
    line = user_error(train.main, "--work-path", work, "--lock-method", "mixup", "--lambd", 0.1234567)
    assert f"train_image_12.34567_mixup: no such file; make it with python lock.py --lock-data {place}" in line
    assert "--lambd 0.1234567 " in line
    assert "--alpha: name a --lock-method that it is for, or leave it out" in user_error(
        train.main, "--work-path", work, "--alpha", 0.3
    )
    line = user_error(train.main, "--work-path", work, "--lock-method", "mixup", "--alpha", 0.3)
    assert "--alpha: name a --lock-method that it is for, or leave it out" in line
    alone = ["--architecture", "mobilenet_v2", "--batch_size", 95, "--overwrite"]  # of 96 images
    assert "batch_size 95: leaves the last of 96 images" in user_error(train.main, "--work-path", work, *alone)
    line = user_error(train.main, "--work-path", work, "--architecture", "vit", "--enlarge", 2, "--overwrite")
    assert "vit, enlarge 2: does not take images of 64x64 pixels" in line
    line = user_error(train.main, "--work-path", work, "--subset", 97)
    assert "subset is 97, but there are 96 images to train on" in line
    assert checkpoint.exists()
    line = user_error(
        train.main, "--work-path", work, "--locked_train_label", place / "test_label_basic", "--dataset", "cifar10"
    )
    assert "CIFAR-10 is not there" in line


def test_mistakes_in_locking(place, user_error, tmp_path):
    elsewhere = [*lock_flags(place), "--lock-data", tmp_path / "new"]
    assert "--eps: '-1' is not a number of at least 0" in user_error(lock.main, *elsewhere, "--eps=-1")
    assert "--subset: '1.5' is not a whole number of at least 1" in user_error(lock.main, *elsewhere, "--subset", 1.5)
    assert "--alpha: '1.5' is not a number from 0 to 1" in user_error(lock.main, *elsewhere, "--alpha", 1.5)
    for flag, value in {"--lambd": 2, "--attack-lr": "nan", "--eps": "inf"}.items():
        assert f"{flag}: '{value}' is not a number" in user_error(lock.main, *elsewhere, flag, value)
    assert "no such checkpoint" in user_error(lock.main, *elsewhere, "--resume-path", tmp_path / "none")
    line = user_error(lock.main, *elsewhere, "--lock-method", "basic", "mixup", "--alpha", 0.3)
    assert "--alpha: name a --lock-method that it is for, or leave it out" in line
    assert "CIFAR-10 is not there" in user_error(lock.main, *elsewhere, "--dataset", "cifar", "--orig-data", tmp_path)
    line = user_error(lock.main, *elsewhere, "--attack-steps", 10**401)
    assert "is not a whole number from 0 to 1000000" in line
    assert "--verify: is empty; give it a value" in user_error(lock.main, "--verify", "")
    assert "--key-out: is empty; give it a value" in user_error(lock.main, *elsewhere, "--key-out=")
    assert "--lock-method: is empty" in user_error(lock.main, *elsewhere, "--lock-method", "basic", "")
    assert "error: the first argument: is empty" in user_error(lock.main, "", "--verify", place)
    assert "a=/train: no such folder" in user_error(lock.main, *elsewhere, "--dataset", "folder", "--orig-data=a=")
    assert "invalid choice: 'vertical'" in user_error(lock.main, *elsewhere, "--lock-method", "vertical")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("main", [lock.main, train.main, base.main, study.main], ids=lambda main: main.__module__)
def test_help(command, capsys, main):
    with pytest.raises(SystemExit) as exit:
        command(main, "--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith("usage: command")
    assert main is not train.main or all(f"--{key} VALUE" in out for key in KEYS)


def test_a_mistake_from_the_shell():
    """One line, also where git is not installed. All at once: each takes seconds to import what it needs."""
    env = {key: value for key, value in os.environ.items() if key != "GIT_PYTHON_REFRESH"} | {"PATH": ""}
    options = {"env": env, "cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    scripts = ["lock.py", "train.py", "-m models.base", "-m experiments"]
    started = [subprocess.Popen([sys.executable, *script.split(), "--no-such-flag"], **options) for script in scripts]
    errors = [process.communicate()[1] for process in started]
    for script, process, error in zip(scripts, started, errors):
        assert process.returncode == 2 and len(error.strip().splitlines()) == 1, script


@pytest.mark.parametrize("script", ["lock.py", "train.py"])
def test_who_interrupts_a_command_is_told_how_it_goes_on(script, monkeypatch):
    told = []
    monkeypatch.setattr(utils, "run_command", lambda main, if_interrupted: told.append(if_interrupted))
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "the same command" in told[0] and "goes on" in told[0]


def test_what_a_run_draws_from_and_whether_it_is_compiled(work, command, monkeypatch):
    """Its seed; and auto asks whether it is on a GPU, and how many images it will train on, each time counted."""
    seeds, asked, make_model = [], [], train.make_model
    monkeypatch.setattr(train.utils, "pick_compile", lambda name, *rest: asked.append(rest) or "never")
    monkeypatch.setattr(train, "make_model", lambda *args: seeds.append(torch.initial_seed()) or make_model(*args))
    command(train.main, "--work-path", work, "--epochs", 2, "--seed", 77)
    attacked = ["--adversarial.eps", 0.5, "--adversarial.attack_steps", 2]
    command(train.main, "--work-path", work, "--epochs", 1, "--seed", 78, *attacked)
    assert seeds == [77, 78] and asked == [(False, 2 * 96), (False, 96 * 4)]


def test_mistakes_in_names_and_labels(place, work, user_error, tmp_path, locked):
    run = ["--work-path", work, "--epochs", 1]
    for name in ("../a", ".a", "seed1"):
        assert "must be the name of a folder" in user_error(train.main, *run, "--name", name)
    assert "--name plain: is what tables call" in user_error(train.main, *run, "--name", "plain")
    for name in ("test_image", "test_label"):
        (tmp_path / f"{name}_other").write_bytes((place / f"{name}_basic").read_bytes())
    flags = ["--locked_test_image", tmp_path / "test_image_other", "--locked_test_label", tmp_path / "test_label_other"]
    line = user_error(train.main, *run, *flags)
    assert "test_image_other: has no manifest, but the files of the other split do" in line
    line = user_error(train.main, *run, "--locked_train_image", place / "train_label_basic")
    assert "train_label_basic: not the name of a file of images" in line
    path = locked / "lock_basic.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["classes"][:2] = ["1", "0"]
    path.write_text(json.dumps(manifest))
    assert "its classes are not those of none" in user_error(train.main, *run, "--lock-data", locked)
    path.unlink()
    line = user_error(train.main, *run, "--lock-data", locked, "--num_classes", 9)
    assert "labels go from 0 to 9, but num_classes is 9" in line
    labels = torch.arange(96) % 10 - 1
    (locked / "test_label_basic").write_bytes(lockfiles.to_bytes(labels))
    (locked / "train_label_basic").write_bytes(lockfiles.to_bytes(labels))
    assert "labels go from -1 to 8" in user_error(train.main, *run, "--lock-data", locked)


def test_the_defaults_are_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lock.py"])
    args = lock.parse_arguments()
    assert (args.dataset, args.arch, args.lock_method) == ("cifar", "resnet50", ["basic"])
    assert (args.eps, args.attack_lr, args.attack_steps, args.alpha, args.lambd) == (0.5, 0.1, 100, 0.5, 0.5)
    best = "./logs/checkpoints/dir/resnet50/checkpoint.pt.best"
    assert (args.orig_data, args.lock_data, args.resume_path) == ("./data/cifar10", "./data", best)
    for name in ("cifar", "folder"):
        monkeypatch.setattr(sys, "argv", f"base --dataset {name} --adv-train 0 --arch resnet50 --out-dir o".split())
        args = base.parse_arguments(base.import_robustness())
        assert (args.epochs, args.batch_size, args.lr, args.weight_decay, args.step_lr) == (150, 128, 0.1, 5e-4, 50)


def test_the_commands_of_the_readmes_are_understood(monkeypatch):
    """Those that stand at the beginning of a line: their flags, and the config files that they name."""

    def parse_experiments():
        args, rest = study.parse_arguments()
        for command in study.commands(args, rest) if args.run else []:
            monkeypatch.setattr(sys, "argv", command[1:])
            train.parse_arguments()

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(base, "folder_of", lambda args: None)  # whatever lies in logs/
    parse = {
        "lock.py": lock.parse_arguments,
        "train.py": train.parse_arguments,
        "-m models.base": lambda: base.parse_arguments(base.import_robustness()),
        "-m experiments": parse_experiments,
    }
    text = "".join(page.read_text() for page in PAGES)
    commands = re.findall(r"^python (lock\.py|train\.py|-m models\.base|-m experiments) (.*)$", text, re.MULTILINE)
    assert len(commands) > 40
    for script, flags in commands:
        if "experiments/digits/alexnet" not in flags:  # which a command before it makes
            monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
            parse[script]()


def test_the_links_of_the_readmes_lead_somewhere():
    """To a file that there is and, after a #, to one of its headings, as GitHub names their anchors."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
        assert links, page
        for path, anchor in links:
            target = page.parent / path if path else page
            assert target.exists(), (page, path)
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors or not anchor, (page, path, anchor)
