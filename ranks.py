"""Work shared out among the processes that torchrun started. Without torchrun there is one, which does everything."""

import os
import sys
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

import utils
from utils import UserError


class Ranks:
    """This process among those of torchrun: rank, counted from 0, of world_size. Rank 0 does all the writing."""

    def __init__(self):
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_torchelastic_launched():
            self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            # gloo, since all that is exchanged lies on the CPU; and ranks may be far apart: a batch can take an hour
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def say(self, line):
        """Print a line, once."""
        if self.rank == 0:
            print(line, flush=True)

    def gather(self, value):
        """The values of all ranks, in their order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def on_rank0(self, function, *args):
        """What function(*args) returns, on every rank, called on rank 0 alone; its error is told once, and ends all."""
        if self.world_size == 1:
            return function(*args)
        outcome = [utils.attempt(function, *args) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome)
        value, error = outcome[0]
        self.abort_if(error)
        return value

    def everywhere(self, function, *args):
        """What function(*args) returns, called on every rank; an error on any of them is told once, and ends all."""
        value, error = utils.attempt(function, *args)
        self.abort_if_any(error)
        return value

    def abort_if_any(self, error):
        """End all ranks if one of them has an error, a text, rather than None: the first is told."""
        errors = [error] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(errors, error)
        self.abort_if(next((error for error in errors if error is not None), None))

    def abort_if(self, error):
        """End all ranks if there is an error, a text, which is the same on each of them; rank 0 tells it."""
        if error is None:
            return
        if self.rank == 0:
            raise UserError(error)
        with suppress(RuntimeError):  # until rank 0 has told it and ended: torchrun kills all as soon as one ends
            dist.barrier()
        sys.exit(2)

    def close(self):
        """Part from the other ranks."""
        if self.world_size > 1:
            dist.destroy_process_group()
