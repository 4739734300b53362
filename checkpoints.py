"""The checkpoints of a training run: written in the background, and read back however a run was interrupted."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

import utils
from config import changes
from utils import UserError, flatten, load_whole, read_file, serialize, write_file


class Learner(NamedTuple):
    """What training changes; a checkpoint holds the state of each."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # float16 has no room for small gradients; for other precisions it does nothing


def on_gpu(learner):
    """Whether a Learner's model is on a GPU."""
    return next(learner.model.parameters()).is_cuda


CHECKPOINT_KEYS = {"epoch", *Learner._fields, "history", "config", "data", "rng", "cuda_rng"}


def beside(checkpoint, kind):
    """The path of another checkpoint of the run: "previous", the one before the last, or "best" on locked images."""
    return checkpoint.with_name(checkpoint.name.replace(".pth.tar", f"_{kind}.pth.tar"))


def is_begun(checkpoint):
    """Whether a run has a checkpoint that it can go on from."""
    return checkpoint.exists() or beside(checkpoint, "previous").exists()


def snapshot(learner, epoch, history, config, data_hash):
    """All that --resume needs, after an epoch, copied to the CPU; history is the list of the evaluations so far.

    History and config are JSON, so that equal states give equal bytes: pickles of equal objects can differ.
    """
    state = {
        "epoch": epoch,
        **{name: part.state_dict() for name, part in learner._asdict().items()},
        "history": json.dumps(history),
        "config": json.dumps(flatten(config)),
        "data": data_hash,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_gpu(learner) else None,
    }
    return tree_map_only(torch.Tensor, partial(torch.Tensor.to, device="cpu", copy=True), state)


def write_checkpoint(checkpoint, state):
    """Write a snapshot as the last checkpoint, and as the best one if it is; that of the epoch before is kept too."""
    content = serialize(state)
    if checkpoint.exists():
        os.replace(checkpoint, beside(checkpoint, "previous"))
    write_file(checkpoint, content)
    if is_best(state):  # not before: an epoch that is trained again may end otherwise on a GPU
        write_file(beside(checkpoint, "best"), content)


@contextmanager
def background():
    """Yields start(function, *args), which waits for the function started before, then runs this one in a thread.

    Leaving the context waits too. What a function raises, the next start raises, or the end of the context.
    """
    with ThreadPoolExecutor(1) as thread:
        last = None

        def start(function, *args):
            nonlocal last
            if last:
                last.result()
            last = thread.submit(function, *args)

        yield start
        if last:
            last.result()


def best_record(history):
    """The record of the evaluation with the largest locked accuracy; the first of equals."""
    return max(history, key=lambda record: record["locked_acc"])


def is_best(state):
    """Whether a snapshot is of the epoch with the largest locked accuracy so far."""
    return best_record(json.loads(state["history"]))["epoch"] == state["epoch"]


def recover(checkpoint, log):
    """The last whole checkpoint of a run, or None where none was written; brings its files in order.

    A last one that is damaged is deleted, and the best one written, where the run may have been stopped before that.
    Raises UserError where all are damaged.
    """
    damaged = None
    for path in (checkpoint, beside(checkpoint, "previous")):
        if not path.exists():
            continue
        try:
            with utils.telling_damage(lambda why: f"{path}: damaged ({why})"):
                state = load_whole(path)
                if not CHECKPOINT_KEYS <= state.keys():
                    raise ValueError("not a checkpoint of train.py")
        except UserError as error:
            damaged = str(error)
            log(f"{damaged}; looking for the one before")
            continue
        log(f"resumed after epoch {state['epoch']}, from {path}")
        if damaged:
            checkpoint.unlink()  # so that it never takes the place of the one before
        if is_best(state):
            write_file(beside(checkpoint, "best"), read_file(path))
        return state
    if damaged:
        raise UserError(f"{damaged}, and there is no other; start again with --overwrite")
    return None


def load_pretrained(model, path):
    """Give a model the weights in a file: a checkpoint of train.py, or a state dict, of the same architecture.

    Layers that have another shape there, as the last one for another number of classes, keep their random weights.
    Returns what to say of it. Raises UserError where the file is absent, damaged, or of another architecture.
    """
    if not Path(path).is_file():
        raise UserError(f"pretrained: {path}: no such file")
    with utils.telling_damage(lambda why: f"pretrained: {path}: not a file of weights, or damaged ({why})"):
        content = load_whole(path)
        weights = content.get("model", content)
        shapes = {name: value.shape for name, value in weights.items()}
    own = model.state_dict()
    if shapes.keys() != own.keys():
        raise UserError(f"pretrained: {path}: not of this architecture; name a checkpoint of train.py, or a state dict")
    random = [name for name, value in own.items() if value.shape != shapes[name]]
    model.load_state_dict({name: weights[name] for name in own.keys() - random}, strict=False)
    return f"pretrained: {path}" + (f", but {', '.join(random)} are random" if random else "")


def restore(state, learner, config, data_hash):
    """Bring back what a snapshot holds; raises UserError where it is of another run."""
    for key, (then, now) in changes(json.loads(state["config"]), config).items():
        raise UserError(f"--resume: the run was trained with {key} {then}, but it is {now} now; set it back")
    if state["data"] != data_hash:
        raise UserError("--resume: the run was trained on other data than the files hold now; start with --overwrite")
    if state["epoch"] > config.epochs:
        raise UserError(f"--resume: the run has {state['epoch']} epochs already; it cannot end after {config.epochs}")
    # only the momentum: lr must be a tensor on this device, and the other settings are the config's
    state["optimizer"]["param_groups"] = learner.optimizer.state_dict()["param_groups"]
    for name, part in learner._asdict().items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    if on_gpu(learner) and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    elif on_gpu(learner):  # the epoch before ran on a CPU, which keeps no state of a GPU: draw anew
        torch.cuda.manual_seed(config.seed + state["epoch"])
