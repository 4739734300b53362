"""Commands in processes of their own, which can be killed, limited and given another environment."""

import math
import multiprocessing
import os
import resource
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout

import torch

import utils

# Processes are forked from one that has imported everything, and computed nothing: they start at once.
PROCESSES = multiprocessing.get_context("forkserver")
TURN = threading.Lock()  # as one process starts, it asks all others for their exit codes, which can be read but once
PROCESSES.set_forkserver_preload(["lock", "train", "sklearn.datasets", "torchmetrics"])


def run(main, arguments, output, file_size, variables):
    """What a process does: a command, its output in a file, its files no longer than file_size bytes."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = ["command", *map(str, arguments)]
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    with open(output, "w") as file, redirect_stdout(file), redirect_stderr(file):
        utils.run_command(main)


def start(main, arguments, output=os.devnull, file_size=None, variables=None):
    """Start a command's main function; returns the process."""
    process = PROCESSES.Process(target=run, args=(main, arguments, output, file_size, variables or {}))
    with TURN:
        process.start()
    return process


def wait(process, seconds=math.inf):
    """The exit code of a process, or None where it still runs after so many seconds."""
    end = time.time() + seconds
    while True:
        with TURN:
            code = process.exitcode
        if code is not None or time.time() > end:
            return code
        time.sleep(0.01)


def finish(*arguments, **options):
    """Run a command in a process of its own; returns its exit code."""
    return wait(start(*arguments, **options))
