"""Sealed originals: only the right key and unchanged files give them back, bit for bit."""

import errno
import json
import os
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import data
import lock
import lockfiles
import sealing
import utils
from tests.conftest import call, copy_locks, flip_bit, forbid_attacks, lock_flags, manifest_of, names_in
from utils import UserError, write_file


@pytest.fixture
def pair():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    names = [f"cät/{index}.png" for index in range(4)]
    original = data.Split(images, torch.tensor([1, 0, 1, 1]), ["cät", "dog"], names)
    return original, images + torch.randint(-3, 4, images.shape).to(torch.uint8)  # some wrap around


def assert_same(one, other):
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (one.classes, one.names) == (other.classes, other.names)


def test_seal_and_unseal(pair, tmp_path, monkeypatch):
    original, locked = pair
    key = sealing.make_key(tmp_path / "key")
    sealed = sealing.seal(original, locked, key, "context")
    assert_same(sealing.unseal(sealed, locked, key, "context"), original)
    assert sealing.seal(original, locked, key, "context") != sealed  # another nonce
    with pytest.raises(UserError, match="cannot unlock context: the locked images are not those that were sealed"):
        sealing.unseal(sealed, locked.roll(1, 0), key, "context")
    with pytest.raises(UserError, match="the locked images are not those"):
        sealing.unseal(sealed, locked[:3], key, "context")
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 50)
    sealed = sealing.seal(original, locked, key, "context")
    assert_same(sealing.unseal(sealed, locked, key, "context"), original)
    step = sealing.NONCE_BYTES + 50 + sealing.TAG_BYTES
    nonces = [sealed[start : start + sealing.NONCE_BYTES] for start in range(0, len(sealed), step)]
    assert len(set(nonces)) == len(nonces) > 2
    for changed in (sealed[step:], sealed[:step], sealed[step : 2 * step] + sealed[:step] + sealed[2 * step :]):
        with pytest.raises(UserError, match="cannot unlock context: the key is another, or a file was changed"):
            sealing.unseal(changed, locked, key, "context")


# Made once: if this no longer opens, nothing does that was handed out before.
SEALED = bytes.fromhex(
    "4a9f5fbe9e5855f4b2ef630e69419c63cd506d76da63b0fcd45865496bc7635e7cc22c8ec5a6d11c4213331867d6f5c515f2f5a991895befd9"
    "309c997d2bc5812899a96b028eaee6427c2414a502d873bdbe324b3ae0a26a622a0e256d3be712cb2bb07c451303023b250064dbfe8cf3bee8"
    "830800ec01b440444cd3c4e6df845692e676a2f60277172002e3f2eb8cdc7d5077d99587f116e116bb31ff7ef1105d4e1b"
)


def test_what_earlier_code_sealed_still_opens():
    key, images = bytes(range(32)), torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    original = sealing.unseal(SEALED, images + 250, key, "basic test")
    assert_same(original, data.Split(images, torch.tensor([1]), ["cat", "dog"], ["dog/a.png"]))
    assert sealing.fingerprint(key) == "b30ad09441c90ab9"
    assert sealing.CHUNK_BYTES == 2**30  # a longer seal was divided by it


def test_nothing_opens_with_another_key_or_one_bit_changed(pair, tmp_path):
    original, locked = pair
    key, other = (sealing.make_key(tmp_path / name) for name in ("key", "other"))
    sealed = sealing.seal(original, locked, key, "context")
    attempts = [(sealed, other, "context"), (sealed, key, "contexts"), (sealed[:-1], key, "context"), (b"", key, "")]
    for position in range(0, len(sealed), 37):
        attempts.append((flip_bit(sealed, position), key, "context"))
    for content, key_tried, context in attempts:
        with pytest.raises(UserError, match="cannot unlock"):
            sealing.unseal(content, locked, key_tried, context)


def test_what_is_sealed_says_nothing_of_the_images(pair):
    """With another key, it has hardly a byte in common."""
    original, locked = pair
    same = sealing.seal(original, original.images, bytes(32), "context")
    with pytest.raises(zlib.error):
        zlib.decompress(same[sealing.NONCE_BYTES :])
    one, other = (sealing.seal(original, locked, bytes([number]) * 32, "context") for number in (0, 1))
    assert sum(a == b for a, b in zip(one, other)) < len(one) / 10


def test_a_key_that_cannot_be_used_is_told_before_any_attack(place, user_error, monkeypatch, tmp_path):
    forbid_attacks(monkeypatch)
    (tmp_path / "key").write_text("x")
    line = user_error(lock.main, *lock_flags(place, tmp_path / "new"), "--key-out", tmp_path / "key")
    assert "not a key" in line
    line = user_error(lock.main, *lock_flags(place, tmp_path / "new"), "--key-out", tmp_path / "none" / "key")
    assert f"--key-out {tmp_path}/none/key: the folder for it does not exist; make it, or name another" in line


def test_a_key_that_is_moved_away_meanwhile_is_not_replaced(place, command, monkeypatch, capsys, tmp_path):
    """The same command goes on once it is back."""
    flags, attack = [*lock_flags(place, tmp_path / "new"), "--key-out", tmp_path / "key"], lock.attack

    def move_key(*args, **options):
        if (tmp_path / "key").exists():
            (tmp_path / "key").rename(tmp_path / "moved")
        return attack(*args, **options)

    monkeypatch.setattr(lock, "attack", move_key)
    with pytest.raises(SystemExit) as exit:
        command(lock.main, *flags)
    assert exit.value.code == 2 and f"{tmp_path}/key: no such file, or a folder; name" in capsys.readouterr().err
    (tmp_path / "moved").rename(tmp_path / "key")
    forbid_attacks(monkeypatch)
    command(lock.main, *flags)
    unlocking = ["--lock-data", tmp_path / "new", "--orig-data", tmp_path / "out"]
    command(lock.main, "--unlock", "--key", tmp_path / "key", *unlocking)


def test_a_key_among_what_is_handed_out_is_refused(place, user_error, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    (tmp_path / "link").symlink_to("locked")
    way_round = f"../{tmp_path.name}/locked/key"
    for key in ("locked/key", "Locked/key", tmp_path / "locked" / "key", way_round, "link/key"):
        assert "that is handed out" in user_error(lock.main, *lock_flags(place, "locked"), "--key-out", key)
    line = user_error(lock.main, "--dataset", "folder", "--lock-data", "locked", "--resume-path", "locked/base.pt")
    assert "--resume-path locked/base.pt: lies in the folder that is handed out" in line


def test_what_is_brought_to_the_disk_is_whole(monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    sealing.make_key(tmp_path / "key")
    write_file(tmp_path / "file", b"new")
    assert sizes[:2] == [65, 3]  # and then the folder


def test_a_key_file_is_private_and_never_replaced(tmp_path):
    path = tmp_path / "key"
    key = sealing.make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600 and len(key) == 32
    assert sealing.make_key(path) == sealing.read_key(path) == key != sealing.make_key(tmp_path / "other")
    fingerprints = {sealing.fingerprint(flip_bit(key, position)) for position in range(32)}
    assert len(fingerprints | {sealing.fingerprint(key)}) == 33 and sealing.fingerprint(key) not in key.hex()
    for content in (b"", b"abc", b"\xff\xfe", key.hex().encode()[:-2], key.hex().encode() + b"00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="key: not a key file: expected 64 hexadecimal digits") as error:
            sealing.make_key(path)
        assert ("delete it" in str(error.value)) == (content == b"")
        assert path.read_bytes() == content


def test_a_key_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, message in ((full, f"No space left on device: '{tmp_path}/key'"), (KeyboardInterrupt(), None)):
        monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
        with pytest.raises(type(error), match=message):
            sealing.make_key(tmp_path / "key")
        assert not list(tmp_path.iterdir())


def test_a_key_that_another_process_is_making_is_not_replaced(tmp_path, monkeypatch):
    """Nothing is ever sealed with a key that is in no file."""
    path, generate = tmp_path / "key", sealing.AESGCM.generate_key

    def racing(bits):
        with pytest.raises(UserError, match="not a key file"):  # it is being written
            sealing.make_key(path)
        return generate(bits)

    monkeypatch.setattr(sealing, "AESGCM", SimpleNamespace(generate_key=racing))
    assert sealing.make_key(path) == sealing.read_key(path)


@pytest.fixture(scope="module")
def sealed_once(place, tmp_path_factory):
    """A folder with a finished lock, to which seals were added without another attack, and the key."""
    root = tmp_path_factory.mktemp("sealed")
    copy_locks(place, root / "locked")
    with pytest.MonkeyPatch.context() as patch:
        forbid_attacks(patch)
        flags = ["--lock-method", "basic", "horiz", "--key-out", root / "key"]
        call(lock.main, *lock_flags(place, root / "locked"), *flags)
    return root


@pytest.fixture
def sealed(sealed_once, tmp_path):
    """The folder of a sealed lock, and the path of its key: copies, which a test may change."""
    shutil.copytree(sealed_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "locked", tmp_path / "key"


def test_what_is_unlocked_is_on_the_disk_before_it_takes_its_place(sealed, command, monkeypatch, tmp_path):
    """And no other process writes there meanwhile."""
    folder, key = sealed
    done, rename = [], Path.rename

    def rename_alone(path, target):
        with pytest.raises(UserError, match="another process is writing there"), utils.exclusive(tmp_path / "out"):
            pass
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "sync", lambda: done.append("sync"))
    monkeypatch.setattr(Path, "rename", rename_alone)
    command(lock.main, "--unlock", "--key", key, "--lock-data", folder, "--orig-data", tmp_path / "out",
            "--format", "png")  # fmt: skip
    assert done == ["sync", "rename", "rename"]


def test_unlocking_in_the_folder_that_was_handed_out(sealed, command, monkeypatch, tmp_path):
    """Where the default of --resume-path, which unlocking does not read, would lie in it."""
    folder, key = sealed
    monkeypatch.chdir(folder)
    flags = ["--dataset", "folder", "--lock-data", "."]
    command(lock.main, "--unlock", *flags, "--key", key, "--orig-data", tmp_path / "out")
    assert (tmp_path / "out" / "train_image_original").exists()


@pytest.mark.parametrize("method", ["basic", "50_horiz"])
def test_unlock(sealed, command, tmp_path, method):
    folder, key = sealed
    (folder / f"lock_{'50_horiz' if method == 'basic' else 'basic'}.json").unlink()
    command(lock.main, "--unlock", "--key", key, "--lock-data", folder, "--orig-data", tmp_path / "out")
    command(lock.main, "--unlock", "--key", key, "--lock-data", folder, "--orig-data", tmp_path / "png",
            "--format", "png")  # fmt: skip
    for split in data.SPLITS:
        originals = data.load_digits(None, split).first(96)
        assert torch.equal(torch.cat(torch.load(tmp_path / "out" / f"{split}_image_original")), originals.images)
        assert torch.equal(torch.cat(torch.load(tmp_path / "out" / f"{split}_label_original")), originals.labels)
        tree = data.load_folder(tmp_path / "png", split)
        order = [originals.names.index(name) for name in tree.names]
        assert sorted(order) == list(range(96)) and torch.equal(tree.images, originals.images[order])


def test_a_trial_beside_a_lock_is_not_what_is_unlocked(sealed, place, command, capsys, tmp_path):
    folder, key = sealed
    trial = ["--subset", 8, "--lock-method", "mixup", "--key-out", key]
    command(lock.main, *lock_flags(place, folder), *trial)
    capsys.readouterr()
    command(lock.main, "--unlock", "--key", key, "--lock-data", folder, "--orig-data", tmp_path / "out")
    assert capsys.readouterr().out.count("96 images in") == 2


def test_the_lock_of_a_method_is_unlocked(place, locked, command, user_error, tmp_path):
    """Where a key sealed several, whatever else they are of."""
    flags = [*lock_flags(place, locked), "--key-out", tmp_path / "key"]
    command(lock.main, *flags, "--lock-method", "horiz", "--alpha", 0.3)
    command(lock.main, *flags, "--subset", 64, "--overwrite", "--lock-method", "basic")
    unlock = ["--unlock", "--lock-data", locked, "--orig-data", tmp_path / "out", "--key", tmp_path / "key"]
    for method, suffix in {"mixup": "50_mixup", "horiz": "50_horiz"}.items():
        line = user_error(lock.main, *unlock, "--lock-method", method)
        assert f"holds no sealed lock {suffix}; name another of 30_horiz, basic by" in line
    assert "--alpha: name a --lock-method that it is for, or leave it out" in user_error(
        lock.main, *unlock, "--alpha", 0.3
    )
    assert "--verify only checks a lock" in user_error(lock.main, *unlock, "--verify", locked)
    command(lock.main, *unlock, "--lock-method", "basic", "--format", "tensor")
    assert len(torch.cat(torch.load(tmp_path / "out" / "train_image_original"))) == 64
    unlock[unlock.index("--orig-data") + 1] = tmp_path / "other"
    (locked / "lock_basic.json").write_text("{")  # of another lock than the one that is named
    command(lock.main, *unlock, "--lock-method", "horiz", "--alpha", 0.3, "--format", "tensor")
    assert len(torch.cat(torch.load(tmp_path / "other" / "train_image_original"))) == 96


def test_what_cannot_be_unlocked(sealed, place, user_error, tmp_path):
    folder, key = sealed
    for path in folder.glob("*50_horiz*"):
        path.unlink()
    flags = ["--unlock", "--lock-data", folder, "--orig-data", tmp_path / "out", "--key"]
    for path in (tmp_path / "none", tmp_path):
        assert f"{path}: no such file, or a folder; name the key" in user_error(lock.main, *flags, path)
    sealing.make_key(tmp_path / "other")
    line = user_error(lock.main, *flags, tmp_path / "other")
    assert f"not the key that {folder} was sealed with: its fingerprint is " in line
    assert "--unlock needs --orig-data" in user_error(lock.main, "--unlock", "--key", key, "--lock-data", folder)
    assert "holds no sealed lock" in user_error(lock.main, *flags, key, "--lock-data", place)
    assert "go together" in user_error(lock.main, *flags[:-1])
    assert "go together" in user_error(lock.main, *lock_flags(place, folder), "--key", key)
    line = user_error(lock.main, *lock_flags(place, folder), "--key-out", tmp_path / "other")
    assert "lock_basic.json is sealed with another key" in line
    line = user_error(lock.main, *lock_flags(place, folder), "--key-out", tmp_path / "new")
    assert "sealed with another key" in line and not (tmp_path / "new").exists()
    line = user_error(lock.main, *lock_flags(place, folder), "--key-out", folder / "key")
    assert "lies in the folder that is handed out" in line
    line = user_error(lock.main, *flags[:2], folder, "--orig-data", folder / "out", "--key", key)
    assert "--orig-data" in line and "lies in the folder that is handed out" in line

    for name in ("train_sealed_basic", "test_image_basic"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(flip_bit(content, -1))
        assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", folder)
        assert f"{name}: changed or damaged since it was locked" in user_error(lock.main, *flags, key)
        (folder / name).write_bytes(content)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "holds files already" in user_error(lock.main, *flags, key)


def test_what_was_tampered_with_cannot_be_unlocked(sealed, user_error, tmp_path):
    """Labels, classes and images of another order, with all hashes of the manifest set right; and swapped seals."""
    folder, key = sealed
    (folder / "lock_50_horiz.json").unlink()
    flags = ["--unlock", "--lock-data", folder, "--orig-data", tmp_path / "out", "--key", key]
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def tamper(change):
        for path, content in files.items():
            path.write_bytes(content)
        manifest = manifest_of(folder)
        change(manifest)
        for name, entry in manifest["files"].items():
            entry["sha256"] = lockfiles.sha256((folder / name).read_bytes())
        (folder / "lock_basic.json").write_text(json.dumps(manifest))

    def other_labels(manifest):
        labels = torch.cat(torch.load(folder / "train_label_basic")).flip(0)
        (folder / "train_label_basic").write_bytes(lockfiles.to_bytes(labels))

    def other_images(manifest):
        images = torch.cat(torch.load(folder / "train_image_basic")).roll(1, 0)
        (folder / "train_image_basic").write_bytes(lockfiles.to_bytes(images))

    def swap(manifest):
        for name, other in (("train", "test"), ("test", "train")):
            (folder / f"{name}_sealed_basic").write_bytes(files[folder / f"{other}_sealed_basic"])

    def path_as_class(manifest):
        manifest["settings"]["classes"][0] = "../../evil"

    for change, message in {
        other_labels: "train_label_basic: other labels, or another order",
        other_images: "cannot unlock basic train: the locked images are not those that were sealed",
        swap: "cannot unlock basic train: the key is another, or a file was changed",
        path_as_class: "lock_basic.json: not a manifest of lock.py: classes",
    }.items():
        tamper(change)
        assert message in user_error(lock.main, *flags)
        assert not (tmp_path / "out").exists()


def test_an_unlock_that_was_interrupted_starts_again(sealed, command, user_error, monkeypatch, tmp_path):
    folder, key = sealed
    flags = ["--unlock", "--key", key, "--lock-data", folder, "--orig-data", tmp_path / "out", "--format", "png"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()  # macOS leaves it behind where somebody looked
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(SystemExit):
            command(lock.main, *flags)
    command(lock.main, *flags)
    assert names_in(tmp_path / "out") == [".DS_Store", "test", "train"]
    assert "holds files already; name a folder" in user_error(lock.main, *flags)


def test_an_unlock_that_was_interrupted_halfway_is_told(sealed, command, user_error, monkeypatch, tmp_path):
    folder, key = sealed
    out, rename = tmp_path / "out", Path.rename
    flags = ["--unlock", "--key", key, "--lock-data", folder, "--orig-data", out, "--format", "png"]

    def rename_once(path, target):
        if {"train", "test"} & set(names_in(out)):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        with pytest.raises(SystemExit):
            command(lock.main, *flags)
    assert "holds files already (some are of an interrupted --unlock); name" in user_error(lock.main, *flags)


def test_a_format_that_is_added_without_the_key_leaves_the_seal(place, locked, command, tmp_path):
    command(lock.main, *lock_flags(place, locked), "--key-out", tmp_path / "key")
    command(lock.main, *lock_flags(place, locked), "--format", "png")
    command(lock.main, "--verify", locked)
    assert manifest_of(locked)["sealed_with"]
    assert (locked / "train_sealed_basic").exists()


def test_the_seal_of_any_method_is_kept(sealed, place, user_error):
    for methods in (["mixup", "basic"], ["basic", "mixup"]):
        line = user_error(lock.main, *lock_flags(place, sealed[0]), "--overwrite", "--lock-method", *methods)
        assert "train_sealed_basic: --overwrite would delete this seal" in line


def test_a_seal_is_made_once_and_never_replaced(place, locked, command, user_error, tmp_path):
    flags = [*lock_flags(place, locked), "--key-out", tmp_path / "key"]
    command(lock.main, *flags)
    before = (locked / "train_sealed_basic").read_bytes()
    command(lock.main, *flags)
    assert (locked / "train_sealed_basic").read_bytes() == before
    for path in (locked / "lock_basic.json", *locked.glob("*_image_basic"), *locked.glob("*_label_basic")):
        path.unlink()
    assert f"{locked}/train_sealed_basic exists" in user_error(lock.main, *flags)


def test_of_locks_with_two_keys_that_of_the_key_given_is_unlocked(place, locked, command, tmp_path):
    command(lock.main, *lock_flags(place, locked), "--key-out", tmp_path / "one")
    more = ["--lock-method", "mixup", "--subset", 8, "--key-out", tmp_path / "two"]
    command(lock.main, *lock_flags(place, locked), *more)
    flags = ["--unlock", "--lock-data", locked, "--orig-data", tmp_path / "out", "--key", tmp_path / "two"]
    command(lock.main, *flags)
    assert len(torch.cat(torch.load(tmp_path / "out" / "train_label_original"))) == 8
