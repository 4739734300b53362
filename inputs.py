"""What train.py trains on and tests with: the locked and the original images, and whether they belong together."""

import hashlib
import shlex
from pathlib import Path

from augmentation import preprocess
from data import DATASETS, SPLITS
from lockfiles import hash_tensor, load_locked, parse_path
from utils import UserError


def load_data(config):
    """The splits {name: (images uint8 [N, 3, H, W], labels int64 [N])}: train (locked images, or as many originals
    where train_on says so; of either only the first, where there is a subset), and the test sets locked and original.
    And the lock's manifest, or None where it has none.

    Raises UserError where a file is absent, has changed, or does not fit the config or the other files.
    """
    flags = f"--dataset {config.dataset} --orig-data {shlex.quote(config.orig_data_path)}"
    original = DATASETS[config.dataset].load(config.orig_data_path, "test")
    files = {split: [config[f"locked_{split}_{kind}"] for kind in ("image", "label")] for split in SPLITS}
    locked = {split: load_locked(*files[split], flags) for split in SPLITS}
    manifests = {split: manifest for split, (_, _, manifest) in locked.items()}
    data = {"train": locked["train"][:2], "locked": locked["test"][:2], "original": original[:2]}
    check_fit(data, config)
    lacking = [files[split][0] for split in SPLITS if not manifests[split]]
    if len(lacking) == 1:
        raise UserError(f"{lacking[0]}: has no manifest, but the files of the other split do; name those of one lock")
    manifest = manifests["train"]
    if manifest:
        for split in SPLITS:
            check_manifest(manifests[split], split, manifest, original, config)
        check_originals(original, "test", manifest, config)
    if config.train_on == "original":
        part = DATASETS[config.dataset].load(config.orig_data_path, "train")
        if manifest:
            check_originals(part, "train", manifest, config)
        data["train"] = part.first(len(data["train"][0]))[:2]
    count = len(data["train"][1])
    if config.subset > count:
        raise UserError(f"subset is {config.subset}, but there are {count} images to train on; take at most as many")
    data["train"] = tuple(tensor[: config.subset or count] for tensor in data["train"])
    return data, manifest


def check_fit(data, config):
    """Raise UserError where images differ in size from the original ones, or labels do not fit num_classes."""
    where = {"train": config.locked_train_image, "locked": config.locked_test_image, "original": config.orig_data_path}
    for name, (images, labels) in data.items():
        if images.shape[1:] != data["original"][0].shape[1:]:
            raise UserError(f"{where[name]}: its images differ in size from those in {config.orig_data_path}")
        if labels.min() < 0 or labels.max() >= config.num_classes:
            found = f"labels go from {labels.min()} to {labels.max()}, but num_classes is {config.num_classes}"
            raise UserError(f"{where[name]}: {found}; set it to the number of classes (labels begin at 0)")


def check_manifest(manifest, split, train_manifest, original, config):
    """Raise UserError, naming what differs, where locked files are not what the config takes them for."""
    path, settings = Path(config[f"locked_{split}_image"]), manifest["settings"]
    if parse_path(path)[1] != split:
        raise UserError(f"{path}: given as locked_{split}_image, but it was locked as the {parse_path(path)[1]} set")
    if settings["dataset"] != config.dataset:
        raise UserError(f"{path}: the data set is {settings['dataset']}, but the config says {config.dataset}")
    if settings["classes"] != original.classes:
        raise UserError(f"{path}: its classes are not those of {config.orig_data_path}; name the data that was locked")
    if len(settings["classes"]) != config.num_classes:
        found = len(settings["classes"])
        raise UserError(f"{path}: has {found} classes, but num_classes is {config.num_classes}; set it to {found}")
    if settings != train_manifest["settings"]:
        raise UserError(f"{path}: another lock than that of {config.locked_train_image}; name the files of one lock")


def check_originals(part, split, manifest, config):
    """Raise UserError where a Split of the originals is not what was locked."""
    images, labels, *_ = part.first(manifest["settings"]["subset"])
    for name, tensor in {"labels": labels, "images": images}.items():
        if hash_tensor(tensor) != manifest["settings"]["original_sha256"][split][name]:
            path, where = config[f"locked_{split}_image"], config.orig_data_path
            raise UserError(f"{path}: locked from other {name}, or in another order, than {where} has now")


def preprocess_all(data, config):
    """The splits of load_data, with the config's preprocessing."""
    return {name: (preprocess(images, config), labels) for name, (images, labels) in data.items()}


def hash_data(data):
    """SHA-256 of all the images and labels of load_data, in hexadecimal."""
    digest = hashlib.sha256()
    for images, labels in data.values():
        digest.update(images.numpy())
        digest.update(labels.numpy())
    return digest.hexdigest()
