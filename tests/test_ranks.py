"""Several processes at one lock: the same bytes as from one, and one line for a mistake."""

import os
import subprocess
import sys
import tempfile

from tests.conftest import lock_flags

# lock.py where the second process has a CPU that would choose another precision
UNLIKE = """
import os
import lock, utils
utils.bfloat16_unit = lambda: "AMX" if os.environ.get("RANK") == "1" else None
utils.run_command(lock.main)
"""

# lock.py where the second process has another test image
OTHER = """
import os
import data, lock, utils
load = data.load_digits
def load_other(path, split):
    found = load(path, split)
    found.images[0] += os.environ["RANK"] == "1" and split == "test"
    return found
data.DATASETS["digits"] = data.DATASETS["digits"]._replace(load=load_other)
utils.run_command(lock.main)
"""


# lock.py where the second process has no memory for any batch
FULL = """
import os
import lock, utils
lock_batch = lock.lock_batch
def lock_batch_or_not(*args):
    if os.environ.get("RANK") == "1":
        raise MemoryError
    return lock_batch(*args)
lock.lock_batch = lock_batch_or_not
utils.run_command(lock.main)
"""


def torchrun(count, script, *arguments):
    """Run a script in processes that torchrun starts, of one thread each, as torchrun sets it anyway."""
    with tempfile.TemporaryDirectory() as logs:  # which torchrun would leave behind
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--log-dir={logs}"]
        launcher = [*launcher, f"--nproc-per-node={count}"] if count > 1 else []
        return subprocess.run(
            [sys.executable, *launcher, *map(str, [script, *arguments])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        )


def test_two_processes_give_the_bytes_of_one(place, tmp_path):
    """Five batches: two for each, and a last one, for one of them alone."""
    flags = ["--batch-size", 20, "--lock-method", "basic", "mixup"]
    (tmp_path / "unlike.py").write_text(UNLIKE)
    for count in (1, 2):
        run = torchrun(count, tmp_path / "unlike.py", *lock_flags(place, tmp_path / str(count)), *flags)
        assert run.returncode == 0, run.stderr
    assert run.stdout.count("Locking digits by basic, mixup") == 1 and "and 1 more" in run.stdout
    names = sorted(path.name for path in (tmp_path / "1").glob("t*"))
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

    (tmp_path / "other.py").write_text(OTHER)
    run = torchrun(2, tmp_path / "other.py", *lock_flags(place, tmp_path / "other"), *flags)
    assert run.returncode != 0 and not list((tmp_path / "other").glob("*"))
    assert run.stderr.count("rank 1 has another basic.original_sha256.test.images than rank 0; give every machine") == 1

    run = torchrun(2, "lock.py", *lock_flags(place, tmp_path / "2"), *flags, "--eps", 0.3)
    assert run.returncode != 0
    assert run.stderr.count("was made with eps 0.5, but now it is 0.3") == 1

    run = torchrun(2, "lock.py", "--dataset", "digits", "--resume-path", "none")
    assert run.returncode != 0 and run.stderr.count("none: no such checkpoint") == 1


def test_what_one_process_cannot_do_costs_no_batch_of_another(place, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    run = torchrun(2, tmp_path / "full.py", *lock_flags(place, tmp_path / "locked"))
    assert run.returncode != 0 and "ranks.py" not in run.stderr  # as in a traceback of the first process
    assert run.stderr.count("the memory is full; take smaller batches") == 1
    assert [path.name for path in (tmp_path / "locked" / ".lock_basic").glob("t*")] == ["train_00000000"]


def test_one_process_verifies(place):
    run = torchrun(2, "lock.py", "--verify", place)
    assert run.returncode == 0 and run.stdout.count("is as it was locked") == 1
