"""Train a model on locked images, and watch how it fails on ordinary ones.

    python train.py --work-path ./experiments/cifar10/preresnet110

reads config.yaml in the work path (CIFAR-ZOO's keys) and trains on the locked training set. Each evaluation
reports the accuracy on the locked and on the original test set. Any key can be given as a flag too, as
--epochs 30 or --lr_scheduler.base_lr 0.05. Log, curves, pictures, checkpoints and result.json go to a folder
of each lock method and seed: experiments/cifar10/preresnet110/basic/seed0; with --name, between the two.
"""

import itertools
import json
import math
import shlex
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import runs
import utils
from attack import attack
from augmentation import as_inputs, augment, enlarge, make_mixer
from checkpoints import (
    Learner,
    background,
    is_begun,
    load_pretrained,
    on_gpu,
    recover,
    restore,
    snapshot,
    write_checkpoint,
)
from config import KEYS, load_config
from data import SPLITS, is_plain
from graphs import Captured, Compiled
from inputs import hash_data, load_data, preprocess_all
from lockfiles import Paths, lock_suffix, parse_path, sha256
from methods import METHODS, PARAMETERS, given_parameters
from models import MODELS
from utils import UserError, number

# Training


def learning_rate(config, epoch):
    """The learning rate of an epoch, counted from 0, by CIFAR-ZOO's schedules STEP, COSINE and HTD."""
    schedule = config.lr_scheduler
    if schedule.type == "STEP":
        return schedule.base_lr * schedule.lr_mults ** sum(epoch >= drop for drop in schedule.lr_epochs)
    t = epoch / config.epochs
    if schedule.type == "COSINE":
        factor = (1 + math.cos(math.pi * t)) / 2
    else:
        low, high = schedule.lower_bound, schedule.upper_bound
        factor = (1 - math.tanh(low + (high - low) * t)) / 2
    return schedule.min_lr + (schedule.base_lr - schedule.min_lr) * factor


def make_model(config):
    """A new model, as the config says."""
    # channels_last is the order in which convolutions are fast, on CPUs as on GPUs
    return MODELS[config.architecture](num_classes=config.num_classes).to(memory_format=torch.channels_last)


def make_learner(model, config):
    """A model, and what trains it as the config says, on the model's device."""
    device = next(model.parameters()).device
    lr = torch.tensor(config.lr_scheduler.base_lr, device=device)  # a tensor: a step in a CUDA graph reads it anew
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True, **config.optimize)
    if config.optimize.momentum:  # fused SGD would leave it uninitialised where float16 has it skip the first step
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return Learner(model, optimizer, torch.amp.GradScaler(device.type, enabled=config.precision == "float16"))


def forward(model, inputs, config):
    """The logits of a model, float32 [N, classes], of inputs enlarged as the config says, computed in its precision."""
    with utils.autocast(inputs.device, config.precision):
        return model(enlarge(inputs, config)).float()


def attack_inputs(model, inputs, targets, config):
    """Inputs float32 [N, 3, H, W] in [0, 1], led away from their targets (see hits) as the model is now (Madry et al.,
    2018)."""
    options = config.adversarial
    classifier = partial(forward, model.eval().requires_grad_(False), config=config)
    attacked = attack(classifier, inputs, targets, options.eps, options.attack_lr, options.attack_steps, targeted=False)
    model.requires_grad_(True)
    return attacked


def train_step(learner, config, inputs, targets):
    """A step of SGD on inputs float32 [N, 3, H, W] with targets (see hits); returns their mean loss and the number of
    right predictions."""
    model, optimizer, scaler = learner
    if config.adversarial.eps > 0:
        inputs = attack_inputs(model, inputs, targets, config)
    logits = forward(model.train(), inputs, config)
    loss = F.cross_entropy(logits, targets)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), hits(logits, targets).sum()


def make_step(learner, config, say=print):
    """train_step as a function of inputs and targets: compiled where the config says so, and captured on a GPU."""
    step, model = partial(train_step, learner, config), learner.model
    if config.compile != "always":
        return step
    model.forward = Compiled(model.forward, config.batch_size, say)
    return Captured(step) if on_gpu(learner) else step


def train_epoch(step, images, labels, config):
    """One pass of steps in random order over images uint8 [N, 3, H, W] with labels int64 [N]; returns mean loss and
    accuracy in percent."""
    mix = make_mixer(config)
    loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=images.device)
    order = torch.randperm(len(images), device=images.device)
    for indices in tqdm(order.split(config.batch_size), leave=False, disable=None):
        inputs, targets = augment(images[indices], config), labels[indices]
        if mix:
            inputs, targets = mix(inputs, targets)
        loss, right = step(inputs, targets)
        loss_sum += loss * len(indices)
        correct += right
    return loss_sum.item() / len(images), 100 * correct.item() / len(images)


def hits(logits, targets):
    """How right each prediction of logits [N, classes] is, [N]: with targets int64 [N], whether it is the target; with
    targets [N, classes], which are probabilities, that of the predicted class."""
    predictions = logits.argmax(1)
    return targets.gather(1, predictions[:, None])[:, 0] if targets.dim() == 2 else predictions == targets


@torch.no_grad()
def evaluate(model, images, labels, config):
    """Mean loss and accuracy in percent on images uint8 [N, 3, H, W] with labels int64 [N]."""
    model.eval()
    loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=images.device)
    for batch, targets in zip(images.split(config.test_batch), labels.split(config.test_batch)):
        logits = forward(model, as_inputs(batch, config), config)
        loss_sum += F.cross_entropy(logits, targets, reduction="sum")
        correct += hits(logits, targets).sum()
    return loss_sum.item() / len(images), 100 * correct.item() / len(images)


# A run


def parse_arguments():
    """The arguments, and the config with what the flags say."""
    parser = utils.Parser(__doc__)
    parser.add_argument("--work-path", required=True, help="folder of an experiment, with its config.yaml")
    parser.add_argument("--name", default="", help="folder of the run below the method's, to keep other runs apart")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start again where the run's folder holds one already")
    parser.add_argument("--lock-method", choices=METHODS, help="use the files of this method")
    parser.add_argument("--lock-data", help="use the files in this folder")
    for name, usual in PARAMETERS.items():
        parser.add_argument(f"--{name}", type=number(float, 0, 1), help=f"lock.py's --{name} (default: {usual})")
    keys = parser.add_argument_group("keys of config.yaml")
    for name, key in KEYS.items():
        value = "required" if key.required else f"default: {key.default or repr(key.default)}"
        keys.add_argument(f"--{name}", metavar="VALUE", help=f"{key.help} ({value})")
    args, unknown = parser.parse_known_args()
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise UserError(f"unknown flag {unknown[0]}{utils.did_you_mean(name, KEYS)}")
    if args.name and (not is_plain(args.name) or args.name.startswith((".", "seed"))):
        raise UserError(f"--name {args.name}: must be the name of a folder, and not begin with a dot or with seed")
    if args.name == "plain":
        raise UserError("--name plain: is what tables call a run without a name; choose another, or leave it out")
    overrides = {key: value for key, value in vars(args).items() if key in KEYS and value is not None}
    config = load_config(Path(args.work_path, "config.yaml"), overrides)
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run, --overwrite starts it again: give one of them")
    name_lock(args, config)
    return args, config


def name_lock(args, config):
    """Let the config name the locked files of --lock-method, --alpha and --lambd, in the folder of --lock-data."""
    given = given_parameters(args, [args.lock_method] if args.lock_method else [])
    for split, kind in itertools.product(SPLITS, ("image", "label")):
        key = f"locked_{split}_{kind}"
        path = Path(config[key])
        if args.lock_method:
            path = Paths(path.parent, lock_suffix(args.lock_method, **given)).file(split, kind)
        if args.lock_data:
            path = Path(args.lock_data, path.name)
        config[key] = str(path)


def check_loss(loss, epoch):
    """Raise UserError where a loss is NaN or infinity: the model's predictions would say nothing of the lock."""
    if not math.isfinite(loss):
        raise UserError(
            f"epoch {epoch}: the loss is {loss}; start again with --overwrite, and a lower lr_scheduler.base_lr or "
            "precision float32"
        )


def evaluate_both(model, data, epoch, config, writers):
    """Loss and accuracy on the locked and on the original test set, as a record of the run's history and as curves."""
    record = {}
    for split, short in {"locked": "locked", "original": "orig"}.items():
        loss, accuracy = evaluate(model, *data[split], config)
        check_loss(loss, epoch)
        record |= {f"{short}_loss": loss, f"{short}_acc": accuracy}
        writers[split].add_scalar("accuracy/test", accuracy, epoch)
        writers[split].add_scalar("loss/test", loss, epoch)
    return record


def run_epoch(learner, step, data, epoch, config, writers, log):
    """Train for one epoch, counted from 1, and evaluate where one is due; returns its record, or None."""
    start = time.time()
    lr = learning_rate(config, epoch - 1)
    for group in learner.optimizer.param_groups:
        group["lr"].fill_(lr)
    loss, accuracy = train_epoch(step, *data["train"], config)
    check_loss(loss, epoch)
    for tag, value in {"learning rate": lr, "loss/train": loss, "accuracy/train": accuracy}.items():
        writers["run"].add_scalar(tag, value, epoch)
    line = f"epoch {epoch:4}/{config.epochs}  lr {lr:.5f}  train loss {loss:.4f}, accuracy {accuracy:6.2f} %"
    record = None
    if epoch in (1, config.epochs) or epoch % config.eval_freq == 0:
        record = {
            "epoch": epoch,
            "train_loss": loss,
            "train_acc": accuracy,
            **evaluate_both(learner.model, data, epoch, config, writers),
        }
        line += (
            "  test: locked {locked_acc:6.2f} % (loss {locked_loss:.4f}), "
            "original {orig_acc:6.2f} % (loss {orig_loss:.4f})".format(**record)
        )
    log(f"{line}  {time.time() - start:.1f} s")
    return record


def find_state(checkpoint, folder, log):
    """The last whole checkpoint of a run, or None where it has none, so that --resume starts it.

    Raises UserError where that would lose a run, or where the checkpoints are damaged.
    """
    state = recover(checkpoint, log)
    if not state:
        runs.check_fresh(folder, checkpoint)
        log(f"nothing to resume in {checkpoint}: starting at epoch 1")
    return state


def settle_auto(config, model, begun_in, count):
    """Replace auto in a config by what it stands for here; returns why the precision was chosen.

    begun_in is the precision of the epochs before, if any; count is the number of images in an epoch.
    """
    device, adversarial = next(model.parameters()).device, config.adversarial
    per_image = adversarial.attack_steps + 2 if adversarial.eps > 0 else 1  # passes in an epoch
    config.precision, why = utils.pick_precision(config.precision, device, model, begun_in)
    config.compile = utils.pick_compile(config.compile, device.type == "cuda", config.epochs * count * per_image)
    return why


def build_model(config, data, fresh):
    """A model on the CPU that takes the images of data, and what to log of its pretrained weights, or None."""
    model, image = make_model(config), enlarge(as_inputs(data["original"][0][:1], config), config)
    pretrained = load_pretrained(model, config.pretrained) if config.pretrained and fresh else None
    enlarged = f", enlarge {config.enlarge}" if config.enlarge > 1 else ""
    utils.check_size(model, image, f"{config.architecture}{enlarged}")
    utils.check_last_batch(model, image, len(data["train"][1]), config.batch_size, "batch_size")
    return model, pretrained


def log_data(log, data, manifest):
    """Log how many images a run has, and what of them is not verified."""
    counts = {name: len(labels) for name, (_, labels) in data.items()}
    log("images: {train} to train on, {locked} locked and {original} original ones to test on".format(**counts))
    if manifest is None:
        log("the locked files have no manifest (lock_*.json): what they were made of and from is not verified")
    labels, original_labels = data["locked"][1], data["original"][1]
    if not torch.equal(labels, original_labels[: len(labels)]):
        log("warning: the labels of the locked and the original test set differ: another order, or another data set?")


def tell_finished(folder, picture, config, data, data_hash):
    """If the run has ended already, say so, write its picture again where that is absent, and return True; else False.

    It needs no checkpoints any more.
    """
    finished = runs.finished_outcome(folder / "result.json", config, data_hash)
    if not finished:
        return False
    if not picture.exists():
        first = {name: (images[:10], labels[:10]) for name, (images, labels) in data.items()}
        runs.write_pictures(preprocess_all(first, config), picture)
    print(f"{folder}: finished already (--overwrite starts it again)\n{finished}")
    return True


def begin(state, model, config, data_hash):
    """The Learner of a run, how many epochs it has had, and its history: those of a checkpoint's state, or new ones."""
    learner = make_learner(model, config)
    if not state:
        return learner, 0, []
    restore(state, learner, config, data_hash)
    return learner, state["epoch"], json.loads(state["history"])


def run(args, config, data, manifest, folder, suffix):
    """Train in a folder, from the start or from the last whole checkpoint; writes all that a run leaves behind."""
    if args.overwrite and config.pretrained and utils.lies_in(config.pretrained, folder):
        raise UserError(f"pretrained: {config.pretrained}: --overwrite would delete it; give the run another --name")
    checkpoint, picture = folder / config.ckpt_path / f"{config.ckpt_name}.pth.tar", folder / "images.png"
    data_hash = hash_data(data)  # as the files hold them: another CPU may round differently in preprocessing them
    if args.resume and tell_finished(folder, picture, config, data, data_hash):
        return
    data = preprocess_all(data, config)
    device, reason = utils.set_up_device(config.use_gpu)
    torch.manual_seed(config.seed)
    fresh = not (args.resume and is_begun(checkpoint))  # else the weights are those of the checkpoint
    model, pretrained = build_model(config, data, fresh)
    begun_from = {"pretrained_sha256": sha256(utils.read_file(config.pretrained))} if pretrained else {}
    model.to(device)

    runs.prepare_folder(folder, args)
    log = runs.log_to(folder / "log.txt")
    log(f"{config.architecture} on {suffix}, seed {config.seed}, on {device} ({reason}), in {folder}")
    if pretrained:
        log(pretrained)
    log_data(log, data, manifest)
    utils.make_folder(checkpoint.parent)
    state = find_state(checkpoint, folder, log) if args.resume else None
    why = settle_auto(config, model, state and json.loads(state["config"]).get("precision"), len(data["train"][1]))
    log(utils.describe_precision(config.precision, why, config.compile))
    learner, done, history = begin(state, model, config, data_hash)
    writers = runs.open_writers(folder, done + 1)
    if not done or not picture.exists():
        runs.write_pictures(data, picture, writers["run"])
    data = {name: (images.to(device), labels.to(device)) for name, (images, labels) in data.items()}
    epochs, step = range(done + 1, config.epochs + 1), make_step(learner, config, log)
    made_with = runs.note_start(folder / "made_with.json", epochs, device, **begun_from)
    with background() as start:  # a checkpoint of vgg19 takes about as long to write as an epoch on a GPU

        def keep(epoch):
            start(write_checkpoint, checkpoint, snapshot(learner, epoch, history, config, data_hash))

        if not epochs and history[-1]["epoch"] < done:  # it was to go on when it was trained
            history.append({"epoch": done, **evaluate_both(learner.model, data, done, config, writers)})
            keep(done)
        for epoch in epochs:
            record = run_epoch(learner, step, data, epoch, config, writers, log)
            history += [record] if record else []
            keep(epoch)
    about = {"data_sha256": data_hash, "made_with": made_with, "history": history, "lock": manifest}
    result = {**runs.summary(config, suffix, args.name, history), "config": config, **about}
    runs.finish(folder, result, writers)
    log(f"pictures (originals, locked, ten times the difference): {picture}")
    log(f"curves: tensorboard --logdir {shlex.quote(Path(args.work_path).as_posix())}")
    log(runs.outcome(result))


def main():
    args, config = parse_arguments()
    data, manifest = load_data(config)
    suffix = parse_path(Path(config.locked_train_image))[0].suffix or Path(config.locked_train_image).name
    folder = Path(args.work_path, suffix, args.name, f"seed{config.seed}")
    with utils.exclusive(folder), utils.naming(folder):
        run(args, config, data, manifest, folder, suffix)


if __name__ == "__main__":
    utils.run_command(
        main, if_interrupted="once an epoch is done, the same command with --resume, not --overwrite, goes on after it"
    )
