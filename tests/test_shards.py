"""A lock in the making: what was cut off goes on, nothing is computed twice, and what is there is kept."""

import json
import os
import shutil
import sys
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
from tests.conftest import forbid_attacks, lock_flags, manifest_of, names_in
from utils import UserError

write_locks = lock.write_locks


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
    done.clear()
    command(lock.main, *lock_flags(place, locked), "--format", "tensor", "--overwrite")
    assert "replace lock_basic.json" in done and "sync" not in done  # each of the other files has one of its own


def test_a_shard_that_is_damaged_before_the_lock_is_finished(tmp_path):
    paths = Paths(tmp_path, "basic")
    paths.partial.mkdir()
    shards.write_all({"basic": paths}, "train", [0], [({"basic": (torch.zeros(5, 3, 4, 4), {})}, {})])
    with pytest.raises(UserError, match="train_00000005: damaged since it was written; the same command locks it"):
        shards.read_shards(paths, "train", range(0, 10, 5))


def test_settings_that_begin_alike_are_told_where_they_differ():
    then, now = ({"classes": "a" * 60 + end} for end in "bc")
    with pytest.raises(UserError, match="x was made with classes a{10}b, but now it is a{10}c;"):
        shards.refuse_others("x", then, now)


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
    forbid_attacks(monkeypatch)
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
        manifests = shards.prepare(locks, settings, {}, args)
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
        checks = lockfiles.check_files, lockfiles.check_tree
        assert manifest is None or not any(list(check(paths, manifest)) for check in checks)
        go_on(folder)
        files = [path.name for form in ("tensor", "sealed") for path in paths.groups()[form]]
        assert names_in(folder) == sorted(["basic", "lock_basic.json", *files])
        manifest = lockfiles.read_manifest(paths)
        assert manifest["settings"] == settings["basic"] and len(manifest["files"]) == 8
        assert not any(list(check(paths, manifest)) for check in (*checks, lockfiles.check_unlisted))
        shutil.rmtree(folder)
    assert n > 30


def interrupt(monkeypatch, at):
    """Let Ctrl-C come in the attack with the number at, if any; returns the list to which attacks add their sizes."""
    sizes, attack = [], lock.attack

    def interrupted(classifier, images, *rest, **options):
        sizes.append(len(images))
        if len(sizes) == at:
            raise KeyboardInterrupt
        return attack(classifier, images, *rest, **options)

    monkeypatch.setattr(lock, "attack", interrupted)
    return sizes


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
    assert {locked / name: (locked / name).read_bytes() for name in names_in(locked)} == before


def test_an_interrupted_lock_goes_on_and_leaves_the_old_one_whole(place, locked, command, monkeypatch, capsys):
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
    assert sizes[5:] == [40, 16] and "test: going on after 1 of 3 batches" in capsys.readouterr().out
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
    (tmp_path / ".lock_basic" / "settings.json").write_text("{")
    line = user_error(lock.main, *lock_flags(place, tmp_path))
    assert ".lock_basic/settings.json: not JSON, or damaged" in line
    assert "get it again from a copy, or lock again with --overwrite" in line
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


def test_finished_locks_of_several_machines_are_finished_together(place, command, monkeypatch, user_error, tmp_path):
    """Unless a flag asks for what one of them has not."""
    flags = lock_flags(place, tmp_path)[:-2]
    command(lock.main, *flags, "--lock-method", "basic", "--precision", "float32", "--batch-size", 40)
    command(lock.main, *flags, "--lock-method", "horiz", "--precision", "bfloat16", "--batch-size", 30)
    forbid_attacks(monkeypatch)
    command(lock.main, *flags, "--lock-method", "basic", "horiz", "--format", "png")
    assert (tmp_path / "basic" / "test").exists() and (tmp_path / "50_horiz" / "test").exists()
    line = user_error(lock.main, *flags, "--lock-method", "basic", "horiz", "--precision", "bfloat16")
    assert "lock_basic.json was made with precision float32, but now it is bfloat16" in line


def test_an_interrupted_lock_goes_on_as_it_was_begun_beside_a_finished_one(place, command, monkeypatch, tmp_path):
    """Whichever of them is named first."""
    flags = lock_flags(place, tmp_path)[:-2]
    command(lock.main, *flags, "--lock-method", "horiz", "--batch-size", 40)
    interrupt(monkeypatch, at=2)
    with pytest.raises(SystemExit):
        command(lock.main, *flags, "--lock-method", "basic", "--batch-size", 60)
    sizes = interrupt(monkeypatch, at=None)
    command(lock.main, *flags, "--lock-method", "horiz", "basic")
    found = [manifest_of(tmp_path, suffix)["settings"]["batch_size"] for suffix in ("50_horiz", "basic")]
    assert sizes == [36, 60, 36] and found == [40, 60]


def test_a_lock_that_replaces_another_goes_on_as_it_was_begun(place, locked, command, monkeypatch):
    """And not as the one that it replaces, nor as this machine would choose; but with other settings it starts anew."""
    flags = [*lock_flags(place, locked)[:-2], "--overwrite"]
    monkeypatch.setattr(utils, "bfloat16_unit", lambda: None)
    monkeypatch.setitem(lock.BATCH_SIZES, "cpu", 60)
    sizes = interrupt(monkeypatch, at=2)
    with pytest.raises(SystemExit):
        command(lock.main, *flags)
    monkeypatch.setitem(lock.BATCH_SIZES, "cpu", 50)
    command(lock.main, *flags)
    assert sizes == [60, 36, 36, 60, 36] and manifest_of(locked)["settings"]["batch_size"] == 60
    torch.save({**torch.load(place / "base" / "checkpoint.pt.best"), "epoch": 9}, locked.parent / "other")
    for other in (["--eps", 0.7], ["--resume-path", locked.parent / "other"], ["--precision", "bfloat16"]):
        monkeypatch.setitem(lock.BATCH_SIZES, "cpu", 70)
        interrupt(monkeypatch, at=2)
        with pytest.raises(SystemExit):
            command(lock.main, *flags)
        monkeypatch.setitem(lock.BATCH_SIZES, "cpu", 50)
        sizes = interrupt(monkeypatch, at=None)
        command(lock.main, *flags, *other)
        assert sizes == [50, 46] * 2


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
