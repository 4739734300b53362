"""Locked files, in this project's form and in the authors'; what is wrong with a file, and how it is told."""

import errno
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

import checkpoints
import data
import lockfiles
import sealing
import shards
import utils
from data import to_uint8
from lockfiles import Paths, load_locked
from models import base
from tests.conftest import Malicious, flip_bit
from utils import UserError, exclusive, load_whole, printable, run_command, sync_folder, write_file

IMAGES = torch.arange(5 * 3 * 4 * 4).remainder(256).to(torch.uint8).view(5, 3, 4, 4)
LABELS = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def pair(tmp_path):
    """Saves images and labels, and returns their paths."""

    def save(images, labels):
        paths = tmp_path / "train_image_50_mixup", tmp_path / "train_label_50_mixup"
        for path, content in zip(paths, (images, labels)):
            torch.save(content, path)
        return paths

    return save


def test_this_projects_files(pair):
    images, labels, manifest = load_locked(*pair([IMAGES], [LABELS]))
    assert manifest is None and torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
    column = torch.stack([LABELS, LABELS], 1)[:, 0]
    images, labels, _ = load_locked(*pair([IMAGES.to(memory_format=torch.channels_last)], [column]))
    assert images.is_contiguous() and torch.equal(images, IMAGES)  # else their bytes could not be hashed
    assert labels.is_contiguous() and torch.equal(labels, LABELS)


def test_the_originals_list_of_float_batches(pair):
    """Its batches are float32 in [0, 1]; the nearest 8-bit value is meant, not the next below."""
    floats = IMAGES.float() / 255 - 1e-4
    images, labels, _ = load_locked(*pair([floats[:2], floats[2:4], floats[4:]], list(LABELS.split(2))))
    assert images.dtype == torch.uint8 and torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)
    white, labels, _ = load_locked(*pair([torch.ones(5, 3, 4, 4) + 1e-4], [LABELS.int()]))
    assert (white == 255).all() and labels.dtype == torch.int64


def test_to_uint8_rounds_to_nearest():
    assert to_uint8(torch.tensor([0.0, 0.49 / 255, 0.51 / 255, 1.0])).tolist() == [0, 0, 1, 255]


@pytest.mark.filterwarnings("ignore:Validating sparse")  # as an error, it would refuse before we do
@pytest.mark.parametrize(
    "images, labels, message",
    [
        ([IMAGES], [LABELS[:4]], "5 images"),
        ([IMAGES[:, 0]], [LABELS], r"expected images \[N, 3, H, W\]"),
        ([IMAGES], [LABELS.float()], "expected labels"),
        ({"images": 3}, [LABELS], "not a list of tensors"),
        ([Malicious()], [LABELS], "not a list of tensors"),
        ([IMAGES[:0]], [LABELS[:0]], r"expected images \[N, 3, H, W\]"),
        ([IMAGES.float()], [LABELS], r"must lie in \[0, 1\]"),
        ([IMAGES.float() * torch.nan], [LABELS], r"must lie in \[0, 1\]"),
        ([IMAGES], [LABELS > 2], "expected labels"),
        ([IMAGES / 255 - 0.1], [LABELS], r"must lie in \[0, 1\]"),
        ([IMAGES / 255 + 0.1], [LABELS], r"must lie in \[0, 1\]"),
        ([IMAGES], [LABELS[:, None]], "expected labels"),
        ([IMAGES[:, :1]], [LABELS], r"expected images \[N, 3, H, W\]"),
        ([IMAGES.float().div(255).to_sparse()], [LABELS], "not a list of tensors"),
    ],
)
def test_files_that_do_not_fit(pair, images, labels, message):
    with pytest.raises(UserError, match=message):
        load_locked(*pair(images, labels))


def test_absent_file_names_the_command_that_makes_it(tmp_path):
    for name, flags in {
        "train_image_basic": "--lock-method basic",
        "test_label_29_mixup": "--lock-method mixup --lambd 0.29",
        "test_image_50_horiz": "--lock-method horiz",
        "test_image_30_40_mixandcat": "--lock-method mixandcat --alpha 0.3 --lambd 0.4",
    }.items():
        with pytest.raises(UserError, match=f"lock.py --lock-data {tmp_path} {flags}, and the --arch and --resume"):
            load_locked(tmp_path / name, tmp_path / name)
    with pytest.raises(UserError, match="lock.py --lock-data 'my data' --lock-method basic --dataset digits, and the"):
        load_locked("my data/train_image_basic", "my data/train_label_basic", "--dataset digits")
    for name in ("train_image_bsic", "train_image_mixup", "train_images_basic", "trian_image_basic", "images"):
        with pytest.raises(UserError, match=f"{name}: no such file, nor a name that lock.py gives; correct it$"):
            load_locked(tmp_path / name, tmp_path / name)


def test_damaged_file(pair):
    paths = pair([IMAGES], [LABELS])
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    with pytest.raises(UserError, match="train_image_50_mixup: not a list of tensors, or damaged"):
        load_locked(*paths)


def test_one_flipped_bit_in_a_shard_or_a_checkpoint_is_noticed(tmp_path):
    """torch.load alone would read on."""
    paths = Paths(tmp_path, "basic")
    paths.partial.mkdir()
    shard, checkpoint = shards.shard_path(paths, "train", 0), tmp_path / "ckpt.pth.tar"
    for path in (shard, checkpoint):
        content = {"of": shard.name, "locked": IMAGES, **dict.fromkeys(checkpoints.CHECKPOINT_KEYS, 1)}
        torch.save(content, path)
        assert torch.equal(load_whole(path)["locked"], IMAGES)
        content = path.read_bytes()
        path.write_bytes(flip_bit(content, content.index(IMAGES.numpy().tobytes()) + 7))
        assert not torch.equal(torch.load(path)["locked"], IMAGES)
    assert shards.read_shard(paths, "train", 0) is None and shards.missing({"basic": paths}, "train", [0])
    with pytest.raises(UserError, match="ckpt.pth.tar: damaged"):
        checkpoints.recover(checkpoint, log=print)


def test_nothing_in_a_shard_or_a_checkpoint_runs(tmp_path):
    paths = Paths(tmp_path, "basic")
    paths.partial.mkdir()
    torch.save({"of": "train_00000000", "locked": Malicious()}, shards.shard_path(paths, "train", 0))
    assert shards.read_shard(paths, "train", 0) is None
    torch.save({"epoch": Malicious()}, tmp_path / "ckpt.pth.tar")
    with pytest.raises(UserError, match="ckpt.pth.tar: damaged"):
        checkpoints.recover(tmp_path / "ckpt.pth.tar", log=print)


def test_a_full_memory_is_no_damage(pair, tmp_path, monkeypatch):
    """Else an intact file would be made again."""
    paths, locked = Paths(tmp_path, "basic"), pair([IMAGES], [LABELS])
    reads = [
        partial(load_locked, *locked),
        partial(shards.read_shard, paths, "train", 0),
        partial(checkpoints.recover, locked[0], print),
        partial(checkpoints.load_pretrained, None, locked[0]),
        partial(base.read_checkpoint, locked[0]),
        partial(data.read_image, locked[0]),
    ]
    monkeypatch.setattr("PIL.Image.open", Mock(side_effect=MemoryError))
    monkeypatch.setattr(torch, "load", Mock(side_effect=MemoryError))
    paths.partial.mkdir()
    shutil.copy(locked[0], shards.shard_path(paths, "train", 0))
    for read in reads:
        with pytest.raises(MemoryError):
            read()


def test_what_a_message_says_stays_on_its_line():
    assert printable("a\nb\x1b[2J") == "a b [2J"


def test_letters_that_the_output_has_not(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    run_command(lambda: print("фото", flush=True))
    assert sys.stdout.buffer.getvalue() == b"\\u0444\\u043e\\u0442\\u043e\n"


def test_a_folder_that_cannot_be_brought_to_the_disk(tmp_path, monkeypatch):
    """Some network file systems say so of every one; any other error is one."""
    for number, wrong in {errno.EINVAL: False, errno.EIO: True}.items():

        def fail(descriptor, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError) if wrong else nullcontext():
            sync_folder(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    for number, wrong in {errno.ENOLCK: False, errno.ENOTSUP: False, errno.EACCES: True}.items():

        def fail(lock, timeout, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(FileLock, "acquire", fail)
        with pytest.raises(OSError) if wrong else nullcontext(), exclusive(tmp_path):
            assert "cannot keep two processes apart" in capsys.readouterr().out


def test_a_lock_outlives_no_process_where_files_cannot_be_locked(tmp_path, monkeypatch, capsys):
    """As on some parallel file systems: a marker file that a killed process left would stop all later ones."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    for _ in range(2):
        with exclusive(tmp_path):
            shutil.copytree(tmp_path, tmp_path.with_name("killed"), dirs_exist_ok=True)
            assert "cannot keep two processes apart" in capsys.readouterr().out
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with exclusive(tmp_path.with_name("killed")):
        assert "cannot keep two processes apart" in capsys.readouterr().out


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_file(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_writing_is_in_nobodys_way(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"half of it")
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_disk_that_is_full_or_fails_is_told_with_the_file(pair, tmp_path, monkeypatch):
    """Which the system does not name."""
    paths, part = pair([IMAGES], [LABELS]), data.load_digits(None, "test").first(1)
    (name,) = part.names
    failing = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr("pathlib.Path.write_bytes", failing)
    monkeypatch.setattr("pathlib.Path.read_bytes", failing)
    for path, function in {
        tmp_path / "tree" / name: partial(lockfiles.write_tree, tmp_path / "tree", part),
        tmp_path / "basic" / "test" / name: partial(lockfiles.png_bytes, Paths(tmp_path, "basic"), "test", name, ""),
        tmp_path / "key": partial(sealing.read_key, tmp_path / "key"),
        tmp_path / "lock_basic.json": partial(lockfiles.read_manifest, Paths(tmp_path, "basic")),
        paths[0]: partial(load_locked, *paths),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
            function()


def test_a_pipe_that_is_broken_is_no_file(tmp_path):
    with pytest.raises(BrokenPipeError) as caught, utils.naming(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert caught.value.filename is None


def test_an_error_that_names_its_file_keeps_that_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory: '/other'"), utils.naming(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/other")


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_that_of_the_code(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # of another repository, where a hook set it
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # which may sign, or have hooks
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "utils.py").write_text("committed")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m a"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    commit = utils.commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "utils.py").write_text("changed")
    assert utils.commit() == f"{commit}-dirty"
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "unpacked" / "utils.py"))
    assert utils.commit() is None  # the repository around it is another's


def test_what_is_done_in_threads_comes_in_order():
    threads = set()

    def slow(index):
        threads.add(threading.current_thread())
        time.sleep(0.01 * (index % 3 == 0))
        return -index

    assert utils.in_threads(slow, range(200)) == [-index for index in range(200)]
    assert threading.main_thread() not in threads and len(threads) <= torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        utils.in_threads(lambda index: 1 / index, [1, 0, 2])


def test_a_slice_is_saved_alone():
    assert len(lockfiles.to_bytes(torch.zeros(10**5)[:1])) < 10**4


def test_names_that_leave_the_folder_are_not_written(tmp_path):
    part = data.load_digits(None, "test").first(1)._replace(names=["../evil.png"])
    with pytest.raises(UserError, match="cannot be the name of an image"):
        lockfiles.write_tree(tmp_path / "tree", part)
