"""What stands in a manifest, and what is checked against it."""

import errno
import json
import os
import re
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

import data
import lock
import lockfiles
import train
import utils
from lockfiles import Paths
from methods import TARGET_MAPS
from tests.conftest import forbid_attacks, lock_flags, manifest_of, names_in, run_of
from utils import UserError


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
    assert (manifest["files"][names[0]]["shape"], manifest["files"][names[0]]["dtype"]) == ([96, 3, 32, 32], "uint8")
    (made_with,) = manifest["made_with"]
    assert made_with["torch"] == torch.__version__ and made_with["device"].startswith("CPU")
    assert {"threads", "python", "torchvision", "numpy", "pillow"} < made_with.keys()
    assert str(place) not in (place / "lock_50_horiz.json").read_text()  # nor any other path
    assert manifest["commit"] == "0" * 40 and "sealed_with" in manifest
    assert datetime.fromisoformat(manifest["date"]).utcoffset() == timedelta(0)


def test_cifar_is_cifar10_and_the_seed_is_that_of_the_target_maps(place, command, monkeypatch, tmp_path):
    drawn, target_maps = [], lock.target_maps
    monkeypatch.setitem(data.DATASETS, "cifar", data.DATASETS["digits"])
    monkeypatch.setattr(lock, "target_maps", lambda *args: drawn.append(args) or target_maps(*args))
    flags = [*lock_flags(place, tmp_path), "--dataset", "cifar", "--orig-data", tmp_path / "cifar10"]
    command(lock.main, *flags, "--subset", 4, "--manual-seed", 5)
    assert drawn == [(10, 5)] and manifest_of(tmp_path)["settings"]["dataset"] == "cifar10"
    assert str(tmp_path) not in (tmp_path / "lock_basic.json").read_text()  # the path of the originals


def test_a_tensors_hash_tells_order_values_shape_and_type_apart():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    others = [images.flip(0), images + 1, images.view(2, 3, 4, 1), images.to(torch.int64)]
    assert len({lockfiles.hash_tensor(one) for one in [images, images.clone(), *others]}) == 5


def test_the_result_of_a_training_holds_the_manifest(place, work, command):
    command(train.main, "--work-path", work, "--epochs", 1)
    _, result = run_of(work)
    assert result["lock"] == manifest_of(place)
    (start,) = result["made_with"]
    assert (start["torch"], start["threads"]) == (torch.__version__, torch.get_num_threads())
    assert start["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", start["commit"])
    assert abs(datetime.fromisoformat(start["date"]).timestamp() - time.time()) < 1000
    assert start["command"] == f"command --work-path {work} --epochs 1"


def test_locked_files_without_a_manifest_are_taken_and_the_log_says_what_is_not_verified(work, locked, command):
    (locked / "lock_basic.json").unlink()
    labels = torch.cat(torch.load(locked / "test_label_basic")).flip(0)
    (locked / "test_label_basic").write_bytes(lockfiles.to_bytes(labels))
    command(train.main, "--work-path", work, "--lock-data", locked, "--epochs", 1)
    log = (work / "basic" / "seed0" / "log.txt").read_text()
    assert "the locked files have no manifest" in log
    assert "warning: the labels of the locked and the original test set differ" in log
    assert run_of(work)[1]["lock"] is None


def test_files_that_do_not_belong_together(place, work, user_error, monkeypatch):
    def refusal(**paths):
        flags = [part for key, name in paths.items() for part in (f"--locked_{key}", place / name)]
        return user_error(train.main, "--work-path", work, *flags)

    line = refusal(train_image="train_image_basic", train_label="test_label_basic")
    assert "test_label_basic: not the labels that were locked with" in line
    shutil.copy(place / "train_label_basic", work / "labels")  # which are taken, and only the test set is refused
    line = refusal(train_label=work / "labels", test_label="train_label_basic")
    assert "train_label_basic: not the labels that were locked with" in line and "test_image_basic" in line
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
        changed = digits._replace(load=lambda *args, change=change: change(digits.load(*args)))
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
    (locked / ".lock_\x1b[2J").mkdir()
    for name in ("picking", "mixup"):  # is no manifest's name
        (locked / f"lock_{name}.json").write_text("{}")
    command(lock.main, "--verify", locked)
    out = capsys.readouterr().out
    assert ".lock_mixup: an interrupted lock" in out and "\x1b" not in out
    (locked / ".lock_\x1b[2J").rmdir()
    assert "every file of lock_50_horiz.json, lock_basic.json is as it was locked" in out
    assert out.count("base classifier, on the originals") == 4  # the report, of two splits each
    for suffix in ("50_horiz", "basic"):
        (locked / f"train_label_{suffix}").unlink()
    assert "not as they were locked: 2, see above" in user_error(lock.main, "--verify", locked)
    (locked / "lock_50_horiz.json").write_text("")
    assert "not as they were locked: 2, see above" in user_error(lock.main, "--verify", locked)
    (locked / "lock_50_horiz.json").unlink()
    (locked / "mixandcat").mkdir()
    (locked / "mixandcat" / "test.sha256").touch()
    assert "not as they were locked: 3, see above" in user_error(lock.main, "--verify", locked)
    for suffix in ("50_horiz", "mixandcat"):
        absent = f"{locked}/lock_{suffix}.json: absent, so the files of its lock cannot be checked"
        assert absent in user_error.printed
    part = (place / "lock_basic.json").read_text()[:100]
    for damaged, what in {"{}": "not a manifest of lock.py", part: "not JSON, or damaged"}.items():
        (locked / "lock_basic.json").write_text(damaged)
        assert "not as they were locked: 3, see above" in user_error(lock.main, "--verify", locked)
        assert f"lock_basic.json: {what}" in user_error.printed
    for path in locked.glob("lock_*.json"):
        path.unlink()
    assert "not as they were locked: 3, see above" in user_error(lock.main, "--verify", locked)
    for path in locked.glob("t*_*"):
        path.rename(locked / ".lock_mixup" / path.name)
    (locked / "mixandcat" / "test.sha256").rename(locked / "train_image_50_mixup")
    (locked / ".lock_50_mixup").mkdir()  # of which some files have their places already
    assert "holds no lock_*.json; finish its lock first" in user_error(lock.main, "--verify", locked)
    (locked / "train_image_50_mixup").unlink()
    for name in (".lock_mixup", ".lock_50_mixup"):
        shutil.rmtree(locked / name)
    for folder in (locked, locked / "none"):
        assert "holds no lock_*.json; name a folder that" in user_error(lock.main, "--verify", folder)


def test_verify_names_a_file_that_the_disk_cannot_read_and_goes_on(locked, user_error, monkeypatch):
    read = Path.read_bytes

    def failing(path):
        if path == locked / "train_image_basic":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    (locked / "test_label_basic").unlink()
    assert "not as they were locked: 2, see above" in user_error(lock.main, "--verify", locked)
    assert f"{os.strerror(errno.EIO)}: '{locked / 'train_image_basic'}'" in user_error.printed
    assert "test_label_basic: no such" in user_error.printed


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
        lambda manifest: manifest["settings"].update(eps="0.5"),  # these four are in the table of experiments
        lambda manifest: manifest["settings"].pop("attack_steps"),
        lambda manifest: manifest["settings"].update(arch="\x1b[2J"),
        lambda manifest: manifest["settings"].pop("base_sha256"),
    ],
)
def test_a_manifest_that_no_lock_writes(locked, user_error, change):
    """Among them what would make --verify read other files, or print what it did not find out."""
    (locked.parent / "secret").write_text("secret")
    manifest = manifest_of(locked)
    change(manifest)
    (locked / "lock_basic.json").write_text(json.dumps(manifest))
    assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", locked)
    assert "lock_basic.json: not a manifest of lock.py" in user_error.printed


def test_verify_names_what_does_not_belong_there(place, locked, command, user_error):
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
        assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", locked)
        assert utils.printable(path) in user_error.printed and "take it away" in user_error.printed
        assert "--overwrite" not in user_error.printed  # which would lock all again
        path.unlink()
    (locked / "basic" / "test" / "Thumbs.db").touch()
    line = user_error(lock.main, *lock_flags(place, locked), "--format", "png")
    assert line.endswith("Thumbs.db: no file of this lock; take it away")
    (locked / "basic" / "test.sha256").write_bytes(b"")
    assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", locked)


def test_overwriting_never_replaces_the_originals(place, locked, user_error, command):
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    flags = [*lock_flags(place, locked), "--format", "png", "--eps", 0.7, "--overwrite"]
    line = user_error(lock.main, *flags, "--dataset", "folder", "--orig-data", locked / "basic")
    assert "what is handed out and the originals in" in line
    assert "and the originals in" in user_error(lock.main, *flags, "--orig-data", locked / "basic" / "train")
    (locked / "basic" / "test" / "0" / "old.png").touch()
    (locked / "basic" / "train.sha256").unlink()  # the other one still tells whose tree it is
    command(lock.main, *flags)
    command(lock.main, "--verify", locked)
    for split in data.SPLITS:
        (locked / "basic" / f"{split}.sha256").unlink()
    assert f"{locked}/basic exists, and is not of a lock" in user_error(lock.main, *flags)


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
    contents = {path: path.read_bytes() for path in (paths.tree / "test" / "3").iterdir()}
    assert len(contents) > 2
    for path, content in contents.items():
        path.write_bytes(content[:-1])
    line = user_error(lock.main, "--verify", locked)
    assert f"not as they were locked: {len(contents)}, see above" in line
    for path, content in contents.items():
        path.write_bytes(content)

    monkeypatch.undo()
    alone = ["--lock-data", tmp_path / "alone"]
    command(lock.main, *lock_flags(place), *alone, "--format", "png")
    assert not (tmp_path / "alone" / "train_image_basic").exists()
    run = ["--work-path", work, "--epochs", 1]
    command(train.main, *run, *alone)
    _, result = run_of(work)
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
    assert names_in(out) == ["test", "train"]
    found, originals = data.load_folder(out, "test").images, data.load_digits(None, "test").first(96).images
    assert sorted(map(lockfiles.hash_tensor, found)) == sorted(map(lockfiles.hash_tensor, originals))


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
