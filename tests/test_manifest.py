"""What stands in a manifest, what is checked against it, and what is not done twice."""

import json
import os
import re
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

import data
import lock
import lockfiles
import shards
import train
import utils
from lockfiles import Paths
from methods import TARGET_MAPS
from tests.conftest import lock_flags
from utils import UserError

write_locks = lock.write_locks


def manifest_of(folder, suffix="basic"):
    return json.loads((folder / f"lock_{suffix}.json").read_text())


def test_the_manifest_tells_what_a_lock_is(place):
    manifest = manifest_of(place, "50_horiz")
    settings = manifest["settings"]
    assert [settings[key] for key in ("method", "alpha", "eps", "attack_lr", "attack_steps", "batch_size")] == [
        "horiz", 0.5, 0.5, 0.1, 3, 40
    ]  # fmt: skip
    assert (settings["dataset"], settings["subset"], settings["arch"]) == ("digits", 96, "preresnet8")
    assert settings["manual_seed"] == 23 and "lambd" not in settings
    assert settings["base_sha256"] == lockfiles.sha256((place / "base" / "checkpoint.pt.best").read_bytes())
    assert settings["target_maps"] == {name: list(TARGET_MAPS[name]) for name in ("T1", "T2")}
    for split in data.SPLITS:
        original = data.load_digits(None, split).first(96)
        assert settings["original_sha256"][split] == {
            "images": lockfiles.hash_tensor(original.images), "labels": lockfiles.hash_tensor(original.labels)
        }  # fmt: skip
        assert manifest["report"][split]["images"] == 96
        assert manifest["report"][split]["attacks"].keys() == {"T1", "T2"}
    names = [f"{split}_{kind}_50_horiz" for split in data.SPLITS for kind in ("image", "label")]
    assert list(manifest["files"]) == names
    for name in names:
        assert manifest["files"][name]["sha256"] == lockfiles.sha256((place / name).read_bytes())
    assert manifest["files"][names[0]]["shape"] == [96, 3, 32, 32]
    (made_with,) = manifest["made_with"]
    assert made_with["torch"] == torch.__version__ and made_with["device"].startswith("CPU")
    assert {"threads", "python", "torchvision", "numpy", "pillow"} < made_with.keys()
    assert str(place) not in (place / "lock_50_horiz.json").read_text()  # nor any other path
    assert manifest["commit"] == "0" * 40 and {"date", "sealed_with"} < manifest.keys()


def test_cifar_is_cifar10_and_the_seed_is_that_of_the_target_maps(place, command, monkeypatch, tmp_path):
    drawn, target_maps = [], lock.target_maps
    monkeypatch.setitem(data.DATASETS, "cifar", data.DATASETS["digits"])
    monkeypatch.setattr(lock, "target_maps", lambda *args: drawn.append(args) or target_maps(*args))
    flags = [*lock_flags(place, tmp_path), "--dataset", "cifar", "--orig-data", tmp_path / "cifar10"]
    command(lock.main, *flags, "--subset", 4, "--manual-seed", 5)
    assert drawn == [(10, 5)] and manifest_of(tmp_path)["settings"]["dataset"] == "cifar10"


def test_a_tensors_hash_tells_order_values_shape_and_type_apart():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    others = [images.flip(0), images + 1, images.view(2, 3, 4, 1), images.to(torch.int64)]
    assert len({lockfiles.hash_tensor(one) for one in [images, images.clone(), *others]}) == 5


def test_the_result_of_a_training_holds_the_manifest(place, work, command):
    command(train.main, "--work-path", work, "--epochs", 1)
    result = json.loads((work / "basic" / "seed0" / "result.json").read_text())
    assert result["lock"] == manifest_of(place)
    (start,) = result["made_with"]
    assert (start["torch"], start["threads"]) == (torch.__version__, torch.get_num_threads())
    assert start["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", start["commit"])
    assert abs(datetime.fromisoformat(start["date"]).timestamp() - time.time()) < 1000
    assert start["command"] == f"command --work-path {work} --epochs 1"


def test_locked_files_without_a_manifest_are_taken_and_the_log_says_so(work, locked, command, capsys):
    (locked / "lock_basic.json").unlink()
    flags = ["--work-path", work, "--epochs", 1]
    command(train.main, *flags, "--lock-data", locked)
    assert "the locked files have no manifest" in capsys.readouterr().out
    assert json.loads((work / "basic" / "seed0" / "result.json").read_text())["lock"] is None


def test_files_that_do_not_belong_together(place, work, user_error, monkeypatch):
    def refusal(**paths):
        flags = [part for key, name in paths.items() for part in (f"--locked_{key}", place / name)]
        return user_error(train.main, "--work-path", work, *flags)

    line = refusal(train_image="train_image_basic", train_label="test_label_basic")
    assert "test_label_basic: not the labels that were locked with" in line
    line = refusal(test_image="test_image_50_horiz", test_label="test_label_50_horiz")
    assert "test_image_50_horiz: another lock than that of" in line
    line = refusal(test_image="train_image_basic", test_label="train_label_basic")
    assert "given as locked_test_image, but it was locked as the train set" in line

    digits = data.DATASETS["digits"]
    changes = {
        "labels": lambda part: part._replace(labels=part.labels.flip(0)),
        "images": lambda part: part._replace(images=part.images.roll(1, 0)),
    }
    for name, change in changes.items():
        changed = digits._replace(load=lambda root, split, change=change: change(digits.load(root, split)))
        monkeypatch.setitem(data.DATASETS, "digits", changed)
        assert f"locked from other {name}, or in another order, than none has now" in refusal()
    changed = digits._replace(load=lambda root, split: changes["images"](digits.load(root, split)) if split == "train"
                              else digits.load(root, split))  # fmt: skip
    monkeypatch.setitem(data.DATASETS, "digits", changed)
    control = ["--work-path", work, "--train_on", "original"]
    assert "train_image_basic: locked from other images" in user_error(train.main, *control)
    monkeypatch.setitem(data.DATASETS, "cifar10", digits)
    line = user_error(train.main, "--work-path", work, "--dataset", "cifar10")
    assert "the data set is digits, but the config says cifar10" in line


def test_verify(place, locked, command, user_error, capsys):
    (locked / ".lock_mixup").mkdir()
    (locked / "lock_picking.json").write_text("{}")  # is no manifest's name
    command(lock.main, "--verify", locked)
    out = capsys.readouterr().out
    assert ".lock_mixup: an interrupted lock" in out
    assert "every file of lock_50_horiz.json, lock_basic.json is as it was locked" in out
    for suffix in ("50_horiz", "basic"):
        (locked / f"train_label_{suffix}").unlink()
    assert "not as they were locked: 2, see above" in user_error(lock.main, "--verify", locked)
    (locked / "lock_basic.json").write_text("{}")
    assert "lock_basic.json: not a manifest of lock.py" in user_error(lock.main, "--verify", locked)
    (locked / "lock_basic.json").write_text((place / "lock_basic.json").read_text()[:100])
    assert "lock_basic.json: not JSON, or damaged" in user_error(lock.main, "--verify", locked)
    for path in locked.glob("lock_*.json"):
        path.unlink()
    assert "holds no lock_*.json; finish its lock first" in user_error(lock.main, "--verify", locked)
    (locked / ".lock_mixup").rmdir()
    assert "holds no lock_*.json; name a folder that" in user_error(lock.main, "--verify", locked)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files={"../secret": {"sha256": lockfiles.sha256(b"secret")}}),
        lambda manifest: manifest["files"].popitem(),
        lambda manifest: manifest["files"].update({"../secret": {"sha256": lockfiles.sha256(b"secret")}}),
        lambda manifest: manifest.update(sealed_with="0" * 16),
        lambda manifest: manifest["settings"].update(classes=["../../evil", *"123456789"]),
        lambda manifest: manifest["settings"].pop("subset"),
        lambda manifest: manifest["report"]["test"].pop("psnr"),
        lambda manifest: manifest["report"]["train"].update(l2_mean=10**400),
        lambda manifest: manifest["report"]["train"]["attacks"].update({"{0}\nevery file is as it was locked": 1}),
        lambda manifest: manifest["report"]["train"]["attacks"].clear(),
        lambda manifest: manifest["settings"].update(subset=1.5),
        lambda manifest: manifest.update(files={}),
        lambda manifest: manifest["report"]["train"].update(l2_mean=True),
        lambda manifest: manifest["settings"].update(dataset="a\nb"),
    ],
)
def test_a_manifest_that_no_lock_writes(locked, user_error, change):
    """Among them what would make --verify read other files, or print what it did not find out."""
    (locked.parent / "secret").write_text("secret")
    manifest = manifest_of(locked)
    change(manifest)
    (locked / "lock_basic.json").write_text(json.dumps(manifest))
    assert "lock_basic.json: not a manifest of lock.py" in user_error(lock.main, "--verify", locked)


def test_verify_names_what_does_not_belong_there(place, locked, command, user_error, capsys):
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    (locked / "basic" / ".DS_Store").touch()  # macOS leaves it behind where somebody looked
    (locked / "train" / "0").mkdir(parents=True)
    wrong = {
        locked / "basic" / "train" / "0" / "more\x1b[2J.png": lambda path: path.write_bytes(b"more"),
        locked / "basic" / "val" / "0.png": lambda path: (path.parent.mkdir(), path.write_bytes(b"more")),
        locked / "basic" / "train" / "0" / "link": lambda path: path.symlink_to(locked / "train" / "0"),
        locked / "train_sealed_basic": lambda path: path.write_bytes(b"more"),
    }
    for path, make in wrong.items():
        command(lock.main, "--verify", locked)
        make(path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command(lock.main, "--verify", locked)
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and len(err.strip().splitlines()) == 1
        assert utils.printable(path) in out and "not as they were locked: 1, see above" in err
        path.unlink()
    (locked / "basic" / "test.sha256").write_bytes(b"")
    assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", locked)


def test_overwriting_never_replaces_the_originals(place, locked, user_error, command):
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    flags = [*lock_flags(place, locked), "--format", "png", "--eps", 0.7, "--overwrite"]
    line = user_error(lock.main, *flags, "--dataset", "folder", "--orig-data", locked / "basic")
    assert "what is handed out and the originals in" in line
    assert "and the originals in" in user_error(lock.main, *flags, "--orig-data", locked / "basic" / "train")
    for split in data.SPLITS:
        (locked / "basic" / f"{split}.sha256").unlink()
    assert f"{locked}/basic exists, and is not of a lock" in user_error(lock.main, *flags)


def test_what_is_written_is_on_the_disk_before_it_takes_a_place(place, locked, command, monkeypatch):
    """The PNG files by one sync; the manifest, which lists them, after them and by itself."""
    done = []
    for name in ("fsync", "sync", "replace"):

        def change(*args, name=name, function=getattr(os, name)):
            done.append("replace " + Path(args[1]).name if name == "replace" else name)
            return function(*args)

        monkeypatch.setattr(os, name, change)
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    tree = done.index("replace basic")
    assert done[tree - 1 :] == ["sync", "replace basic", "fsync", "fsync", "replace lock_basic.json", "fsync"]


class Cut(BaseException):
    """Ends a command as a power cut would: nothing catches it."""


@pytest.fixture
def cut(monkeypatch):
    """Runs a function until it would change the disk for the nth time; returns whether it came so far."""
    if sys.version_info < (3, 11):
        pytest.skip("pathlib does not call what is patched")

    def run(function, n):
        calls = 0

        def counted(change):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == n:
                    raise Cut
                return change(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            patch.setattr(os, "sync", lambda: None)
            for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                function()
            except Cut:
                return True
        return False

    return run


def test_methods_that_replace_older_locks_are_attacked_once(place, command, monkeypatch, tmp_path):
    """Also where the process is stopped between the files of one and of the other."""
    flags = [*lock_flags(place, tmp_path), "--subset", 4, "--lock-method", "basic", "mixup"]
    command(lock.main, *flags)
    flags += ["--eps", 0.7, "--overwrite"]
    finish = shards.finish

    def stop_before_mixup(paths, *args):
        if paths.suffix != "basic":
            raise KeyboardInterrupt
        return finish(paths, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shards, "finish", stop_before_mixup)
        command(lock.main, *flags)
    monkeypatch.setattr(lock, "attack", None)
    command(lock.main, *flags)
    manifests = [lockfiles.read_manifest(lockfiles.Paths(tmp_path, suffix)) for suffix in ("basic", "50_mixup")]
    assert [manifest["settings"]["eps"] for manifest in manifests] == [0.7, 0.7]
    assert not list(tmp_path.glob(".lock_*"))


def test_a_lock_leaves_no_file_of_the_one_that_it_replaces(place, locked, command):
    (locked / ".new_basic").mkdir()  # of a process that was killed
    (locked / ".new_basic" / "train_sealed_basic").touch()
    for form in ("png", "tensor"):
        command(lock.main, *lock_flags(place, locked), "--subset", 4, "--overwrite", "--format", form)
        command(lock.main, "--verify", locked)


@pytest.mark.parametrize("task", ["replace an older lock", "add PNG files and seals"])
def test_a_lock_is_finished_wherever_it_was_cut_off(place, command, monkeypatch, cut, tmp_path, task):
    """Before each change of the disk, from the last shard on: then either lock is whole, or the new one's shards."""
    start, handed = tmp_path / "start", []
    flags = [*lock_flags(place, start), "--subset", 4, "--batch-size", 2, "--key-out", tmp_path / "key"]
    everything = ["--format", "png", "tensor"]
    with monkeypatch.context() as patch:
        patch.setattr(lock, "write_locks", lambda *args: handed.append(args) or write_locks(*args))
        if task == "replace an older lock":
            command(lock.main, *flags, *everything)
            patch.setattr(lock, "write_locks", lambda *args: handed.append(args))
            command(lock.main, *flags, *everything, "--eps", 0.7, "--overwrite")
        else:
            command(lock.main, *flags[:-2])
            shutil.copytree(start, tmp_path / "finished")
            command(lock.main, *flags, *everything)
            start = tmp_path / "finished"
    _, _, settings, splits, args = handed[-1]

    def go_on(folder):
        locks = {"basic": lockfiles.Paths(folder, "basic")}
        manifest = lockfiles.read_manifest(locks["basic"])
        args.overwrite = manifest is not None and manifest["settings"] != settings["basic"]
        manifests = shards.prepare(locks, settings, args)
        if not manifests["basic"]:
            assert not any(shards.missing(locks, split, range(0, 4, 2)) for split in splits)
        lock.write_locks(locks, manifests, settings, splits, args)

    n, is_cut = 0, True
    while is_cut:
        n += 1
        folder = tmp_path / str(n)
        shutil.copytree(start, folder)
        is_cut = cut(lambda: go_on(folder), n)
        paths = lockfiles.Paths(folder, "basic")
        manifest = lockfiles.read_manifest(paths)
        assert manifest is None or not list(lockfiles.check_files(paths, manifest))
        go_on(folder)
        files = [path.name for form in ("tensor", "sealed") for path in paths.groups()[form]]
        assert sorted(path.name for path in folder.iterdir()) == sorted([".lock", "basic", "lock_basic.json", *files])
        manifest = lockfiles.read_manifest(paths)
        assert manifest["settings"] == settings["basic"] and len(manifest["files"]) == 8
        assert not [*lockfiles.check_files(paths, manifest), *lockfiles.check_unlisted(paths, manifest)]
        shutil.rmtree(folder)
    assert n > 30


def interrupt(monkeypatch, at):
    """Let Ctrl-C come in the attack with the number at; returns the list to which the attacks' sizes are added."""
    sizes, attack = [], lock.attack

    def interrupted(classifier, images, *rest, **options):
        sizes.append(len(images))
        if len(sizes) == at:
            raise KeyboardInterrupt
        return attack(classifier, images, *rest, **options)

    monkeypatch.setattr(lock, "attack", interrupted)
    return sizes


def forbid_attacks(monkeypatch):
    monkeypatch.setattr(lock, "attack", lambda *args: pytest.fail("an attack was computed again"))


def test_a_finished_lock_is_not_computed_again(place, locked, command, user_error, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in locked.iterdir()}
    files = {path: path.stat().st_ino for path in before}
    forbid_attacks(monkeypatch)
    command(lock.main, *lock_flags(place, locked), "--lock-method", "basic", "horiz")
    assert "lock_basic.json: finished already" in capsys.readouterr().out
    assert {path: path.stat().st_ino for path in before} == files  # nor written again
    torch.save({**torch.load(place / "base" / "checkpoint.pt.best"), "epoch": 9}, locked.parent / "other")
    line = user_error(lock.main, *lock_flags(place, locked), "--resume-path", locked.parent / "other")
    assert "was made with base_sha256 " in line
    digits = data.DATASETS["digits"]
    rolled = digits._replace(load=lambda *args: (part := digits.load(*args))._replace(images=part.images.roll(1, 0)))
    with monkeypatch.context() as patch:
        patch.setitem(data.DATASETS, "digits", rolled)
        line = user_error(lock.main, *lock_flags(place, locked), "--key-out", locked.parent / "key")
    assert "was made with original_sha256.train.images " in line and not (locked.parent / "key").exists()
    line = user_error(lock.main, *lock_flags(place, locked), "--attack-steps", 4)
    assert "was made with attack_steps 3, but now it is 4; set that back, name another folder with --lock-data" in line
    (locked / "lock_basic.json").unlink()
    assert f"{locked}/train_image_basic exists" in user_error(lock.main, *lock_flags(place, locked))
    (locked / "lock_basic.json").write_bytes(before[locked / "lock_basic.json"])
    assert {path: path.read_bytes() for path in locked.iterdir() if path.name != ".lock"} == before


def test_an_interrupted_lock_goes_on_and_leaves_the_old_one_whole_until_it_is_done(place, locked, command, monkeypatch):
    """Stopped in the second batch of the test set: after it, only that batch and the one behind it are attacked."""
    before = {path: path.read_bytes() for path in locked.iterdir()}
    sizes = interrupt(monkeypatch, at=5)
    flags = [*lock_flags(place, locked), "--eps", 0.7, "--overwrite"]
    with pytest.raises(SystemExit) as exit:
        command(lock.main, *flags)
    assert exit.value.code == 130
    assert {path: path.read_bytes() for path in before} == before
    pair = [locked / f"train_{kind}_basic" for kind in ("image", "label")]
    assert lockfiles.load_locked(*pair)[2]["settings"]["eps"] == 0.5
    command(lock.main, *flags)
    assert sizes[5:] == [40, 16]
    assert not list(locked.glob(".lock_*"))
    assert manifest_of(locked)["settings"]["eps"] == 0.7
    command(lock.main, *flags, "--lock-data", locked.parent / "undisturbed")
    for name in ("train_image_basic", "test_image_basic"):
        assert (locked / name).read_bytes() == (locked.parent / "undisturbed" / name).read_bytes()


def test_an_interrupted_lock_goes_on_with_no_other_settings(place, work, command, monkeypatch, user_error, tmp_path):
    interrupt(monkeypatch, at=1)
    with pytest.raises(SystemExit):
        command(lock.main, *lock_flags(place, tmp_path), "--eps", 0.6)
    interrupt(monkeypatch, at=3)
    with pytest.raises(SystemExit):  # nothing was finished that other settings would replace
        command(lock.main, *lock_flags(place, tmp_path))
    line = user_error(lock.main, *lock_flags(place, tmp_path), "--batch-size", 50)
    assert ".lock_basic was made with batch_size 40, but now it is 50" in line
    line = user_error(train.main, "--work-path", work, "--lock-data", tmp_path)
    assert "train_image_basic: this lock is not finished; the command that began it finishes it" in line
    sizes = interrupt(monkeypatch, at=None)
    command(lock.main, *lock_flags(place, tmp_path), "--batch-size", 50, "--overwrite")
    assert manifest_of(tmp_path)["settings"]["batch_size"] == 50 and sizes == [50, 46] * 2


def test_a_lock_goes_on_as_it_was_begun_on_another_machine(place, command, monkeypatch, tmp_path):
    """What no flag says, and each machine chooses for itself."""
    flags = lock_flags(place, tmp_path)[:-2]  # without the batch size
    monkeypatch.setattr(utils, "bfloat16_unit", lambda: "AMX")
    monkeypatch.setitem(lock.BATCH_SIZES, "cpu", 60)
    monkeypatch.setattr(lock, "Compiled", lambda forward, *rest: forward)
    sizes = interrupt(monkeypatch, at=2)
    with pytest.raises(SystemExit):
        command(lock.main, *flags, "--compile", "always")  # as a GPU chooses
    monkeypatch.setattr(utils, "bfloat16_unit", lambda: None)
    monkeypatch.setitem(lock.BATCH_SIZES, "cpu", 50)
    command(lock.main, *flags)
    assert sizes == [60, 36, 36, 60, 36]
    settings = manifest_of(tmp_path)["settings"]
    assert [settings[name] for name in shards.CHOICES] == ["bfloat16", "always", 60]
    command(lock.main, *flags, "--lock-method", "horiz", "basic")  # the first is new, and does as the second
    forbid_attacks(monkeypatch)
    command(lock.main, *flags, "--format", "png", "tensor")
    assert (tmp_path / "basic" / "test").exists()


def test_choices_that_no_lock_makes_are_not_taken_over(place, locked, user_error, command):
    path, settings = locked / "lock_basic.json", manifest_of(locked)["settings"]
    wrong = [("batch_size", None), ("batch_size", "x"), ("batch_size", 0.5), ("precision", "x"), ("compile", "x")]
    for name, then in wrong:
        path.write_text(json.dumps(manifest_of(place) | {"settings": {**settings, name: then}}))
        line = user_error(lock.main, *lock_flags(place, locked)[:-2])  # a --batch-size would not be asked for
        now = lock.BATCH_SIZES["cpu"] if name == "batch_size" else settings[name]
        assert f"was made with {name} {'unset' if then is None else then}, but now it is {now}" in line
    path.write_text("{")
    command(lock.main, *lock_flags(place, locked), "--overwrite")
    assert manifest_of(locked)["settings"]["batch_size"] == 40


def sums_alone(manifest):
    return {name: entry for name, entry in manifest["files"].items() if name.endswith(".sha256")}


def test_png_files_hold_what_the_tensors_hold(place, work, locked, command, monkeypatch, user_error, tmp_path):
    """Added to a finished lock without an attack; changed ones are found out; alone, they are trained on."""
    forbid_attacks(monkeypatch)
    command(lock.main, *lock_flags(place, locked), "--format", "png", "tensor")
    paths = lockfiles.Paths(locked, "basic")
    manifest = lockfiles.read_manifest(paths)
    for split in data.SPLITS:
        images, labels = lockfiles.load_split(paths, split, {**manifest, "files": sums_alone(manifest)})
        assert torch.equal(images, torch.cat(torch.load(paths.file(split, "image"))))
        assert torch.equal(labels, torch.cat(torch.load(paths.file(split, "label"))))
        assert list(lockfiles.read_sums(paths, split, manifest)) == data.load_digits(None, split).first(96).names
        for line in paths.sums(split).read_text().splitlines():  # as sha256sum reads it
            assert line[:66] == lockfiles.sha256((paths.tree / line[66:]).read_bytes()) + "  "
    as_folder = data.load_folder(paths.tree, "test")  # in the order of its classes
    assert sorted(map(lockfiles.hash_tensor, as_folder.images)) == sorted(map(lockfiles.hash_tensor, images))
    changed = next((paths.tree / "test" / "3").iterdir())
    content = changed.read_bytes()
    changed.write_bytes(content[:-1])
    assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", locked)
    changed.write_bytes(content)

    monkeypatch.undo()
    alone = ["--lock-data", tmp_path / "alone"]
    command(lock.main, *lock_flags(place), *alone, "--format", "png")
    assert not (tmp_path / "alone" / "train_image_basic").exists()
    run = ["--work-path", work, "--epochs", 1]
    command(train.main, *run, *alone)
    result = json.loads((work / "basic" / "seed0" / "result.json").read_text())
    assert list(result["lock"]["files"]) == ["basic/train.sha256", "basic/test.sha256"]
    path, other = (next((tmp_path / "alone" / "basic" / "test" / label).iterdir()) for label in "34")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    assert f"{path}: absent, or changed" in user_error(train.main, *run, "--overwrite", *alone)
    path.write_bytes(content)
    sealed = ["--format", "png", "--key-out", tmp_path / "key"]  # a seal is added to PNG files alone, too
    command(lock.main, *lock_flags(place), *alone, *sealed)
    command(lock.main, "--verify", tmp_path / "alone")
    out = tmp_path / "out"
    command(lock.main, "--unlock", "--key", tmp_path / "key", *alone, "--orig-data", out)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "test", "train"]
    found, originals = data.load_folder(out, "test").images, data.load_digits(None, "test").first(96).images
    assert sorted(map(lockfiles.hash_tensor, found)) == sorted(map(lockfiles.hash_tensor, originals))


def test_an_older_lock_asked_for_again_costs_no_shard_of_a_new_one(place, locked, command, monkeypatch):
    interrupt(monkeypatch, at=3)
    with pytest.raises(SystemExit):
        command(lock.main, *lock_flags(place, locked), "--eps", 0.7, "--overwrite")
    command(lock.main, *lock_flags(place, locked))
    assert len(list((locked / ".lock_basic").glob("train_*"))) == 2


def test_a_renamed_shard_is_not_taken_for_another_batch(tmp_path):
    paths = Paths(tmp_path, "basic")
    paths.partial.mkdir()
    shards.write_all({"basic": paths}, "train", [0], [({"basic": (torch.zeros(5, 3, 4, 4), {})}, {})])
    shards.shard_path(paths, "train", 0).rename(shards.shard_path(paths, "train", 5))
    assert shards.read_shard(paths, "train", 5) is None


def test_a_setting_that_only_the_older_lock_has_is_a_difference():
    with pytest.raises(UserError, match="x was made with old 1, but now it is unset"):
        shards.refuse_others("x", {"old": 1, "same": 2}, {"same": 2})


def test_both_machines_of_a_lock_stand_in_its_manifest(place, command, monkeypatch, tmp_path):
    interrupt(monkeypatch, at=3)
    flags = [*lock_flags(place, tmp_path), "--precision", "float32"]
    monkeypatch.setattr("utils.bfloat16_unit", lambda: "AMX")
    with pytest.raises(SystemExit):
        command(lock.main, *flags)
    monkeypatch.setattr("utils.bfloat16_unit", lambda: None)
    command(lock.main, *flags)
    assert [", AMX" in one["device"] for one in manifest_of(tmp_path)["made_with"]] == [True, False]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("train/0/", "train/../"), "cannot be the name of an image"),
        (lambda text: text.partition("\n")[2], "lists 95 images"),
    ],
)
def test_sums_that_no_lock_writes(place, locked, command, change, message):
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    paths, manifest = Paths(locked, "basic"), manifest_of(locked)
    path = paths.sums("train")
    path.write_text(change(path.read_text()))
    manifest["files"][paths.name(path)]["sha256"] = lockfiles.sha256(path.read_bytes())
    with pytest.raises(UserError, match=message):
        lockfiles.read_sums(paths, "train", manifest)


def test_an_image_that_no_lock_writes(place, locked, command):
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    paths, manifest = Paths(locked, "basic"), manifest_of(locked)
    sums, (path, *_) = paths.sums("test"), (paths.tree / "test" / "3").iterdir()
    sums.write_text(sums.read_text().replace(lockfiles.sha256(path.read_bytes()), lockfiles.sha256(b"no image")))
    path.write_bytes(b"no image")
    manifest["files"] = sums_alone(manifest) | {paths.name(sums): {"sha256": lockfiles.sha256(sums.read_bytes())}}
    with pytest.raises(UserError, match=f"^{path}: cannot be read as PNG or JPEG$"):
        lockfiles.load_split(paths, "test", manifest)


def test_what_is_told_of_maps_that_keep_a_class_and_of_unchanged_images(place, command, capsys, tmp_path):
    command(lock.main, *lock_flags(place, tmp_path / "new"), "--lock-method", "mixup", "--lambd", 0.3, "--subset", 4)
    assert manifest_of(tmp_path / "new", "30_mixup")["settings"]["lambd"] == 0.3
    out = capsys.readouterr().out
    assert "the target map T2 sends 9 to itself" in out and "test, 4 images\n  base classifier, on the" in out
    command(lock.main, *lock_flags(place, tmp_path / "same"), "--subset", 4, "--attack-steps", 0)
    assert "PSNR infinite" in capsys.readouterr().out
    command(lock.main, "--verify", tmp_path / "same")


def test_a_folder_of_somebody_else_is_not_of_a_lock(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.sha256").touch()
    (tmp_path / "basic").symlink_to(tmp_path / "mine")
    assert not Paths(tmp_path, "basic").has_tree()
    (tmp_path / "50_horiz").mkdir()
    for suffix in ("basic", "50_horiz"):
        Paths(tmp_path, suffix).remove()
    assert (tmp_path / "basic").is_symlink() and (tmp_path / "50_horiz").is_dir()


def test_the_size_of_images_is_checked_before_the_attack(place, user_error, monkeypatch, tmp_path):
    def refuse(model, images, what):
        raise UserError(f"{what} {tuple(images.shape)}")

    monkeypatch.setattr(utils, "check_size", refuse)
    assert "--arch preresnet8 (1, 3, 32, 32)" in user_error(lock.main, *lock_flags(place, tmp_path))
