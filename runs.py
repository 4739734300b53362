"""The folder of a run of train.py: what may be in it when it starts, its log, curves and pictures, and its result."""

import io
import json
import shlex
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid, save_image

import utils
from checkpoints import best_record
from config import FREE_ON_RESUME, changes
from data import to_float
from lockfiles import parse_suffix
from utils import UserError, flatten, printable, read_file, write_file

# Before it starts


def prepare_folder(folder, args):
    """Empty a run's folder, but for --resume; raises UserError where that would lose a run."""
    found = [path for path in folder.iterdir() if path.name != ".lock"]
    if args.resume or not found:
        return
    if not args.overwrite:
        raise UserError(
            f"{folder} holds a run already: go on with --resume, start again with --overwrite, or set --seed"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_fresh(folder, checkpoint):
    """Raise UserError where --resume finds no checkpoint, but results, which starting again would overwrite."""
    for path in [folder / "result.json", *folder.rglob("*.pth.tar")]:
        if path.exists():
            raise UserError(
                f"--resume: there is {path}, but no {checkpoint} to go on from; start again with --overwrite"
            )


def note_start(path, epochs, device, **given):
    """Add this start to the list in a JSON file, and drop earlier ones of which no epoch was kept; returns the list.

    epochs is the range of those that it trains. What is given is added to what is known of every start.
    """
    with utils.telling_damage(lambda why: f"{path}: damaged ({why}); delete it, and the run goes on"):
        starts = json.loads(read_file(path)) if path.exists() else []
        starts = [start for start in starts if start["from_epoch"] < epochs.start]
    if epochs:
        start = {
            "from_epoch": epochs.start,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        starts.append({**start, **utils.environment(device), "commit": utils.commit(), **given})
        write_file(path, json.dumps(starts, indent=1).encode())
    return starts


# Log, curves, pictures


def log_to(path):
    """A function that prints a line, and appends it to the file with the time."""

    def log(line):
        print(line, flush=True)
        with utils.naming(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")

    return log


def open_writers(folder, first_epoch):
    """TensorBoard writers of a run, of its locked and of its original test set; the latter two share their charts."""
    folders = {"run": folder, "locked": folder / "locked", "original": folder / "original"}
    return {name: SummaryWriter(path, purge_step=first_epoch) for name, path in folders.items()}


def pictures(originals, locked):
    """A grid [3, H', W'] in [0, 1] of three rows: originals, locked images, both uint8 [N, 3, H, W], and grey plus ten
    times the difference."""
    originals, locked = to_float(originals), to_float(locked)
    difference = (0.5 + 10 * (locked - originals)).clamp(0, 1)
    grid = make_grid(torch.cat([originals, locked, difference]), nrow=len(originals), pad_value=1)
    return F.interpolate(grid[None], scale_factor=3)[0]


def write_pictures(data, path, writer=None):
    """Write the pictures of the first ten test images, to a PNG file and, where a writer is given, to TensorBoard."""
    (originals, _), (locked, _) = data["original"], data["locked"]
    grid, file = pictures(originals[: len(locked)][:10], locked[:10]), io.BytesIO()
    if writer:
        writer.add_image("images/originals, locked, 10 x difference", grid)
    save_image(grid, file, format="png")
    write_file(path, file.getvalue())


# What it came to


def summary(config, suffix, name, history):
    """What result.json says of a run: accuracies in percent, at the last evaluation and at the best on locked ones."""
    method, parameters = parse_suffix(suffix) or (suffix, {})
    last, best = history[-1], best_record(history)
    return {
        "architecture": config.architecture,
        "dataset": config.dataset,
        "lock_method": method,
        **parameters,
        "name": name,
        "seed": config.seed,
        "epochs": last["epoch"],
        "locked_acc": last["locked_acc"],
        "orig_acc": last["orig_acc"],
        "best_epoch": best["epoch"],
        "best_locked_acc": best["locked_acc"],
        "orig_acc_at_best": best["orig_acc"],
        "max_orig_acc": max(record["orig_acc"] for record in history),
    }


def finish(folder, result, writers):
    """Close a run: its row of hyper-parameters, its writers, and last its result.json."""
    add_hparams(writers["run"], result)
    for writer in writers.values():
        writer.close()
    write_file(folder / "result.json", json.dumps(result, indent=1).encode())


def outcome(result):
    """What a run came to, as a line."""
    return (
        "{architecture}, {lock_method}{comma_name}, seed {seed}, {epochs} epochs: "
        "locked {locked_acc:.2f} %, original {orig_acc:.2f} % "
        "(best locked {best_locked_acc:.2f} % at epoch {best_epoch}, original then {orig_acc_at_best:.2f} %; "
        "largest original {max_orig_acc:.2f} %)"
    ).format(comma_name=result["name"] and f", {result['name']}", **result)


def finished_outcome(path, config, data_hash):
    """The outcome in a result.json, if a run of this config ended with it, on the data of this hash; or else None."""
    try:
        result = json.loads(read_file(path))
        same = result["epochs"] == config.epochs and result["data_sha256"] == data_hash
        return outcome(result) if same and not changes(flatten(result["config"]), config) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # absent, damaged, or of older code
        return None


def add_hparams(writer, result):
    """Write the config and the final accuracies to TensorBoard's table of hyper-parameters."""
    values = {key: value for key, value in flatten(result["config"]).items() if key not in FREE_ON_RESUME}
    values |= {"lock_method": result["lock_method"], "name": result["name"]}
    # printable: a path that is no UTF-8 cannot be in an event file
    values = {key: printable(value) if isinstance(value, (str, list)) else value for key, value in values.items()}
    metrics = {f"final/{name}": value for name, value in result.items() if name.endswith("_acc")}
    for part in hparams(values, metrics):
        writer.file_writer.add_summary(part)  # SummaryWriter.add_hparams would make a run of its own
    for name, value in metrics.items():
        writer.add_scalar(name, value, result["epochs"])
