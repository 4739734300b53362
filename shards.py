"""A lock in the making: finished batches are kept as shards until all are, and then become the files of the lock.

A lock that was begun or finished is never continued or replaced with other settings, unless --overwrite says so.
"""

import json
import os
import shutil
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

import lockfiles
import sealing
import utils
from data import SPLITS, canonical_name
from lockfiles import Paths, hash_tensor, sha256
from methods import attacks_of, parameters_of
from utils import UserError, write_file

# Settings


def hash_originals(splits):
    """The hashes of what is locked, as {split: {"images": SHA-256, "labels": SHA-256}}."""
    return {
        split: {"images": hash_tensor(images), "labels": hash_tensor(labels)}
        for split, (images, labels, *_) in splits.items()
    }


# What lock.py chooses by its device where it is not told, and whether a value is one that it chooses
CHOICES = {
    "precision": lambda value: value in list(utils.PRECISIONS),  # a dict raises an error for JSON's lists and objects
    "compile": lambda value: value in utils.COMPILE,
    "batch_size": lambda value: isinstance(value, int) and value > 0,
}


def asked_settings(method, classes, hashes, maps, base_sha256, args):
    """What decides what a lock is; of the CHOICES, only those made by a flag. hashes are of hash_originals.

    With all CHOICES, locks of the same settings are the same on the same kind of processor, with the same versions and
    threads. (compile says what was asked for: where torch.compile failed, the lock was made without.)
    """
    flags = "eps", "attack_lr", "attack_steps", "manual_seed", "subset", "arch"
    return {
        "method": method,
        **{name: getattr(args, name) for name in (*parameters_of([method]), *flags)},
        "dataset": canonical_name(args.dataset),
        "classes": classes,
        "original_sha256": hashes,
        "base_sha256": base_sha256,
        "target_maps": {name: maps[name] for name in attacks_of([method])},
        **{name: value for name in CHOICES if (value := getattr(args, name)) not in (None, "auto")},
    }


def refuse_others(where, then, now):
    """Raise UserError where settings differ, naming both."""
    for key, values in utils.differing(then, now).items():
        old, new = ("unset" if value is None else str(value) for value in values)
        start = max(0, len(os.path.commonprefix([old, new])) - 10)  # long ones may begin alike
        raise UserError(
            f"{where} was made with {key} {old[start:][:40]}, but now it is {new[start:][:40]}; "
            "set that back, name another folder with --lock-data, or replace it with --overwrite"
        )


def choices_in(settings):
    """The CHOICES in the settings of a lock, by name."""
    return {name: settings[name] for name, known in CHOICES.items() if known(settings.get(name))}


def earlier_choices(locks, asked, overwrite):
    """The CHOICES of the first lock that was begun, or else of the first that is finished, by name; none where there is
    no such lock, or where --overwrite is to replace it. asked are the asked_settings, by method."""
    begun, finished = [], []
    for method, paths in locks.items():
        manifest = None if overwrite else lockfiles.read_manifest(paths)
        before = manifest["settings"] if manifest else begun_with(paths, overwrite)
        if before and (not overwrite or before.items() >= asked[method].items()):
            (finished if manifest else begun).append(choices_in(before))
    return next(iter(begun + finished), {})


def find_finished(paths, asked, chosen, overwrite):
    """The manifest of a finished lock of these settings, or None where there is something to do.

    What was chosen but not asked for may be otherwise in each finished lock. Raises UserError where files of other
    settings, or of other origin, would be replaced without --overwrite.
    """
    if overwrite:
        return None
    manifest = lockfiles.read_manifest(paths)
    if manifest:
        refuse_others(paths.manifest, manifest["settings"], chosen | choices_in(manifest["settings"]) | asked)
        return manifest
    begun = begun_with(paths)
    if begun:
        refuse_others(paths.partial, begun, asked | chosen)
    else:
        for path in paths.existing():
            raise UserError(f"{path} exists; name another folder with --lock-data, or replace it with --overwrite")
    return None


def check_finished(paths, manifest, key_out):
    """Raise UserError where a file of a finished lock has changed, or where its seal is of another key."""
    for error in lockfiles.check_files(paths, manifest):
        raise UserError(f"{error}, {lockfiles.LOCK_AGAIN}")
    for error in lockfiles.check_tree(paths, manifest):
        raise error
    sealed_with = manifest["sealed_with"]
    if key_out and sealed_with:
        if not Path(key_out).exists() or sealing.fingerprint(sealing.read_key(key_out)) != sealed_with:
            raise UserError(f"--key-out {key_out}: {paths.manifest} is sealed with another key; name that one")


def check_places(locks, args):
    """Raise UserError where a lock would delete a seal, or what is not of a lock."""
    for paths in locks.values():
        seal = next((path for path in paths.groups()["sealed"] if path.exists()), None)
        if seal and args.overwrite and not args.key_out:
            raise UserError(f"{seal}: --overwrite would delete this seal for good; give --key-out, or take it away")
        if "png" in args.format and paths.tree.exists() and not paths.has_tree():
            raise UserError(f"{paths.tree} exists, and is not of a lock; name another folder with --lock-data")


def prepare(locks, asked, chosen, args):
    """Make ready for locking by each method; returns, for each, its manifest where that is done, or else None.

    asked are the asked_settings, by method, and chosen the CHOICES. Raises UserError before anything is changed.
    """
    check_places(locks, args)
    manifests = {method: find_finished(paths, asked[method], chosen, args.overwrite) for method, paths in locks.items()}
    for method, paths in locks.items():
        if manifests[method]:
            check_finished(paths, manifests[method], args.key_out)
    if args.key_out:
        sealing.make_key(args.key_out)
    for method, paths in locks.items():
        for folder in (paths.staging, paths.trash):  # left by a process that was killed
            shutil.rmtree(folder, ignore_errors=True)
        if not manifests[method]:
            begin(paths, asked[method] | chosen, args.overwrite)
    return manifests


def begun_with(paths, overwrite=False):
    """The settings of the shards of an interrupted lock, or None where there are none.

    Raises UserError where they are damaged, unless they are to be overwritten.
    """
    has_shards = any(next(paths.partial.glob(f"{split}_*"), None) for split in SPLITS)
    path = paths.partial / "settings.json"
    try:
        return lockfiles.read_json(path) if has_shards and path.exists() else None
    except UserError:
        if not overwrite:
            raise
        return None


def begin(paths, settings, overwrite):
    """Make the folder of shards, with those of an interrupted lock of these settings in it."""
    if begun_with(paths, overwrite) != settings:
        forget(paths)
        paths.partial.mkdir()
        write_file(paths.partial / "settings.json", json.dumps(settings).encode())


def forget(paths):
    """Delete the shards of a lock, or of one in the making."""
    utils.discard(paths.partial, paths.trash)


# Shards


def shard_path(paths, split, start):
    """The file of the batch that begins at the image start."""
    return paths.partial / f"{split}_{start:08d}"


def missing(locks, split, starts):
    """{start: methods}: the batches of a split, by their first image, for which some methods have no whole shard."""
    lacking = {
        start: [method for method, paths in locks.items() if read_shard(paths, split, start) is None]
        for start in starts
    }
    return {start: methods for start, methods in lacking.items() if methods}


def write_all(locks, split, starts, made):
    """Write shards of the batches that begin at starts; made pairs each result of lock.lock_batch with what it was made
    with."""
    for start, (results, made_with) in zip(starts, made):
        for method, (locked, measured) in results.items():
            path = shard_path(locks[method], split, start)
            shard = {"of": path.name, "locked": locked, "measured": measured, "made_with": made_with}
            write_file(path, utils.serialize(shard))


def read_shard(paths, split, start):
    """A shard as the dict that was written, or None where there is none, or none that is whole."""
    path = shard_path(paths, split, start)
    with suppress(UserError), utils.telling_damage(str):  # absent, or damaged: this batch is to be locked
        shard = utils.load_whole(path)
        return shard if shard["of"] == path.name else None
    return None


def read_shards(paths, split, starts):
    """Of a whole split the locked images uint8 [N, 3, H, W], the measurements by name [N], and every environment."""
    found = [read_shard(paths, split, start) for start in starts]
    if None in found:
        path = shard_path(paths, split, starts[found.index(None)])
        raise UserError(f"{path}: damaged since it was written; the same command locks it again")
    measured = {name: torch.cat([shard["measured"][name] for shard in found]) for name in found[0]["measured"]}
    return torch.cat([shard["locked"] for shard in found]), measured, [shard["made_with"] for shard in found]


# The finished lock


def summarize(measured, method):
    """The measurements of a split, one number or truth value an image, as the numbers that stand in a manifest.

    Accuracies are shares from 0 to 1, distances in pixels of [0, 1]; the PSNR, in dB, is the mean over the images that
    were changed, and None where none was.
    """
    measured = {name: values.double() for name, values in measured.items()}  # so that 9 of 10 are 0.9
    changed = measured["l2"] > 0  # the PSNR of an image that is as it was is infinite
    return {
        "images": len(changed),
        "base_accuracy": measured["base"].mean().item(),
        "attacks": {name: measured[name].mean().item() for name in attacks_of([method])},
        "to_target": measured["to_target"].mean().item(),
        "to_true": measured["to_true"].mean().item(),
        "l2_mean": measured["l2"].mean().item(),
        "l2_max": measured["l2"].max().item(),
        "psnr": measured["psnr"][changed].mean().item() if changed.any() else None,
        "ssim": measured["ssim"].mean().item(),
        "unchanged": (~changed).sum().item(),
    }


def finish(paths, settings, splits, formats, key):
    """Put the shards together, and write the files of a lock and, last of all, its manifest; returns the manifest."""
    locked, summaries, environments = {}, {}, []
    for split, (images, *_) in splits.items():
        starts = range(0, len(images), settings["batch_size"])
        locked[split], measured, made_with = read_shards(paths, split, starts)
        summaries[split] = summarize(measured, settings["method"])
        for one in made_with:
            if one not in environments:
                environments.append(one)
    manifest = {
        "settings": settings,
        "report": summaries,
        "files": {},
        "sealed_with": None,
        "made_with": environments,
        "commit": utils.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    files = stage(paths, splits, locked, formats, key)
    paths.remove()  # an older lock, which was whole until now
    return publish(paths, manifest, files, key)


def add_outputs(paths, manifest, splits, formats, key):
    """Write what of the formats and the seal a finished lock lacks; returns its manifest."""
    if begun_with(paths) == manifest["settings"]:  # it was finished, but the process killed before it deleted these
        forget(paths)
    formats = [form for form in formats if form not in lockfiles.formats_of(paths, manifest)]
    key = key if manifest["sealed_with"] is None else None
    if not formats and not key:
        return manifest
    locked = {split: lockfiles.load_split(paths, split, manifest)[0] for split in splits}
    return publish(paths, manifest, stage(paths, splits, locked, formats, key), key)


def stage(paths, splits, locked, formats, key):
    """Write the files of a lock, in the formats, and sealed where there is a key, but not yet in their places.

    Returns what a manifest says of them, by name.
    """
    files, staged = {}, Paths(paths.staging, paths.suffix)

    def put(path, content, **described):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        files[staged.name(path)] = {"sha256": sha256(content), **described}

    for split, original in splits.items():
        if "tensor" in formats:
            for kind, tensor in {"image": locked[split], "label": original.labels}.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                put(staged.file(split, kind), lockfiles.to_bytes(tensor), dtype=dtype, shape=list(tensor.shape))
        if key:
            put(staged.file(split, "sealed"), sealing.seal(original, locked[split], key, f"{paths.suffix} {split}"))
        if "png" in formats:
            sums = lockfiles.write_tree(staged.tree / split, original._replace(images=locked[split]))
            lines = "".join(f"{expected}  {split}/{name}\n" for name, expected in sums.items())
            put(staged.sums(split), lines.encode(), shape=list(locked[split].shape))
    if "png" in formats:  # write_file has brought the others to the disk
        utils.sync_disks()
    return files


def publish(paths, manifest, files, key):
    """Move staged files into their places, and then write the manifest that lists them too; returns that."""
    if paths.has_tree() and paths.name(paths.sums("train")) in files:
        utils.discard(paths.tree, paths.trash)  # of a process that was killed before it wrote the manifest
    for path in paths.staging.iterdir():
        os.replace(path, paths.folder / path.name)
    paths.staging.rmdir()
    utils.sync_folder(paths.folder)
    sealed_with = sealing.fingerprint(key) if key else manifest["sealed_with"]
    manifest = {**manifest, "files": {**manifest["files"], **files}, "sealed_with": sealed_with}
    write_file(paths.manifest, json.dumps(manifest, indent=1).encode())
    return manifest
