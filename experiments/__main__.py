"""Run many experiments, and gather what experiments found: a table in Markdown, and a picture of the curves.

    python -m experiments

prints the table of every run below experiments/, seeds put together, beside the paper's numbers, and

    python -m experiments --run --work-path experiments/cifar10/vgg19 --lock-method basic horiz --seed 0 1 2 --jobs 3

first trains each combination of work paths, methods, seeds and variants, several at the same time. Any other flag is
handed on to train.py (--epochs 40). The same command goes on after an interruption, and trains nothing twice.
"""

import argparse
import itertools
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from tqdm import tqdm

import utils
from experiments.pictures import plot_curves, plot_images
from experiments.tables import gather, table
from experiments.variants import VARIANTS
from methods import METHODS, PARAMETERS, given_parameters, parameters_of
from utils import UserError

# Run

TRAIN = str(Path(__file__).parents[1] / "train.py")


def commands(args, rest):
    """The command of train.py for each combination of what args hold."""
    for work, method, variant, seed in itertools.product(args.work_path, args.lock_method, args.variant, args.seed):
        command = [sys.executable, TRAIN, "--work-path", work, "--resume"]
        command += ["--lock-method", method] if method else []
        for name in parameters_of([method] if method else []):
            command += [f"--{name}", str(value)] if (value := getattr(args, name)) is not None else []
        command += ["--seed", str(seed)] if seed is not None else []
        command += ["--name", variant] if variant != "plain" else []
        for key, value in VARIANTS[variant].items():
            command += [f"--{key}", str(value)]
        yield command + rest


def run(command, slots, threads, running, stopped):
    """Run a command, and keep its process in the list running meanwhile; returns its exit code and what to tell of it.

    Meanwhile it holds a slot from the queue: it computes on the GPU of that number, modulo their count, or on a CPU
    with so many threads. Once the event stopped is set, nothing goes on that was just being started.
    """
    slot = slots.get()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    options["env"] = {"OMP_NUM_THREADS": str(threads), **os.environ, "LOCAL_RANK": str(slot)}
    try:
        with subprocess.Popen(command, **options) as child:
            running.append(child)
            if stopped.is_set():
                child.terminate()
            out, error = child.communicate()
            running.remove(child)
    finally:  # or, where no process can be started, the next run would wait for the number forever
        slots.put(slot)
    said = (error if child.returncode else out).strip()
    if not said or child.returncode < 0:  # killed: whatever it said before, that was not why
        return child.returncode, f"exit code {child.returncode}"
    # exit code 1 is an error that nobody foresaw: tell all that is known of it; of any other, the last line
    return child.returncode, said if child.returncode == 1 else said.splitlines()[-1]


def run_all(args, rest):
    """Run every command, args.jobs at a time; raises UserError where one fails, after all of them."""
    todo, running, stopped, failed = list(commands(args, rest)), [], Event(), 0
    jobs = min(args.jobs, len(todo))
    slots, threads = SimpleQueue(), max(1, torch.get_num_threads() // jobs)
    for slot in range(jobs):
        slots.put(slot)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), unit="run", disable=None) as progress:
        try:
            futures = {pool.submit(run, command, slots, threads, running, stopped): command for command in todo}
            for future in as_completed(futures):
                code, line = future.result()
                failed += code != 0
                progress.write(f"{shlex.join(futures[future][2:])}: {line}" if code else line)
                progress.update()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(running):
                child.terminate()  # its checkpoints are whole at any time
            raise
    if failed:
        raise UserError(
            f"{failed} of {len(todo)} runs failed, see above; the same command tries them again (a run whose folder "
            "you delete starts again)"
        )


# The command line


def picture_path(text):
    """A converter of a flag's text to the path of a picture, in a folder that there is."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".pdf", ".svg") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: name a PNG, PDF or SVG file, in a folder that there is")
    return path


def parse_arguments():
    """The arguments, and the flags for train.py."""
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add(
        "--work-path",
        nargs="+",
        type=os.path.normpath,
        default=["experiments"],
        help="folders of experiments (default: all)",
    )
    add("--plot", type=picture_path, metavar="FILE", help="also draw the curves, into this PNG, PDF or SVG file")
    add("--images", type=picture_path, metavar="FILE", help="also show the images that each lock made, in this file")
    add("--run", action="store_true", help="first train what is not trained yet")
    add("--lock-method", nargs="+", choices=[*METHODS, "all"], default=[None], help="default: that of config.yaml")
    for name in PARAMETERS:
        add(f"--{name}", type=utils.number(float, 0, 1), help=f"lock.py's --{name}, for methods that it is for")
    add("--seed", nargs="+", type=utils.parse_seed, default=[None], help="default: that of config.yaml")
    add(
        "--variant",
        nargs="+",
        choices=[*VARIANTS, "all"],
        default=["plain"],
        metavar="NAME",
        help=f"all, or some of {', '.join(VARIANTS)}: as the paper trains, on originals as a control, or against the "
        "lock (default: plain)",
    )
    add("--jobs", type=utils.number(int, 1, 1000), default=1, help="runs at the same time (default: %(default)s)")
    return complete_arguments(*parser.parse_known_args())


def complete_arguments(args, rest):
    """The arguments with lists of what is to be run, and the flags for train.py; raises UserError where some do not go
    together."""
    if rest and not args.run:
        raise UserError(f"unknown flag {rest[0]}; flags of train.py go with --run")
    if args.plot and args.plot == args.images:
        raise UserError(f"--images {args.images}: is the file of --plot; name another")
    if args.run and args.work_path == ["experiments"]:
        raise UserError("--run needs --work-path: the folders of the experiments to run")
    flags = [given.partition("=")[0] for given in rest if given.startswith("--")]
    for flag in ("--name", "--resume", "--overwrite"):
        if flag in flags:
            raise UserError(
                f"{flag}: --run names its runs by variant, and goes on with them; leave it out (a run whose folder you "
                "delete starts again)"
            )
    # a folder that is named twice is one: two runs cannot write to it
    args.work_path = list({os.path.realpath(path): path for path in args.work_path}.values())
    for name, known in {"lock_method": METHODS, "variant": VARIANTS, "seed": []}.items():
        given = getattr(args, name)
        setattr(args, name, list(known if "all" in given else dict.fromkeys(given)))
    given_parameters(args, filter(None, args.lock_method))
    for flag in flags:
        variant = next((name for name in args.variant if flag.removeprefix("--") in VARIANTS[name]), None)
        if variant:
            raise UserError(f"{flag}: --variant {variant} sets it; leave it out, or use train.py with a --name")
    return args, rest


def main():
    args, rest = parse_arguments()
    if args.run:
        run_all(args, rest)
    for folder in args.work_path:
        if not Path(folder).is_dir():
            raise UserError(f"--work-path {folder}: no such folder")
    groups = gather(args.work_path)
    if not groups:
        where = " (--work-path results shows what was measured for the README)"
        here = where if args.work_path == ["experiments"] else ""
        raise UserError(f"{', '.join(args.work_path)}: holds no result.json; run train.py, or --run{here}")
    try:
        print(table(groups), flush=True)
    except BrokenPipeError:  # of a program that reads no further, as head; or Python would flush it again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if args.plot:
        plot_curves(groups, args.plot)
    if args.images:
        plot_images(groups, args.images)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it ends what is running
    utils.run_command(main, if_interrupted="the same command goes on from here")
