"""Processes that are killed, disks that are full, damaged files: nothing finished is lost, and nothing is silent."""

import json
import os
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import checkpoints
import data
import lock
import train
import utils
from models import base
from tests.conftest import base_flags, flip_bit, lock_flags, run_of
from tests.processes import TURN, finish, start, wait


def kill_at_random_moments(main, arguments_in, folders):
    """Run a command in each folder, kill it at a random moment, and run it again until its end.

    The first folder's is not killed, and tells how long a run takes; so does each that ends before its moment, since
    the machine may have been busier at first.
    """
    finish(print, [])  # the process that is forked from has imported everything by then
    begun = time.time()
    assert finish(main, arguments_in(folders[0])) == 0
    durations = [time.time() - begun]
    draw = random.Random(0)

    def kill_one(folder_and_share):
        folder, share = folder_and_share
        begun = time.time()
        process = start(main, arguments_in(folder))
        wait(process, share * min(durations))
        with TURN:
            process.kill()
        killed = wait(process)
        if killed == 0:
            durations.append(time.time() - begun)
        output = folder.with_name(f"{folder.name}.output")
        return killed, finish(main, arguments_in(folder), output=output), output

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(kill_one, [(folder, draw.random()) for folder in folders[1:]]))
    for _, after, output in codes:
        assert after == 0, output.read_text()
    assert {before for before, *_ in codes} <= {0, -9}
    assert sum(before == -9 for before, *_ in codes) > len(codes) / 2  # some may have ended before their moment


def contents(folder):
    """All files of a lock, by name, the manifest without its date and its commit, which an edit meanwhile changes."""
    files = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    files.pop(Path(".lock"), None)  # what keeps processes apart; some versions of filelock delete it
    manifest = json.loads(files.pop(Path("lock_basic.json")))
    assert manifest.pop("date")
    del manifest["commit"]
    return manifest, files


def test_a_lock_that_is_killed_and_started_again_ends_as_one_that_was_not(place, tmp_path):
    folders = [tmp_path / str(index) for index in range(21)]

    def arguments_in(folder):
        return [*lock_flags(place, folder), "--batch-size", 8, "--subset", 40, "--format", "tensor", "png"]

    kill_at_random_moments(lock.main, arguments_in, folders)
    undisturbed = contents(folders[0])
    assert len(undisturbed[1]) == 4 + 2 + 80  # tensors, sums, images
    for folder in folders[1:]:
        assert contents(folder) == undisturbed


def test_a_training_that_is_killed_and_started_again_ends_as_one_that_was_not(work, tmp_path):
    folders = [tmp_path / str(index) for index in range(21)]
    for folder in folders:
        shutil.copytree(work, folder)

    def arguments_in(folder):
        return ["--work-path", folder, "--epochs", 5, "--batch_size", 48, "--eval_freq", 2, "--resume"]

    kill_at_random_moments(train.main, arguments_in, folders)
    for folder in folders[1:]:
        (undisturbed, expected), (disturbed, result) = (run_of(one) for one in (folders[0], folder))
        for name in ("ckpt.pth.tar", "ckpt_best.pth.tar"):
            assert (disturbed / name).read_bytes() == (undisturbed / name).read_bytes()
        assert expected.pop("made_with") and result.pop("made_with")  # it tells when
        assert result == expected


def test_a_full_disk_costs_no_shard_and_no_older_lock(place, tmp_path):
    """The shards of 40 images fit, the file of all 96 does not."""
    flags, output = lock_flags(place, tmp_path / "full"), tmp_path / "output"
    assert finish(lock.main, flags, output, file_size=200_000) == 2
    last = output.read_text().splitlines()[-1]
    assert last == f"command: error: [Errno 27] File too large: '{tmp_path}/full/.new_basic/train_image_basic'"
    assert finish(lock.main, flags, output) == 0
    assert "images in" not in output.read_text()  # nothing was attacked again
    for name in ("train_image_basic", "test_image_basic"):
        assert (tmp_path / "full" / name).read_bytes() == (place / name).read_bytes()
    before = contents(tmp_path / "full")
    assert finish(lock.main, [*flags, "--eps", 0.7, "--overwrite"], file_size=200_000) == 2
    assert before[0] == contents(tmp_path / "full")[0] and before[1].items() <= contents(tmp_path / "full")[1].items()
    assert finish(lock.main, [*flags, "--eps", 0.7, "--overwrite"], output) == 0
    assert "images in" not in output.read_text() and contents(tmp_path / "full")[0]["settings"]["eps"] == 0.7


@pytest.fixture
def two_epochs(work):
    """Flags of a training of which two epochs are done, and the path of its checkpoint."""
    flags = ["--work-path", work, "--batch_size", 48, "--resume"]
    assert finish(train.main, [*flags, "--epochs", 2]) == 0
    return flags, work / "basic" / "seed0" / "ckpt.pth.tar"


def test_a_full_disk_costs_no_checkpoint(two_epochs, tmp_path):
    flags, _ = two_epochs
    output = tmp_path / "output"
    assert finish(train.main, [*flags, "--epochs", 4], output, file_size=100_000) == 2
    last = output.read_text().splitlines()[-1]
    assert last.startswith("command: error: [Errno 27] File too large: ") and "ckpt" in last
    assert finish(train.main, [*flags, "--epochs", 4], output) == 0
    assert "resumed after epoch 2" in output.read_text()


def test_a_full_disk_costs_no_base_classifier(place, tmp_path):
    folder, output = tmp_path / "base", tmp_path / "output"
    shutil.copytree(place / "base", folder)
    flags = [*base_flags(tmp_path), "--resume", folder / "checkpoint.pt.latest", "--resume-optimizer", 1]
    assert finish(base.main, [*flags, "--epochs", 4, "--log-iters", 1], output, file_size=400_000) == 2
    last = output.read_text().splitlines()[-1]
    assert last == f"command: error: [Errno 27] File too large: '{folder}/checkpoint.pt.latest'"
    for name in ("checkpoint.pt.latest", "checkpoint.pt.best"):
        assert (folder / name).read_bytes() == (place / "base" / name).read_bytes()


def test_a_checkpoint_that_is_cut_short_costs_one_epoch(two_epochs, work, tmp_path):
    flags, checkpoint = two_epochs
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert finish(train.main, [*flags, "--epochs", 3], tmp_path / "output") == 0
    lines = (tmp_path / "output").read_text()
    assert f"{checkpoint}: damaged" in lines
    assert f"resumed after epoch 1, from {checkpoint.parent}/ckpt_prev" in lines
    checkpoint.write_bytes(b"")
    assert checkpoints.recover(checkpoint, log=print)["epoch"] == 2
    assert not checkpoint.exists()  # or else it would take the place of the one before, at the next save
    (checkpoint.parent / "result.json").unlink()  # or else the run would be finished
    assert finish(train.main, [*flags, "--epochs", 3]) == 0
    other = tmp_path / "undisturbed"
    shutil.copytree(work, other, ignore=shutil.ignore_patterns("basic"))
    assert finish(train.main, ["--work-path", other, *flags[2:], "--epochs", 3]) == 0
    assert checkpoint.read_bytes() == (other / "basic" / "seed0" / "ckpt.pth.tar").read_bytes()


@contextmanager
def no_privileges():
    """A folder that cannot be written to, whoever runs the tests: the administrator can write everywhere."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # not in TMPDIR, which may be closed to nobody
        os.chmod(folder, 0o555)
        if user == 0:
            os.seteuid(65534)  # nobody
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def test_a_folder_that_cannot_be_written_to(place, user_error, monkeypatch):
    checkpoint = place / "base" / "checkpoint.pt.best"
    content, classifier = checkpoint.read_bytes(), lock.load_classifier(checkpoint, "preresnet8", "digits")
    digits, splits = data.DATASETS["digits"], {split: data.load_digits(None, split) for split in data.SPLITS}
    # what is read is read before: where it lies may be closed to nobody
    monkeypatch.setattr(lock, "load_classifier", lambda *args: classifier)
    monkeypatch.setattr(Path, "read_bytes", lambda path: content)
    monkeypatch.setitem(data.DATASETS, "digits", digits._replace(load=lambda _, part, count: splits[part].first(count)))
    with no_privileges() as folder:
        line = user_error(lock.main, *lock_flags(place, folder / "new"))
        assert f"{folder}/new: cannot be a folder to write to (Permission denied); name another" in line
        assert "Permission denied" in user_error(lock.main, *lock_flags(place, folder))


def test_two_processes_do_not_write_to_one_folder(place, two_epochs, user_error, tmp_path):
    flags, checkpoint = two_epochs
    for folder, main, arguments in (
        (tmp_path / "locked", lock.main, lock_flags(place, tmp_path / "locked")),
        (checkpoint.parent, train.main, [*flags, "--epochs", 3]),
        (tmp_path / "base", base.main, [*base_flags(tmp_path), "--epochs", 1]),
    ):
        with utils.exclusive(folder):
            before = set(folder.iterdir())
            assert f"{folder}: another process is writing there" in user_error(main, *arguments)
            assert set(folder.iterdir()) == before
        assert finish(main, arguments) == 0


@pytest.mark.parametrize("name", ["train_image_basic", "test_label_basic"])
def test_a_locked_file_that_is_damaged(place, work, locked, user_error, name):
    content = (locked / name).read_bytes()
    (locked / name).write_bytes(flip_bit(content, len(content) // 2))
    line = user_error(train.main, "--work-path", work, "--lock-data", locked)
    assert f"{locked}/{name}: changed or damaged since it was locked" in line
    line = user_error(lock.main, *lock_flags(place, locked))
    assert f"{locked}/{name}: changed or damaged" in line and "get it again from a copy, or lock again with" in line
    assert "not as they were locked: 1, see above" in user_error(lock.main, "--verify", locked)
