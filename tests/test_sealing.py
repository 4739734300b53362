"""Sealed originals: only the right key and unchanged files give them back, bit for bit."""

import json
import shutil

import pytest
import torch

import data
import lock
import sealing
from tests.conftest import lock_flags
from utils import UserError


@pytest.fixture
def pair():
    originals = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    return originals, originals + torch.randint(-3, 4, originals.shape).to(torch.uint8)  # some wrap around


def test_seal_and_unseal(pair, tmp_path, monkeypatch):
    originals, locked = pair
    key = sealing.make_key(tmp_path / "key")
    sealed = sealing.seal(originals, locked, key, "context")
    assert torch.equal(sealing.unseal(sealed, locked, key, "context"), originals)
    assert sealing.seal(originals, locked, key, "context") != sealed  # another nonce
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 50)
    sealed = sealing.seal(originals, locked, key, "context")
    assert torch.equal(sealing.unseal(sealed, locked, key, "context"), originals)
    step = sealing.NONCE_BYTES + 50 + sealing.TAG_BYTES
    for changed in (sealed[step:], sealed[:step], sealed[step : 2 * step] + sealed[:step] + sealed[2 * step :]):
        with pytest.raises(UserError, match="cannot unlock context: the key is another, or a file was changed"):
            sealing.unseal(changed, locked, key, "context")


def test_nothing_opens_with_another_key_or_one_bit_changed(pair, tmp_path):
    originals, locked = pair
    key, other = (sealing.make_key(tmp_path / name) for name in ("key", "other"))
    sealed = sealing.seal(originals, locked, key, "context")
    attempts = [(sealed, other, "context"), (sealed, key, "contexts"), (sealed[:-1], key, "context"), (b"", key, "")]
    for position in range(0, len(sealed), 37):
        changed = bytearray(sealed)
        changed[position] ^= 1
        attempts.append((bytes(changed), key, "context"))
    for content, key_tried, context in attempts:
        with pytest.raises(UserError, match="cannot unlock"):
            sealing.unseal(content, locked, key_tried, context)


def test_what_is_sealed_says_nothing_of_the_images(pair):
    originals, locked = pair
    same = sealing.seal(originals, originals, bytes(32), "context")
    assert bytes(20) not in same


def test_a_key_file_is_private_and_never_replaced(tmp_path):
    path = tmp_path / "key"
    key = sealing.make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600 and len(key) == 32
    assert sealing.make_key(path) == sealing.read_key(path) == key != sealing.make_key(tmp_path / "other")
    assert sealing.fingerprint(key) not in key.hex()
    for content in (b"", b"abc", b"\xff\xfe", key.hex().encode()[:-2], key.hex().encode() + b"00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="key: not a key file: expected 64 hexadecimal digits"):
            sealing.make_key(path)
        assert path.read_bytes() == content


@pytest.fixture
def sealed(place, command, monkeypatch, tmp_path):
    """A finished lock, to which seals are added without another attack; its folder, and the key's."""
    folder = tmp_path / "locked"
    folder.mkdir()
    for path in place.glob("*_*"):
        shutil.copy(path, folder)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "attack", lambda *args: pytest.fail("an attack was computed again"))
        flags = ["--lock-method", "basic", "horiz", "--key-out", tmp_path / "key"]
        command(lock.main, *lock_flags(place, folder), *flags)
    return folder, tmp_path / "key"


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
        order = sorted(range(96), key=lambda index: originals.names[index])
        assert tree.names == [originals.names[index] for index in order]
        assert torch.equal(tree.images, originals.images[order])


def test_what_cannot_be_unlocked(sealed, place, command, user_error, tmp_path):
    folder, key = sealed
    (folder / "lock_50_horiz.json").unlink()
    flags = ["--unlock", "--lock-data", folder, "--orig-data", tmp_path / "out", "--key"]
    assert "none: no such key file" in user_error(lock.main, *flags, tmp_path / "none")
    sealing.make_key(tmp_path / "other")
    assert f"not the key that {folder} was sealed with" in user_error(lock.main, *flags, tmp_path / "other")
    assert "holds no sealed lock" in user_error(lock.main, *flags, key, "--lock-data", place)
    assert "go together" in user_error(lock.main, *flags[:-1])
    line = user_error(lock.main, *lock_flags(place, folder), "--key-out", tmp_path / "other")
    assert "lock_basic.json: sealed with another key than that of --key-out" in line
    line = user_error(lock.main, *lock_flags(place, folder), "--key-out", folder / "key")
    assert "lies in the folder that is handed out" in line

    for name in ("train_sealed_basic", "test_image_basic"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"{name}: changed or damaged since it was locked" in user_error(lock.main, *flags, key)
        (folder / name).write_bytes(content)
    manifest = json.loads((folder / "lock_basic.json").read_text())
    manifest["settings"]["original_sha256"]["train"]["images"] = 64 * "0"  # a manifest that was tampered with
    (folder / "lock_basic.json").write_text(json.dumps(manifest))
    assert "cannot unlock basic train" in user_error(lock.main, *flags, key)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "holds files already" in user_error(lock.main, *flags, key)
