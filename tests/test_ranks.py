"""Several processes at one lock: the same bytes as from one, and one line for a mistake."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from unittest.mock import Mock

import pytest
import torch

import data
import lock
import utils
from ranks import Ranks
from tests.conftest import ROOT, lock_flags
from tests.processes import finish, start, wait

FIVE_BATCHES = ["--batch-size", 20, "--lock-method", "basic", "mixup"]  # two for each of two processes, and a last one


def in_two(main, arguments, folder):
    """Run a command in two processes that find each other as those of torchrun do: exit codes, and all that is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one
    common = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = [folder / f"said_by_{rank}" for rank in range(2)]
    processes = [
        start(main, arguments, output, variables={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, output in enumerate(said)
    ]
    return [wait(process, 300) for process in processes], "".join(output.read_text() for output in said)


def unlike():
    """lock.py where the second process has a CPU that would choose another precision."""
    utils.bfloat16_unit = lambda: "AMX" if os.environ.get("RANK") == "1" else None
    lock.main()


def other():
    """lock.py where the second process has another test image."""
    load = data.load_digits

    def load_other(path, split, count):
        found = load(path, split, count)
        found.images[0] += os.environ["RANK"] == "1" and split == "test"
        return found

    data.DATASETS["digits"] = data.DATASETS["digits"]._replace(load=load_other)
    lock.main()


def full():
    """lock.py where the second process has no memory for any batch."""
    lock_batch = lock.lock_batch

    def lock_batch_or_not(*args):
        if os.environ["RANK"] == "1":
            raise MemoryError
        return lock_batch(*args)

    lock.lock_batch = lock_batch_or_not
    lock.main()


def test_two_processes_give_the_bytes_of_one(place, tmp_path):
    assert finish(unlike, [*lock_flags(place, tmp_path / "one"), *FIVE_BATCHES]) == 0
    codes, said = in_two(unlike, [*lock_flags(place, tmp_path / "two"), *FIVE_BATCHES], tmp_path)
    assert codes == [0, 0], said
    assert said.count("Locking digits by basic, mixup") == 1 and "and 1 more" in said
    names = sorted(path.name for path in (tmp_path / "one").glob("t*"))
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    codes, said = in_two(lock.main, [*lock_flags(place, tmp_path / "two"), *FIVE_BATCHES, "--eps", 0.3], tmp_path)
    assert codes == [2, 2] and said.count("was made with eps 0.5, but now it is 0.3") == 1


def test_torchrun_starts_them(place, tmp_path):
    """As the README says; of one thread each, as torchrun sets it anyway."""
    launcher = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--log-dir={tmp_path / 'logs'}"]
    command = [*launcher, "--nproc-per-node=2", "lock.py", *lock_flags(place, tmp_path / "locked")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("and 1 more") == 1, run.stderr
    assert finish(lock.main, lock_flags(place, tmp_path / "alone")) == 0
    for name in ("train_image_basic", "test_image_basic"):
        assert (tmp_path / "locked" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_ranks_wait_for_each_other_for_as_long_as_a_batch_may_take(monkeypatch):
    begin = Mock()
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size) == (1, 2)
    assert begin.call_args.kwargs["timeout"] > timedelta(days=1)


def test_a_mistake_ends_both_and_is_told_once(place, tmp_path):
    codes, said = in_two(other, lock_flags(place, tmp_path / "locked"), tmp_path)
    assert codes == [2, 2] and not list((tmp_path / "locked").glob("*"))
    assert said.count("rank 1 has another basic.original_sha256.test.images than rank 0; give every machine") == 1
    codes, said = in_two(lock.main, ["--dataset", "digits", "--resume-path", "none"], tmp_path)
    assert codes == [2, 2] and said.count("none: no such checkpoint") == 1


def test_what_one_process_cannot_do_costs_no_batch_of_another(place, tmp_path):
    codes, said = in_two(full, lock_flags(place, tmp_path / "locked"), tmp_path)
    assert codes == [2, 2] and "ranks.py" not in said  # as in a traceback of the first process
    assert said.count("the memory is full; take smaller batches") == 1
    assert [path.name for path in (tmp_path / "locked" / ".lock_basic").glob("t*")] == ["train_00000000"]


def test_what_ends_one_process_is_told_by_one_and_awaited_by_the_others(monkeypatch, capsys):
    awaited, one = [], object.__new__(Ranks)  # of two that have found each other
    one.rank, one.world_size = 1, 2
    monkeypatch.setattr(torch.distributed, "barrier", lambda: awaited.append(1))
    with pytest.raises(SystemExit):
        one.abort_if("an error")
    assert awaited and "an error" not in capsys.readouterr().err
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            utils.run_command(Mock(side_effect=KeyboardInterrupt))
        assert capsys.readouterr().err.startswith("interrupted: ") == (rank == "0")


def test_more_processes_than_gpus_share_them(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for rank in range(5):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert utils.set_up_device() == (chosen[-1], "a GPU")
    assert [device.index for device in chosen] == [0, 1, 0, 1, 0]


def test_one_process_verifies(place, tmp_path):
    codes, said = in_two(lock.main, ["--verify", place], tmp_path)
    assert codes == [0, 0] and said.count("is as it was locked") == 1
