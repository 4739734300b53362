"""The files of a lock: their names, the manifest that lists them, and how they are written, read and checked."""

import hashlib
import io
import itertools
import json
import shlex
from numbers import Real
from pathlib import Path

import torch
from PIL import Image

from data import SPLITS, check_names, decode_image, is_plain, no_warnings, to_uint8
from methods import PARAMETERS, TARGET_MAPS, parameters_of
from utils import UserError, discard, in_threads, naming, read_file, serialize, sync_folder, telling_damage

# Names of files


def lock_suffix(method, alpha=PARAMETERS["alpha"], lambd=PARAMETERS["lambd"]):
    """The end of a locked file's name: basic, 50_mixup, 50_horiz or mixandcat, as in the authors' code.

    Their mixandcat names neither alpha nor lambd. Here it does where one differs from 0.5, as 30_50_mixandcat for
    alpha 0.3, so that two such locks never share a name.
    """
    values = {"alpha": alpha, "lambd": lambd}
    percents = [f"{100 * values[name]:.12g}" for name in parameters_of([method])]  # int(100 * 0.29) would be 28
    if method == "mixandcat" and percents == ["50", "50"]:
        percents = []
    return "_".join([*percents, method])


def parse_suffix(suffix):
    """The method and its parameters, by name, from the end of a file's name; None where lock_suffix did not make it."""
    *percents, method = suffix.split("_")
    try:
        parameters = {name: float(part) / 100 for name, part in zip(parameters_of([method]), percents)}
        possible = all(0 <= value <= 1 for value in parameters.values())
        return (method, parameters) if possible and lock_suffix(method, **parameters) == suffix else None
    except (KeyError, ValueError):
        return None


class Paths:
    """Where the files of one lock are: below folder, and named by the lock's suffix."""

    def __init__(self, folder, suffix):
        self.folder, self.suffix = Path(folder), suffix
        self.manifest = self.folder / f"lock_{suffix}.json"
        self.tree = self.folder / suffix  # of PNG files: <split>/<class>/<name>.png, and <split>.sha256
        self.partial = self.folder / f".lock_{suffix}"  # what is finished of an interrupted lock
        self.staging = self.folder / f".new_{suffix}"  # files that are being written
        self.trash = self.folder / f".old_{suffix}"  # folders that are being deleted

    def file(self, split, kind):
        """A file of a split. kind is image or label: tensors; or sealed: what turns locked images into originals."""
        return self.folder / f"{split}_{kind}_{self.suffix}"

    def sums(self, split):
        """The file that lists a split's PNG files and their hashes; only the tree of a lock has one."""
        return self.tree / f"{split}.sha256"

    def groups(self):
        """The files that a lock may consist of, by format; each format has all of its files or none."""
        return {
            "tensor": [self.file(split, kind) for split in SPLITS for kind in ("image", "label")],
            "png": [self.sums(split) for split in SPLITS],
            "sealed": [self.file(split, "sealed") for split in SPLITS],
        }

    def existing(self):
        """Those of the files in groups that are there."""
        return [path for path in itertools.chain(*self.groups().values()) if path.exists()]

    def has_tree(self):
        """Whether the tree is one that was written here, and not a folder of the user's that has its name."""
        return any(self.sums(split).is_file() for split in SPLITS) and not self.tree.is_symlink()

    def remove(self):
        """Delete the files of a lock, the manifest first: what it lists is there as long as it is."""
        self.manifest.unlink(missing_ok=True)
        sync_folder(self.folder)
        if self.has_tree():
            discard(self.tree, self.trash)
        for path in [*self.groups()["tensor"], *self.groups()["sealed"]]:
            path.unlink(missing_ok=True)

    def name(self, path):
        """The path of one of its files, as it stands in the manifest."""
        return path.relative_to(self.folder).as_posix()


def parse_path(path):
    """The Paths that a locked file belongs to, and its split, as its name tells."""
    split, _, rest = path.name.partition("_")
    return Paths(path.parent, rest.partition("_")[2]), split


def locks_in(folder):
    """The Paths of every lock in a folder that has a manifest."""
    files = sorted(path for path in Path(folder).glob("lock_*.json") if path.is_file())
    suffixes = [path.stem.removeprefix("lock_") for path in files]
    return [Paths(folder, suffix) for suffix in suffixes if parse_suffix(suffix)]


def locks_without_manifest(folder):
    """The Paths of every lock in a folder of which there are files, but no manifest, and which is not in the making."""
    names = [path.name for path in Path(folder).glob("*")]  # none where there is no folder
    suffixes = {*names, *(parse_path(Path(name))[0].suffix for name in names)}  # a tree's name is the suffix itself
    locks = [Paths(folder, suffix) for suffix in sorted(suffixes) if parse_suffix(suffix)]
    return [paths for paths in locks if paths.existing() and not (paths.manifest.is_file() or paths.partial.exists())]


# Hashes and manifests


def sha256(content):
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_tensor(tensor):
    """SHA-256 of a tensor's dtype, shape and values, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e9


def is_dict_of(is_key, is_value):
    """A function that says whether its argument is a dict of such keys and values."""
    return lambda value: isinstance(value, dict) and all(is_key(k) and is_value(v) for k, v in value.items())


def is_text(value):
    return isinstance(value, str) and value.isprintable()


# What a manifest must hold to be used: for each key a function that says whether its value will do, or a dict of such.
REPORT = {
    **dict.fromkeys(("images", "unchanged", "base_accuracy", "to_target", "to_true"), is_number),
    **dict.fromkeys(("l2_mean", "l2_max", "ssim"), is_number),
    "attacks": lambda value: bool(value) and is_dict_of(TARGET_MAPS.__contains__, is_number)(value),
    "psnr": lambda value: value is None or is_number(value),
}
MANIFEST = {
    "settings": {
        "dataset": is_text,
        "classes": lambda value: isinstance(value, list) and all(is_text(name) and is_plain(name) for name in value),
        "subset": lambda value: value is None or (isinstance(value, int) and value > 0),
        "original_sha256": {split: {"images": is_text, "labels": is_text} for split in SPLITS},
        **dict.fromkeys(("arch", "base_sha256"), is_text),
        **dict.fromkeys(("eps", "attack_steps"), is_number),
    },
    "report": {split: REPORT for split in SPLITS},
    "files": is_dict_of(is_text, lambda entry: isinstance(entry, dict) and is_text(entry.get("sha256"))),
    "sealed_with": lambda value: value is None or is_text(value),
}


def find_invalid(value, schema, where="it"):
    """The first key whose value does not fit MANIFEST, or a part of it; or None where all do."""
    if not isinstance(schema, dict):
        return None if schema(value) else where
    if not isinstance(value, dict):
        return where
    found = (find_invalid(value[key], part, key) if key in value else key for key, part in schema.items())
    return next((invalid for invalid in found if invalid), None)


# what to do about a damaged file: whoever was only given the lock, and whoever can lock again
COPY, LOCK_AGAIN = "get it again from a copy", "or lock again with --overwrite"
REMEDY = f"{COPY}, {LOCK_AGAIN}"


def read_json(path):
    """The dict that a JSON file holds; raises UserError where it is damaged."""
    content = read_file(path)
    with telling_damage(lambda why: f"{path}: not JSON, or damaged ({why}); {REMEDY}"):
        return dict(json.loads(content))


def read_manifest(paths):
    """The manifest of a lock as a dict, or None where there is none; raises UserError where it is not one."""
    if not paths.manifest.is_file():
        return None
    manifest = read_json(paths.manifest)
    invalid = find_invalid(manifest, MANIFEST)
    if not invalid:
        listed = set(manifest["files"])
        groups = {form: {paths.name(path) for path in group} for form, group in paths.groups().items()}
        whole = {form for form, names in groups.items() if names <= listed}
        if listed != set().union(*(groups[form] for form in whole)) or not whole & {"tensor", "png"}:
            invalid = "files"
        elif ("sealed" in whole) != (manifest["sealed_with"] is not None):
            invalid = "sealed_with"
    if invalid:
        wrong = f"not a manifest of lock.py: {invalid} is not as it should be"
        raise UserError(f"{paths.manifest}: {wrong}; {REMEDY}")
    return manifest


def formats_of(paths, manifest):
    """The formats that a lock was written in, of "tensor" and "png"."""
    groups = paths.groups()
    return [form for form in ("tensor", "png") if paths.name(groups[form][0]) in manifest["files"]]


def check_files(paths, manifest):
    """Yield an error for each file that a manifest lists and that is absent, unreadable, or not as it was locked."""
    groups = paths.groups()
    for path in [*groups["tensor"], *groups["sealed"]]:
        if paths.name(path) in manifest["files"]:
            try:
                read_checked(paths, manifest, path)
            except (UserError, OSError) as error:
                yield error
    for split in SPLITS if "png" in formats_of(paths, manifest) else ():
        try:
            sums = read_sums(paths, split, manifest)
        except (UserError, OSError) as error:
            yield error
            continue
        for name, expected in sums.items():
            try:
                png_bytes(paths, split, name, expected)
            except (UserError, OSError) as error:
                yield error


def check_unlisted(paths, manifest):
    """Yield a UserError for each file that has the name of a lock's, but that its manifest does not list."""
    for path in itertools.chain(*paths.groups().values()):
        if paths.name(path) not in manifest["files"] and (path.exists() or path.is_symlink()):
            yield UserError(f"{path}: {paths.manifest} does not list it; take it away")


def check_tree(paths, manifest):
    """Yield a UserError for each file in the tree of PNG files that is none of the lock's: it would be used as well."""
    if "png" not in formats_of(paths, manifest):
        return
    known = set(paths.groups()["png"])
    for split in SPLITS:
        try:
            known |= {paths.tree / split / name for name in read_sums(paths, split, manifest)}
        except (UserError, OSError):  # which check_files tells
            return
    for path in sorted(paths.tree.rglob("*")):
        if path not in known and path.name != ".DS_Store" and (path.is_symlink() or not path.is_dir()):
            yield UserError(f"{path}: no file of this lock; take it away")


# Writing


def to_bytes(tensor):
    """What a locked file holds: torch.save of a list of one tensor, as the authors' lists of batches."""
    is_slice = tensor.untyped_storage().nbytes() > tensor.nbytes  # which would be saved with all that it is a slice of
    return serialize([tensor.clone() if is_slice else tensor])


def write_tree(folder, part):
    """Write the images of a Split as PNG files folder/<name>; returns their SHA-256 by name, in their order."""
    check_names(part.names, part.classes, folder)
    images = part.images.permute(0, 2, 3, 1).numpy()

    def write(index):
        path, file = Path(folder, part.names[index]), io.BytesIO()
        Image.fromarray(images[index]).save(file, "png")
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        return sha256(file.getvalue())

    hashes = in_threads(write, range(len(images)), desc=f"writing {Path(folder).name}", unit="image")
    return dict(zip(part.names, hashes))


# Reading


def from_bytes(content, path):
    """One tensor, from the bytes of a file that holds a list of tensors; never unpickles anything but tensors."""
    with telling_damage(lambda why: f"{path}: not a list of tensors, or damaged ({why}); {REMEDY}"):
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # without a copy
        tensor.numpy()  # what is no ordinary tensor fails here
        return tensor


def check_tensors(images, labels, image_path, label_path):
    """images as uint8 and labels as int64; raises UserError where they are no images, no labels, or no pair."""
    if images.is_floating_point():
        rounding = 0.5 / 255
        if not ((images > -rounding) & (images < 1 + rounding)).all():
            raise UserError(f"{image_path}: images of floats must lie in [0, 1]; {REMEDY}")
        images = to_uint8(images)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise UserError(f"{image_path}: expected images [N, 3, H, W], found {images.dtype} {list(images.shape)}")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8) or labels.dim() != 1:
        raise UserError(f"{label_path}: expected labels [N], found {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        found = f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels"
        raise UserError(f"{found}; {REMEDY}")
    return images.contiguous(), labels.long().contiguous()


def read_checked(paths, manifest, path):
    """The bytes of a file that the manifest lists; raises UserError where they are not those it was written with."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, but {paths.manifest} lists it; {COPY}")
    content = read_file(path)
    if sha256(content) != manifest["files"][paths.name(path)]["sha256"]:
        raise UserError(f"{path}: changed or damaged since it was locked: its SHA-256 is not the manifest's; {COPY}")
    return content


def read_sums(paths, split, manifest):
    """The names of a split's PNG files, in the order of its images, and their SHA-256: a dict."""
    path = paths.sums(split)
    text = read_checked(paths, manifest, path).decode("utf-8", "replace")
    lines = [line.partition("  ") for line in text.split("\n")[:-1]]
    names = [name.removeprefix(f"{split}/") for _, _, name in lines]
    check_names(names, manifest["settings"]["classes"], path)
    if not names or len(names) != manifest["report"][split]["images"]:
        raise UserError(f"{path}: lists {len(names)} images, but {paths.manifest} says otherwise; {COPY}")
    return dict(zip(names, (expected for expected, _, _ in lines)))


def png_bytes(paths, split, name, expected):
    """The bytes of a PNG file of a lock; raises UserError where their SHA-256 is not the one expected."""
    path = paths.tree / split / name
    content = read_file(path) if path.is_file() else None
    if content is None or sha256(content) != expected:
        raise UserError(f"{path}: absent, or changed or damaged since it was locked; {COPY}")
    return content


def load_split(paths, split, manifest):
    """Locked images uint8 [N, 3, H, W] and labels int64 [N], from files of tensors, or else from PNG files.

    Raises UserError naming the file where one is not as it was locked, or where the labels are not the originals'.
    """
    if "tensor" in formats_of(paths, manifest):
        files = [paths.file(split, kind) for kind in ("image", "label")]
        tensors = [from_bytes(read_checked(paths, manifest, path), path) for path in files]
        images, labels = check_tensors(*tensors, *files)
    else:
        tree, sums = paths.tree / split, read_sums(paths, split, manifest)
        files = [tree, paths.sums(split)]

        def read(name):
            return decode_image(tree / name, png_bytes(paths, split, name, sums[name]))

        with no_warnings():
            images = in_threads(read, list(sums), desc=f"reading {tree}", unit="image")
        if len({image.shape for image in images}) > 1:
            raise UserError(f"{files[0]}: the images differ in size; {REMEDY}")
        classes = manifest["settings"]["classes"]
        images, labels = torch.stack(images), torch.tensor([classes.index(name.partition("/")[0]) for name in sums])
    if hash_tensor(labels) != manifest["settings"]["original_sha256"][split]["labels"]:
        raise UserError(f"{files[1]}: other labels, or another order, than {paths.manifest} tells of the originals")
    return images, labels


def load_locked(image_path, label_path, lock_flags=""):
    """Locked images uint8 [N, 3, H, W], labels int64 [N], and their manifest, from a pair of files.

    Where a manifest stands beside the images, both files must be those that it names, and where it names PNG files
    only, these are read. Without one, reads the same files, and the authors' lists of float32 batches in [0, 1],
    which are rounded to the nearest 8-bit value; the manifest is then None. Raises UserError naming the file
    where one is absent, damaged or does not fit. lock_flags, such as "--dataset digits", go into the command that
    the error for an absent file names.
    """
    image_path, label_path = Path(image_path), Path(label_path)
    paths, split = parse_path(image_path)
    manifest = read_manifest(paths)
    if manifest is None and paths.partial.exists():
        raise UserError(f"{image_path}: this lock is not finished; the command that began it finishes it")
    if manifest is None or "tensor" in formats_of(paths, manifest):
        for path in (image_path, label_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file{how_to_lock(path, lock_flags)}")
    if manifest is None:
        tensors = [from_bytes(read_file(path), path) for path in (image_path, label_path)]
        return *check_tensors(*tensors, image_path, label_path), None
    if split not in SPLITS or image_path != paths.file(split, "image"):
        raise UserError(f"{image_path}: not the name of a file of images that {paths.manifest} could list")
    if label_path != paths.file(split, "label"):
        own = manifest["files"].get(paths.name(paths.file(split, "label")))
        if not own or sha256(read_file(label_path)) != own["sha256"]:
            raise UserError(f"{label_path}: not the labels that were locked with {image_path}")
    return *load_split(paths, split, manifest), manifest


def how_to_lock(path, lock_flags):
    """What to do about a locked file that is absent, as the end of a sentence: the command that makes a file of its
    name, with the lock_flags, if there is one."""
    paths, _ = parse_path(path)
    parsed = parse_suffix(paths.suffix)
    if not parsed or path not in paths.groups()["tensor"]:
        return ", nor a name that lock.py gives; correct it"
    method, parameters = parsed
    flags = "".join(f" --{name} {value:.12g}" for name, value in parameters.items() if value != PARAMETERS[name])
    folder = shlex.quote(str(path.parent))
    command = f"python lock.py --lock-data {folder} --lock-method {method}{flags} {lock_flags}".rstrip()
    return f"; make it with {command}, and the --arch and --resume-path of its base classifier"
