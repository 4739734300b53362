"""Work shared out among the processes that torchrun started. Without torchrun there is one, which does everything."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist

from utils import UserError


class Ranks:
    """This process among those of torchrun: rank, counted from 0, of count. Rank 0 does all the writing."""

    def __init__(self):
        self.rank, self.count = 0, 1
        if dist.is_available() and dist.is_torchelastic_launched():
            self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            # gloo, since all that is exchanged lies on the CPU; and ranks may be far apart: a batch can take an hour
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def say(self, line):
        """Print a line, once."""
        if self.rank == 0:
            print(line, flush=True)

    def gather(self, value):
        """The values of all ranks, in their order, on rank 0; None elsewhere."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def on_rank0(self, function, *args):
        """What function(*args) returns, on every rank, called on rank 0 alone; its error is told once, and ends all."""
        if self.count == 1:
            return function(*args)
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function(*args)
            except (UserError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        value, error = outcome
        if error and self.rank == 0:
            raise error
        if error:
            sys.exit(2)
        return value

    def close(self):
        """Part from the other ranks."""
        if self.count > 1:
            dist.destroy_process_group()
