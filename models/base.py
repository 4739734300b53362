"""Base classifiers: trained by robustness, loaded from its checkpoints. But for tests, only this file imports it.

    python -m models.base --dataset cifar --data ./data/cifar10 --adv-train 0 --arch resnet50 \\
        --out-dir ./logs/checkpoints/dir/ --exp-name resnet50

takes the flags of `python -m robustness.main` (robustness 1.2.1.post2, 2020: its last release), all but --config-path
and what does not work there, and trains with robustness' own loop, checkpoints and store. New are --precision,
--compile and --manual-seed. --arch is one of its CIFAR architectures or of models/; --constraint, --eps and --attack-lr
are required only with --adv-train 1 or --adv-eval 1.
"""

import argparse
import ast
import codecs
import inspect
import itertools
import math
import os
import shlex
import sys
import types
import warnings
from contextlib import closing, contextmanager, nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.hub import load_state_dict_from_url

import utils
from augmentation import color_jitter, random_crop, random_flip, random_rotation
from data import DATASETS, to_float
from graphs import Compiled
from models import MODELS
from utils import COMPILE, UserError, number, serialize, write_file

# To run robustness today

# Three of its files import this torchvision module, which is gone; the function lives on in torch.hub.
_gone = types.ModuleType("torchvision.models.utils")
_gone.load_state_dict_from_url = load_state_dict_from_url
sys.modules.setdefault(_gone.__name__, _gone)
# It imports GitPython to note its own version, which otherwise fails where there is no git.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# HDF5, in which its store is, locks its files, as some network file systems cannot; here the whole folder is locked.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # Python 3.12 frowns at the backslashes in its docstrings
    from robustness import cifar_models
    from robustness import datasets as robustness_datasets
    from robustness.attacker import AttackerModel
    from robustness.model_utils import DummyModel
    from robustness.tools.helpers import accuracy


@contextmanager
def one_device(device):
    """Let robustness compute on one device: it calls .cuda() on everything, and its DataParallel takes every GPU.

    On a CPU, .cuda() returns its tensor or module unchanged. (On further GPUs, copies of a network would call the
    forward that is bound to the first one's weights.)
    """
    if device.type == "cuda":

        class OneGPU(nn.DataParallel):
            def __init__(self, module, device_ids=None):
                super().__init__(module, [device.index])

        with mock.patch.object(nn, "DataParallel", OneGPU):
            yield
        return
    stay = {"cuda": lambda self, *args, **kwargs: self}
    with mock.patch.multiple(torch.Tensor, **stay), mock.patch.multiple(nn.Module, **stay):
        yield


@contextmanager
def careful_saving():
    """Let torch.save, by which robustness writes over its last checkpoint, put a whole and sound one in its place.

    Raises UserError where the weights hold NaN or infinity.
    """
    save = torch.save

    def save_checkpoint(state, path, **options):
        if not isinstance(path, str):  # a buffer: that of serialize, or of torch.compile
            return save(state, path, **options)
        if not all_finite(state["model"]):
            raise UserError(
                f"epoch {state['epoch']}: the weights hold NaN or infinity; lower --lr, and choose another --exp-name"
            )
        write_file(path, serialize(state))

    with mock.patch.object(torch, "save", save_checkpoint):
        yield


@contextmanager
def errors_let_out():
    """Raise what robustness' loop catches while it computes an accuracy, even Ctrl-C, of which it would only warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Failed to calculate the accuracy")
        try:
            yield
        except UserWarning as warning:
            raise (warning.__context__ or warning) from None


# The data, as robustness' loops want them


def augment_photos(images):
    """uint8 images [N, 3, H, W] as inputs in [0, 1], augmented as robustness does it for CIFAR-10, but all at once."""
    return random_rotation(color_jitter(to_float(random_flip(random_crop(images))), 0.25), 2)


def augment_digits(images):
    """The same, less the flip, the colours and half of the padding: a mirrored 2 is no 2, and digits fill an image."""
    return random_rotation(to_float(random_crop(images, padding=2)), 2)


AUGMENTATION = {name: augment_digits if name == "digits" else augment_photos for name in DATASETS}


class Batches:
    """What robustness takes for a loader: batches of a Split that lies on the device, its images transformed there."""

    def __init__(self, split, device, batch_size, transform=to_float, shuffle=False):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size, self.transform, self.shuffle = batch_size, transform, shuffle

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        draw = torch.randperm if self.shuffle else torch.arange
        for indices in draw(len(self.labels), device=self.labels.device).split(self.batch_size):
            yield self.transform(self.images[indices]), self.labels[indices]


# Build and load

# Its CIFAR architectures are the functions of cifar_models, less a self-test and one with a broken argument. That of
# Inception v3 passes no arguments on to the class.
ROBUSTNESS_MODELS = {
    name: value
    for name, value in vars(cifar_models).items()
    if inspect.isfunction(value) and name not in ("test", "ResNet18Thin")
} | {"inceptionv3": cifar_models.InceptionV3}
ARCHITECTURES = {**MODELS, **ROBUSTNESS_MODELS}  # a name that both have, as vgg19, is robustness'


def attacker_model(arch, dataset, num_classes=10):
    """robustness' AttackerModel of an untrained classifier, on the CPU; dataset is a name in DATASETS.

    The project's own models are wrapped so that they take its arguments. Raises UserError where arch is unknown.
    """
    utils.check_known(arch, ARCHITECTURES, "--arch")
    model = ARCHITECTURES[arch](num_classes=num_classes)
    model = model if arch in ROBUSTNESS_MODELS else DummyModel(model)
    mean, std = (torch.tensor(values) for values in (DATASETS[dataset].mean, DATASETS[dataset].std))
    return AttackerModel(model, types.SimpleNamespace(mean=mean, std=std))


class NumberType:
    """Stands for numpy.dtype in a pickle: numpy's own would believe a file that says that its bytes are pointers."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1] + self.code  # the byte order; the rest is of no number


def plain_number(number_type, content):
    """Python's own number for a pickled one of numpy."""
    return np.frombuffer(content, number_type.code)[0].item()


# What a pickled numpy number consists of: robustness' cyclic and linear schedules leave some in a checkpoint.
NUMPY_NUMBERS = [
    codecs.encode,
    (NumberType, "numpy.dtype"),
    *((plain_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_checkpoint(path):
    """A robustness checkpoint as a dict, its tensors on the CPU, keys of its model as AttackerModel's.

    robustness writes with dill, but only tensors and plain numbers, so torch.load's restricted reader is enough
    and nothing in the file can run. Raises UserError where the file is absent, damaged or something else.
    """
    if not Path(path).is_file():
        raise UserError(
            f"{path}: no such checkpoint; train a base classifier with python -m models.base, or name another"
        )
    with utils.telling_damage(lambda why: f"{path}: not a checkpoint of robustness, or damaged ({why})"):
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            checkpoint = utils.load_whole(path)
        state = checkpoint["model"] if "model" in checkpoint else checkpoint["state_dict"]
        state = {key.removeprefix("module."): value for key, value in state.items()}
        finite = all_finite(state)
    if not finite:
        raise UserError(f"{path}: the weights hold NaN or infinity; train the base classifier again")
    return {**checkpoint, "model": state}


def all_finite(state):
    """Whether no tensor of a state dict holds NaN or infinity."""
    return all(value.isfinite().all() for value in state.values())


def load_base(path, arch, dataset, num_classes=10):
    """The AttackerModel of a checkpoint, on the CPU, in evaluation mode; raises UserError where they do not fit."""
    model = attacker_model(arch, dataset, num_classes)
    state = read_checkpoint(path)["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path}: not a checkpoint of --arch {arch} and {num_classes} classes; "
            "name the architecture that it has, or train one on these data with python -m models.base"
        ) from error
    return model.eval()


def load_classifier(path, arch, dataset, num_classes=10):
    """A base classifier as one module: images [N, 3, H, W] in [0, 1] to logits [N, classes]; it normalises itself.

    Raises UserError where the checkpoint is absent, damaged, or of another architecture.
    """
    model = load_base(path, arch, dataset, num_classes)
    return nn.Sequential(model.normalizer, model.model).requires_grad_(False).eval()


def check_size(model, images, arch):
    """Raise UserError where a base classifier does not take images [N, 3, H, W] of this size."""
    if arch in ROBUSTNESS_MODELS and images.shape[2:] != (32, 32):  # of some others they would look at a part only
        raise utils.wrong_size(images, f"--arch {arch}", "robustness' own take 32x32")
    utils.check_size(model, images, f"--arch {arch}")


class FoldedClassifier(nn.Module):
    """A classifier of load_classifier, made fast to take gradients of: its logits are the same, but for rounding.

    Computes in dtype and channels_last, with every batch norm that directly follows a convolution folded into it.
    """

    def __init__(self, classifier, dtype):
        super().__init__()
        self.normalizer, model = classifier
        # inside a Sequential, tracing sees no arguments but the images
        self.model = fuse(nn.Sequential(model)).to(dtype, memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, images):
        inputs = self.normalizer(images).to(self.dtype, memory_format=torch.channels_last)
        return self.model(inputs).to(images.dtype)


# Train


def import_robustness():
    """The module robustness.main, which offers in its flags just the data sets that this project can lock."""
    robustness_datasets.DATASETS = {name: name for name in DATASETS}  # its defaults of each are looked up by the value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.filterwarnings("ignore", message="Could not import amp")
        from robustness import defaults, main  # here: it reads the data sets' names as it is imported
    defaults.TRAINING_DEFAULTS |= dict.fromkeys(DATASETS, defaults.TRAINING_DEFAULTS[robustness_datasets.CIFAR])
    defaults.TRAINING_DEFAULTS["digits"] = {"epochs": 20, "batch_size": 64, "weight_decay": 5e-4, "step_lr": 8}
    return main


def parse_length(text):
    """A number or fraction of at least 0, as 8/255; raises an error (see expression) where the text is none."""
    value = float(Fraction(text))
    if value < 0:
        raise ValueError
    return value


def parse_multiplier(text):
    """A list of epochs and factors in their order, as [(0, 1), (50, 0.1)]; raises an error likewise."""
    periods = [(float(epoch), float(factor)) for epoch, factor in ast.literal_eval(text)]
    negative = any(factor < 0 for _, factor in periods)
    if not periods or negative or periods != sorted(periods) or not np.isfinite(periods).all():
        raise ValueError
    return periods


def expression(parse, expected):
    """A converter of a flag's text to what robustness evaluates as Python; lets through only what parse makes of it."""

    def convert(text):
        try:
            return str(parse(text))
        except (ValueError, TypeError, SyntaxError, ZeroDivisionError, OverflowError) as error:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}") from error

    return convert


FACTORS = "[(epoch, factor), ...], epochs in their order, factors of at least 0"

# What a flag's text becomes; robustness would find out what is wrong with it only later, or not at all.
KINDS = {
    **dict.fromkeys(("epochs", "batch-size", "log-iters", "attack-steps"), number(int, 1)),
    **dict.fromkeys(("workers", "step-lr"), number(int, 0)),
    **dict.fromkeys(("lr", "step-lr-gamma", "weight-decay", "momentum"), number(float, 0)),
    **dict.fromkeys(("eps", "attack-lr"), expression(parse_length, "a number of at least 0")),
    "save-ckpt-iters": number(int, -1),
    "custom-lr-multiplier": expression(
        lambda text: text if text == "cyclic" else parse_multiplier(text), f"{FACTORS}, or cyclic"
    ),
    "custom-eps-multiplier": expression(parse_multiplier, FACTORS),
}

# What --help says of a flag where robustness' own words are not true here.
HELP = {
    "arch": f"architecture: {utils.listed(ARCHITECTURES)}",
    "workers": "accepted, not used: images are on the device",
    "mixed-precision": "does not work in robustness 1.2.1: see --precision",
    "random-restarts": "does not work in robustness 1.2.1: leave it at 0",
    "step-lr": "epochs between drops of the learning rate by --step-lr-gamma; 0: none",
    "resume-optimizer": "whether to go on with the checkpoint's optimizer and its schedule: with the --lr, --momentum, "
    "--weight-decay, --step-lr and --step-lr-gamma that it was begun with, whatever is given",
}


def parse_arguments(robustness_main):
    """robustness' flags, checked and filled in with its defaults, as its own Parameters."""
    defaults, parser = robustness_main.defaults, utils.Parser(__doc__)
    for group in (defaults.CONFIG_ARGS, defaults.MODEL_LOADER_ARGS, defaults.TRAINING_ARGS, defaults.PGD_ARGS):
        flags = [
            [name, KINDS.get(name, kind), HELP.get(name, text), default]
            for name, kind, text, default in group
            if name != "config-path"  # it checks nothing of such a file
        ]
        defaults.add_args_to_parser(flags, parser)
    parser.add_argument(
        "--manual-seed", type=utils.parse_seed, default=23, help="seed of everything drawn (default: 23)"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of training (--eval-only is float32); auto: bfloat16 where that is faster (default: auto)",
    )
    parser.add_argument(
        "--compile",
        choices=["auto", *COMPILE],
        default="auto",
        help="use torch.compile, but not with adversarial examples; auto: for a long training on a GPU (default: auto)",
    )
    args = robustness_main.cox.utils.Parameters(vars(parser.parse_args()))
    if not args.dataset:
        raise UserError(f"--dataset is required: one of {', '.join(DATASETS)}")
    try:
        args = robustness_main.setup_args(args)
    except AssertionError as error:  # --eval-only
        raise UserError("--resume is required with --eval-only 1") from error
    except ValueError as error:  # "adv_train required"
        raise UserError(f"--{error}".replace("_", "-")) from error
    check_arguments(args)
    args.step_lr = args.step_lr or 10**9  # epochs, so never: for 0 robustness makes no schedule, and could not go on
    return args


def check_arguments(args):
    """Raise UserError for what robustness would only find out later, or not at all."""
    if not args.out_dir:  # robustness would not miss it with --eval-only
        raise UserError("--out-dir is required: the folder for the store")
    if args.save_ckpt_iters == 0:
        raise UserError("--save-ckpt-iters 0: must be -1, for none, or at least 1")
    unbounded = args.constraint == "unconstrained" and args.random_start
    if args.mixed_precision or args.random_restarts or unbounded or args.constraint in ("fourier", "random_smooth"):
        raise UserError(
            "--mixed-precision 1, --random-restarts, --constraint fourier or random_smooth, and unconstrained with "
            "--random-start 1, do not work in robustness 1.2.1; leave them out"
        )
    utils.check_known(args.arch, ARCHITECTURES, "--arch")
    folder = folder_of(args)
    found = folder and any((folder / f"checkpoint.pt.{kind}").exists() for kind in ("best", "latest"))
    if found and not (args.eval_only or goes_on(args)):
        raise UserError(
            f"--exp-name {args.exp_name}: {folder} holds a classifier already, finished or not; choose another name, "
            f"delete the folder, or go on with --resume {shlex.quote(f'{folder}/checkpoint.pt.latest')} "
            "--resume-optimizer 1"
        )


def folder_of(args):
    """The folder of a run, or None where robustness is to think of a new one."""
    return Path(args.out_dir, args.exp_name) if args.exp_name else None


def goes_on(args):
    """Whether a run goes on with the one that its folder holds."""
    folder = folder_of(args)
    if not (args.resume and args.resume_optimizer and folder):
        return False
    return os.path.realpath(Path(args.resume).parent) == os.path.realpath(folder)


def read_resumed(args, model):
    """The checkpoint of --resume, changed so that robustness goes on at the next epoch.

    It saves the schedule before the step that ends an epoch, so that a resumed run would train at the learning rate of
    the epoch before. Raises UserError where the checkpoint is of another kind of training.
    """
    from robustness.train import make_optimizer_and_schedule  # here: import_robustness has imported it

    checkpoint = {**read_checkpoint(args.resume), "amp": None}
    try:
        if "lr_lambdas" in (checkpoint.get("schedule") or {}) and not args.custom_lr_multiplier:
            raise UserError(f"{args.resume}: was begun with --custom-lr-multiplier; give it again")
        optimizer, schedule = make_optimizer_and_schedule(args, model, checkpoint, None)
        optimizer.step()  # changes nothing, since there are no gradients, but PyTorch wants it before the schedule's
        while schedule.last_epoch < checkpoint["epoch"]:
            schedule.step()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{args.resume}: holds no optimizer that fits; leave --resume-optimizer out") from error
    if goes_on(args) and accuracy_key(args.adv_train) not in checkpoint:
        raise UserError(f"{args.resume}: was trained with another --adv-train; choose another --exp-name")
    if not goes_on(args) and checkpoint["epoch"] >= args.epochs:
        raise UserError(f"--epochs {args.epochs}: {args.resume} has {checkpoint['epoch']} epochs already; give more")
    return {**checkpoint, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}


def keep_best(args, resumed):
    """Copy --resume's checkpoint over checkpoint.pt.best where it is better, and return the better one's accuracy.

    A run can be stopped after the latest was written, and before the best was. resumed is the checkpoint's accuracy.
    """
    best = folder_of(args) / "checkpoint.pt.best"
    known = read_checkpoint(best).get(accuracy_key(args.adv_train), 0) if best.exists() else 0
    if resumed > known:
        write_file(best, utils.read_file(args.resume))
    return max(known, resumed)


def accuracy_key(adversarial):
    """Where robustness' checkpoints have the accuracy that the best is chosen by."""
    return "adv_prec1" if adversarial else "nat_prec1"


def make_store(robustness_main, args, first_epoch):
    """robustness' store of this run, whose curves torch writes: tensorboardX would wait forever after a failed write.

    A store that an earlier run left in its folder is set aside, since HDF5 refuses to append a row whose texts are
    longer than those of the first. Its curves go on at first_epoch, counted from 0, or as they are where that is None.
    """
    from torch.utils.tensorboard import SummaryWriter  # here, because lock.py starts seconds sooner without it

    folder = folder_of(args)
    if folder and (folder / "store.h5").exists():
        numbered = (folder / f"store.{number}.h5" for number in itertools.count(1))
        (folder / "store.h5").rename(next(path for path in numbered if not path.exists()))
    # it would look for a git repository around itself, and take that one's commit for its own version
    git, cox = robustness_main.git, robustness_main.cox
    no_repository = mock.patch.object(git, "Repo", side_effect=git.exc.InvalidGitRepositoryError)
    writer = partial(SummaryWriter, purge_step=first_epoch)
    with no_repository, mock.patch.object(cox.store, "SummaryWriter", writer):
        return robustness_main.setup_store_with_metadata(args)


def accuracies(logits, labels):
    """robustness' custom_accuracy: its own top-1 and top-5 accuracies in percent, but as numbers.

    Of tensors, its loop would format the values after each step, and wait for the GPU to compute each.
    """
    return torch.cat(accuracy(logits, labels, topk=(1, min(5, logits.shape[-1])))).tolist()


TEST_SETS = {"nat": "the test set", "adv": "the attacked test set"}


def report(store, adversarial, resumed):
    """Say which checkpoint is the best, and how good; there is none where no epoch beat the one resumed from.

    Raises UserError where there is none for another reason.
    """
    path = Path(store.path, "checkpoint.pt.best")
    if path.exists():
        best, what = read_checkpoint(path), TEST_SETS["adv" if adversarial else "nat"]
        print(f"Base classifier: {path}, {best[accuracy_key(adversarial)]:.2f} % on {what} after epoch {best['epoch']}")
    elif resumed:
        print(f"No epoch was better than the checkpoint resumed from: {path} was not written")
    else:
        raise UserError(f"{path} was not written: nothing was classified right after any epoch; lower --lr or --eps")


def speed_up(network, args, device, passes):
    """Let a network of AttackerModel compute in the precision, and compiled, as the flags say; all else of it stays.

    passes is how many images go through it in training, each time counted.
    """
    precision, why = utils.pick_precision(args.precision, device, network)
    if precision == "float16":
        precision, why = "float32", "robustness does not scale the loss, as float16 needs it"
    # compiled, every step of robustness' attack would take the weights' gradients too
    compile = utils.pick_compile(args.compile, device.type == "cuda", passes)
    compile = "never" if args.adv_train or args.adv_eval else compile
    print(utils.describe_precision(precision, why, compile))
    network.to(memory_format=torch.channels_last)
    if compile == "always":
        # as CUDA graphs, since a GPU would wait for robustness' loop to launch every kernel
        network.forward = Compiled(network.forward, args.batch_size, mode="reduce-overhead")
    network.forward = in_precision(network.forward, device, precision)


def in_precision(function, device, precision):
    """A function of images whose layers compute in one of PRECISIONS, and whose logits are float32."""

    def run(images, *args, **kwargs):
        with utils.autocast(device, precision):
            return function(images, *args, **kwargs).float()

    return run


def evaluate(robustness_main, args, model, batches, store):
    """Say how accurate a base classifier is, and where that is asked for, under attack; robustness notes it too."""
    args.adv_eval = args.adv_eval or 0
    result = robustness_main.eval_model(args, model, batches, store=store)
    for kind in ("nat", "adv") if args.adv_eval else ("nat",):
        share, loss = result[f"{kind}_prec1"], result[f"{kind}_loss"]
        print(f"accuracy {share:.2f} % on {TEST_SETS[kind]}, loss {loss:.4f}")


def main():
    """Train or evaluate a base classifier as the flags say; its folder is --out-dir/--exp-name."""
    robustness_main = import_robustness()
    args = parse_arguments(robustness_main)
    device, reason = utils.set_up_device()
    torch.manual_seed(args.manual_seed)
    load = DATASETS[args.dataset].load
    train_split = None if args.eval_only else load(args.data, "train")
    test_split = load(args.data, "test")
    which = args.arch, args.dataset, len(test_split.classes)
    model = load_base(args.resume, *which) if args.resume else attacker_model(*which)
    checkpoint = None
    if args.resume and args.resume_optimizer and not args.eval_only:
        checkpoint = read_resumed(args, model)
        torch.manual_seed(args.manual_seed + checkpoint["epoch"])  # or it would draw what the first epoch drew
    image = to_float(test_split.images[:1])
    check_size(model.model, image, args.arch)
    if not args.eval_only:
        utils.check_last_batch(model.model, image, len(train_split.labels), args.batch_size, "--batch-size")
    test_batches = Batches(test_split, device, args.batch_size)
    utils.make_folder(args.out_dir)
    folder = folder_of(args)
    alone = utils.exclusive(folder) if folder else nullcontext()  # in a new folder nobody else is
    args.custom_accuracy = accuracies
    first_epoch = None if args.eval_only else checkpoint["epoch"] if checkpoint else 0
    with (
        alone,
        utils.naming(folder or args.out_dir),
        closing(make_store(robustness_main, args, first_epoch)) as store,
        closing(store.tensorboard),
        one_device(device),
        careful_saving(),
        errors_let_out(),
    ):
        print(f"{args.arch} on {args.dataset}, on {device} ({reason}), in {store.path}")
        if args.eval_only:
            evaluate(robustness_main, args, model.to(device), test_batches, store)
        else:
            augment = AUGMENTATION[args.dataset] if args.data_aug else to_float
            loaders = Batches(train_split, device, args.batch_size, augment, shuffle=True), test_batches
            speed_up(model.model, args, device, args.epochs * len(train_split.labels))
            if checkpoint and goes_on(args):
                key = accuracy_key(args.adv_train)
                checkpoint[key] = keep_best(args, checkpoint[key])
            robustness_main.train_model(args, model.to(device), loaders, store=store, checkpoint=checkpoint)
            report(store, args.adv_train, checkpoint)


if __name__ == "__main__":
    utils.run_command(
        main,
        if_interrupted="once its folder has a checkpoint.pt.latest, the same command with --resume THAT_FILE "
        "--resume-optimizer 1 goes on after it",
    )
