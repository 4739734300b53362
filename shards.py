"""A lock in the making: finished batches are kept as shards until all are, and then become the files of the lock.

The settings of a lock decide its bytes. What was begun or finished with some settings is never continued or
replaced with others unasked.
"""

import io
import itertools
import json
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torchvision

import data
import lockfiles
import sealing
import utils
from data import SPLITS
from lockfiles import attacks_of, hash_tensor, sha256
from utils import UserError, write_file

# Settings


def settings_of(method, splits, maps, base, precision, args):
    """All that decides what a lock is. Two locks of the same settings are the same."""
    return {
        "method": method,
        **{name: getattr(args, name) for name in lockfiles.parameters_of(method)},
        **{name: getattr(args, name) for name in ("eps", "attack_lr", "attack_steps", "batch_size", "manual_seed")},
        "precision": precision,
        "subset": args.subset,
        "dataset": data.one_name(args.dataset),
        "classes": splits["train"].classes,
        "original_sha256": {
            split: {"images": hash_tensor(images), "labels": hash_tensor(labels)}
            for split, (images, labels, *_) in splits.items()
        },
        "arch": args.arch,
        "base_sha256": base,
        "target_maps": {name: maps[name] for name in attacks_of([method])},
    }


def refuse_others(where, then, now):
    """Raise UserError where settings differ, naming both."""
    then, now = utils.flatten(then), utils.flatten(now)
    for key in {**now, **then}:
        if then.get(key) != now.get(key):
            old, new = (str(values.get(key))[:40] for values in (then, now))
            raise UserError(
                f"{where} was made with {key} {old}, but now it is {new}; "
                "name another folder with --lock-data, or replace it with --overwrite"
            )


def finished(paths, settings, overwrite):
    """The manifest of a finished lock of these settings, or None where there is something to do.

    Raises UserError where files of other settings, or of other origin, would be replaced without overwrite.
    """
    if overwrite:
        return None
    manifest = lockfiles.read_manifest(paths)
    if manifest:
        refuse_others(paths.manifest, manifest["settings"], settings)
        return manifest
    begun = begun_with(paths)
    if begun:
        refuse_others(paths.partial, begun, settings)
    else:
        for path in itertools.chain(*paths.groups().values()):
            if path.exists():
                raise UserError(f"{path} exists; name another folder with --lock-data, or replace it with --overwrite")
    return None


def check_finished(paths, manifest, key):
    """Raise UserError where a file of a finished lock has changed, or where a seal cannot be added to it."""
    for error in lockfiles.check_files(paths, manifest):
        raise UserError(f"{error}; lock again with --overwrite")
    if key and manifest["sealed_with"] not in (None, sealing.fingerprint(key)):
        raise UserError(f"{paths.manifest}: sealed with another key than that of --key-out; name its own")


def prepare(places, settings, args):
    """Make ready for locking by each method; returns, for each, its manifest where that is done, or else None.

    Raises UserError before anything is changed.
    """
    for paths in places.values():
        if "png" in (args.format or []) and paths.tree.exists() and not paths.has_tree():
            raise UserError(f"{paths.tree} exists, and is not of a lock; name another folder with --lock-data")
    manifests = {method: finished(paths, settings[method], args.overwrite) for method, paths in places.items()}
    key = sealing.make_key(args.key_out) if args.key_out else None
    for method, paths in places.items():
        if manifests[method]:
            check_finished(paths, manifests[method], key)
    for method, paths in places.items():
        if not manifests[method]:
            begin(paths, settings[method])
    return manifests


def begun_with(paths):
    """The settings of the shards of an interrupted lock, or None where there are none."""
    shards = [path for split in SPLITS for path in paths.partial.glob(f"{split}_*")]
    return lockfiles.read_json(paths.partial / "settings.json") if shards else None


def begin(paths, settings):
    """Make the folder of shards, with those of an interrupted lock of these settings in it."""
    if begun_with(paths) != settings:
        shutil.rmtree(paths.partial, ignore_errors=True)
        paths.partial.mkdir()
        write_file(paths.partial / "settings.json", json.dumps(settings).encode())


# Shards


def shard_path(paths, split, start):
    """The file of the batch that begins at the image start."""
    return paths.partial / f"{split}_{start:08d}"


def missing(places, split, starts):
    """The batches of a split without a shard, by the image that each begins at, and the methods that lack it."""
    lacking = {
        start: [method for method, paths in places.items() if not shard_path(paths, split, start).exists()]
        for start in starts
    }
    return {start: methods for start, methods in lacking.items() if methods}


def write_all(places, split, starts, made):
    """Keep what lock_batch returned for the batches that begin at starts; made holds it with its environment."""
    for start, (results, made_with) in zip(starts, made):
        for method, (locked, measured) in results.items():
            file = io.BytesIO()
            torch.save({"locked": locked, "measured": measured, "made_with": made_with}, file)
            write_file(shard_path(places[method], split, start), file.getvalue())


def read_shards(paths, split, starts):
    """Of a whole split the locked images uint8 [N, 3, H, W], the measurements by name [N], and every environment."""
    shards = []
    for path in (shard_path(paths, split, start) for start in starts):
        try:
            shards.append(lockfiles.load_whole(path))
        except Exception as error:  # a damaged file fails in many ways; all mean the same here
            reason = utils.first_line(error)
            raise UserError(f"{path}: damaged ({reason}); delete it, and run the same command again") from error
    measured = {name: torch.cat([shard["measured"][name] for shard in shards]) for name in shards[0]["measured"]}
    return torch.cat([shard["locked"] for shard in shards]), measured, [shard["made_with"] for shard in shards]


def environment(device):
    """What the bytes of a lock depend on beside its settings."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
    }


# The finished lock


def summarize(measured, method):
    """The measurements of a split, one number or truth value an image, as the numbers that stand in a manifest."""
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
        locked[split], measured, made_with = read_shards(paths, split, range(0, len(images), settings["batch_size"]))
        summaries[split] = summarize(measured, settings["method"])
        for one in made_with:
            if one not in environments:
                environments.append(one)
    paths.remove()
    manifest = {
        "settings": settings,
        "report": summaries,
        "files": {},
        "sealed_with": None,
        "made_with": environments,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    manifest = write_outputs(paths, manifest, splits, locked, formats, key)
    shutil.rmtree(paths.partial)
    return manifest


def write_outputs(paths, manifest, splits, locked, formats, key):
    """Write a lock in the formats, sealed where there is a key, and then the manifest that lists it; returns that."""
    files = dict(manifest["files"])
    shutil.rmtree(paths.staging, ignore_errors=True)  # left by a process that was killed
    for split, original in splits.items():
        if "tensor" in formats:
            for kind, tensor in {"image": locked[split], "label": original.labels}.items():
                content = lockfiles.to_bytes(tensor)
                write_file(paths.file(split, kind), content)
                described = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                files[paths.name(paths.file(split, kind))] = {"sha256": sha256(content), **described}
        if "png" in formats:
            content = lockfiles.write_tree(paths.staging, split, locked[split], original.names)
            files[paths.name(paths.sums(split))] = {"sha256": sha256(content), "shape": list(locked[split].shape)}
        if key:
            context = f"{paths.suffix} {split} {hash_tensor(locked[split])} {hash_tensor(original.images)}"
            content = sealing.seal(original.images, locked[split], key, context)
            write_file(paths.file(split, "sealed"), content)
            files[paths.name(paths.file(split, "sealed"))] = {"sha256": sha256(content)}
    if "png" in formats:
        shutil.rmtree(paths.tree, ignore_errors=True)
        paths.staging.rename(paths.tree)
        utils.sync_disks()
    manifest = {**manifest, "files": files, "sealed_with": sealing.fingerprint(key) if key else manifest["sealed_with"]}
    write_file(paths.manifest, json.dumps(manifest, indent=1).encode())
    return manifest


def add_outputs(paths, manifest, splits, formats, key):
    """Write what of the formats and the seal a finished lock lacks; returns its manifest."""
    missing = [form for form in formats if form not in lockfiles.formats_of(paths, manifest)]
    key = key if manifest["sealed_with"] is None else None
    shutil.rmtree(paths.partial, ignore_errors=True)  # left by a process that was killed
    if not missing and not key:
        return manifest
    locked = {split: lockfiles.load_split(paths, split, manifest).images for split in splits}
    return write_outputs(paths, manifest, splits, locked, missing, key)


def commit():
    """The commit of this code, with -dirty where files differ from it, or None where it is not in a git repository."""
    folder = Path(__file__).parent
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
