"""Data sets, and the files that lock.py makes of them: their names, their manifest, reading, writing and checking."""

import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, ImageFolder

from utils import UserError, first_line, write_file

SPLITS = ("train", "test")
KINDS = ("image", "label", "sealed")

# Data sets


class Split(NamedTuple):
    """One split of a data set. images uint8 [N, 3, H, W]; labels int64 [N], which index the list classes; names
    gives every image the path of a PNG file, as cat/0001.png."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    names: list

    def first(self, count):
        """The first count images, or all of them where count is None."""
        return Split(self.images[:count], self.labels[:count], self.classes, self.names[:count])


class Dataset(NamedTuple):
    """load(root, split) returns a Split, and raises UserError where root does not hold one.

    mean and std are the numbers that its pixels in [0, 1] are normalised with, one for each channel.
    """

    load: callable
    mean: tuple
    std: tuple


def numbered(labels, classes):
    """Names of images that have none: their class and their index."""
    return [f"{classes[label]}/{index:05d}.png" for index, label in enumerate(labels.tolist())]


def load_cifar10(root, split):
    """CIFAR-10 (Krizhevsky, 2009), in the order of its batch files; raises UserError where it is absent or damaged."""
    try:
        data = CIFAR10(root, train=split == "train")
    except RuntimeError as error:  # torchvision checks every file's MD5
        raise UserError(
            f"{root}: CIFAR-10 is not there, or a file of it is damaged; download it with "
            f"python -c \"from torchvision.datasets import CIFAR10; CIFAR10('{root}', download=True)\""
        ) from error
    images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    return Split(images, labels, data.classes, numbered(labels, data.classes))


def load_digits(root, split):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels enlarged to 3x32x32; the last 360 are the test set.

    They come inside scikit-learn (from UCI's Optical Recognition of Handwritten Digits): root is not read.
    """
    from sklearn import datasets  # here, because only this data set needs it, and it is slow to import

    pixels, labels = datasets.load_digits(return_X_y=True)
    part = slice(None, -360) if split == "train" else slice(-360, None)
    images = torch.from_numpy(pixels[part]).float().div(16).reshape(-1, 1, 8, 8)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    labels, classes = torch.from_numpy(labels[part]).long(), [str(digit) for digit in range(10)]
    return Split(to_uint8(images), labels, classes, numbered(labels, classes))


def load_folder(root, split):
    """The images in root/<split>/<class>/, PNG or JPEG and of one size, ordered by class and then by file name.

    Raises UserError naming the file or folder where one cannot be used.
    """
    folder = Path(root, split)
    files, train_files = list_images(folder), list_images(Path(root, "train"))
    if files.classes != train_files.classes:
        odd = sorted(set(files.classes) ^ set(train_files.classes))
        raise UserError(f"{folder}: the classes differ from those in {train_files.root}: {', '.join(odd)}")
    first = train_files.samples[0][0]
    size = read_image(first).shape
    images = torch.empty(len(files.samples), *size, dtype=torch.uint8)
    if min(size[1:]) < 8:
        raise UserError(f"{first}: {size[2]}x{size[1]} pixels are too few; take images of at least 8x8")
    for index, (path, _) in enumerate(files.samples):
        image = read_image(path)
        if image.shape != size:
            found, expected = (f"{shape[2]}x{shape[1]}" for shape in (image.shape, size))
            raise UserError(f"{path}: is {found} pixels, but {first} is {expected}; bring all images to one size")
        images[index] = image
    names = [Path(path).relative_to(folder).with_suffix(".png").as_posix() for path, _ in files.samples]
    twice = next((name for name, after in zip(names, names[1:]) if name == after), None)
    if twice:
        raise UserError(f"{folder}: two images would be named {twice}; rename one")
    return Split(images, torch.tensor(files.targets), files.classes, names)


def list_images(folder):
    """torchvision's ImageFolder, of PNG and JPEG; raises UserError for any other file that is not hidden."""

    def is_image(path):
        if Path(path).name.startswith("."):
            return False
        if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UserError(f"{path}: is neither PNG nor JPEG; convert it, or take it away")
        return True

    try:
        return ImageFolder(str(folder), is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: expected a folder of images for each class ({first_line(error)})") from error


def read_image(file):
    """An image as uint8 [3, H, W], turned upright; raises UserError where it is damaged or more than 8-bit colours."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise UserError(f"{file}: its pixels are {image.mode}; convert it to 8-bit RGB or grey")
            if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                raise UserError(f"{file}: parts of it are transparent; convert it to RGB")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for a damaged file
        raise UserError(f"{file}: cannot be read as an image ({first_line(error)})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
DIGITS_STATISTICS = (0.3054,) * 3, (0.3228,) * 3  # of the training set, after enlarging
ROUND_STATISTICS = (0.5,) * 3, (0.25,) * 3  # of no images in particular

DATASETS = {
    "cifar": Dataset(load_cifar10, *CIFAR_STATISTICS),  # robustness' name for it
    "cifar10": Dataset(load_cifar10, *CIFAR_STATISTICS),  # CIFAR-ZOO's
    "digits": Dataset(load_digits, *DIGITS_STATISTICS),
    "folder": Dataset(load_folder, *ROUND_STATISTICS),
}


def one_name(dataset):
    """cifar and cifar10 are one data set."""
    return "cifar10" if dataset == "cifar" else dataset


def to_uint8(images):
    """Pixels in [0, 1], any shape, to the nearest of 0..255."""
    return (images * 255).round().to(torch.uint8)


def to_float(images):
    """uint8 pixels, any shape, to float32 in [0, 1]."""
    return images.float() / 255


# Names of locked files

# The lock methods, and the parameters that each reads, in the order in which a file's name gives them.
LOCK_METHODS = {"basic": (), "mixup": ("lambd",), "horiz": ("alpha",), "mixandcat": ("alpha", "lambd")}


def lock_suffix(method, alpha=0.5, lambd=0.5):
    """The end of a locked file's name: the original's basic, 50_mixup, 50_horiz and mixandcat.

    The original's mixandcat carries neither parameter; here it does where one differs from 0.5,
    as 30_50_mixandcat for alpha 0.3, so that two such locks never share a name.
    """
    values = {"alpha": alpha, "lambd": lambd}
    percents = [f"{100 * values[name]:.12g}" for name in LOCK_METHODS[method]]  # int(100 * 0.29) would be 28
    if method == "mixandcat" and percents == ["50", "50"]:
        percents = []
    return "_".join([*percents, method])


def parse_suffix(suffix):
    """The method and its parameters, by name, from the end of a locked file's name."""
    *percents, method = suffix.split("_")
    return method, {name: float(percent) / 100 for name, percent in zip(LOCK_METHODS.get(method, ()), percents)}


class Paths:
    """Where the files of one lock are: below folder, and named by the lock's suffix."""

    def __init__(self, folder, suffix):
        self.folder, self.suffix = Path(folder), suffix
        self.manifest = self.folder / f"lock_{suffix}.json"
        self.tree = self.folder / suffix  # of PNG files: <split>/<class>/<name>.png, and <split>.sha256
        self.partial = self.folder / f".lock_{suffix}"  # what is finished of an interrupted lock

    def file(self, split, kind):
        """A file of tensors: kind is image or label; or sealed, what turns locked images into the originals."""
        return self.folder / f"{split}_{kind}_{self.suffix}"

    def sums(self, split):
        return self.tree / f"{split}.sha256"

    def outputs(self):
        """Everything that a finished lock may consist of, the manifest first."""
        return [self.manifest, self.tree, *(self.file(split, kind) for split in SPLITS for kind in KINDS)]

    def name(self, path):
        """The path of one of its files, as it stands in the manifest."""
        return path.relative_to(self.folder).as_posix()


def split_path(path):
    """The Paths that a locked file belongs to, and its split, as its name tells."""
    split, _, rest = path.name.partition("_")
    return Paths(path.parent, rest.partition("_")[2]), split


# Hashes and manifests


def sha256(content):
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_tensor(tensor):
    """SHA-256 of a tensor's dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def read_json(path):
    """What a JSON file holds, or None where there is none; raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: not JSON, or damaged ({first_line(error)}); lock again with --overwrite") from error


def read_manifest(paths):
    """The manifest of a lock as a dict, or None where there is none; raises UserError where it is not one."""
    manifest = read_json(paths.manifest)
    try:
        if manifest is not None:
            settings = manifest["settings"]
            [settings["original_sha256"][split][kind] for split in SPLITS for kind in ("images", "labels")]
            settings["classes"].index, settings["dataset"], manifest["report"].items, manifest["sealed_with"]
            [entry["sha256"] for entry in manifest["files"].values()]
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{paths.manifest}: not a manifest of lock.py ({error}); lock again") from error


def locks_in(folder):
    """The Paths of every lock in a folder that has a manifest."""
    files = sorted(Path(folder).glob("lock_*.json"))
    return [Paths(folder, file.stem.removeprefix("lock_")) for file in files]


def formats_of(paths, manifest):
    """The formats that a lock was written in, of "tensor" and "png"."""
    marks = {"tensor": paths.file("train", "image"), "png": paths.sums("train")}
    return [form for form, path in marks.items() if paths.name(path) in manifest["files"]]


def read_checked(paths, manifest, path):
    """The bytes of a file of a lock; raises UserError where they are not those that its manifest names."""
    if paths.name(path) not in manifest["files"]:
        raise UserError(f"{path}: {paths.manifest} does not list it; lock again with --overwrite")
    if not path.is_file():
        raise UserError(f"{path}: no such file, but {paths.manifest} lists it")
    content = path.read_bytes()
    if sha256(content) != manifest["files"][paths.name(path)]["sha256"]:
        raise UserError(f"{path}: changed or damaged since it was locked: its SHA-256 is not the manifest's")
    return content


def check_files(paths, manifest):
    """Yield, for each file of a lock, a UserError where it is absent or not as locked, and None where it is."""
    known = [paths.file(split, kind) for split in SPLITS for kind in KINDS] + [paths.sums(split) for split in SPLITS]
    for name in manifest["files"]:
        path = paths.folder / name
        if path not in known:
            yield UserError(f"{paths.manifest}: lists {name}, which is no file of this lock")
            continue
        error = error_of(read_checked, paths, manifest, path)
        yield error
        if path.suffix == ".sha256" and not error:
            for leaf, expected in read_sums(paths, path.stem, manifest).items():
                yield error_of(read_leaf, paths, path.stem, leaf, expected)


def error_of(function, *args):
    """The UserError that a call raises, or None."""
    try:
        function(*args)
    except UserError as error:
        return error


# Reading and writing


def to_bytes(tensor):
    """What a locked file holds: torch.save of a list of one tensor, as the original's lists of batches."""
    file = io.BytesIO()
    torch.save([tensor.clone()], file)  # cloned, since a slice would be saved with all that it is a slice of
    return file.getvalue()


def from_bytes(content, path):
    """One tensor, from the bytes of a file that holds a list of tensors; never unpickles anything but tensors."""
    try:
        return torch.cat(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises several kinds for a damaged file; all mean the same here
        raise UserError(f"{path}: not a list of tensors, or damaged ({first_line(error)}); lock again") from error


def write_tree(root, split, images, names):
    """Write images uint8 [N, 3, H, W] as PNG files root/<split>/<name>, and their hashes, in their order, into
    root/<split>.sha256 as the tool sha256sum has them; returns the bytes of that file."""
    lines = []
    for image, name in zip(images.permute(0, 2, 3, 1).numpy(), names):
        path = Path(root, split, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        path.write_bytes(file.getvalue())
        lines.append(f"{sha256(file.getvalue())}  {split}/{name}\n")
    sums = "".join(lines).encode()
    write_file(Path(root, f"{split}.sha256"), sums)
    return sums


def read_sums(paths, split, manifest):
    """The names of a split's PNG files, in the order of its images, and their SHA-256: a dict."""
    lines = read_checked(paths, manifest, paths.sums(split)).decode().splitlines()
    return {line.partition("  ")[2].removeprefix(f"{split}/"): line.partition("  ")[0] for line in lines}


def read_leaf(paths, split, name, expected):
    """The bytes of a PNG file of a lock; raises UserError where their SHA-256 is not the one expected."""
    path = paths.tree / split / name
    content = path.read_bytes() if path.is_file() and ".." not in path.parts else None
    if content is None or sha256(content) != expected:
        raise UserError(f"{path}: absent, or changed or damaged since it was locked")
    return content


def load_split(paths, split, manifest):
    """A locked Split, its files checked against the manifest; from files of tensors, or else from PNG files."""
    formats, classes = formats_of(paths, manifest), manifest["settings"]["classes"]
    sums = read_sums(paths, split, manifest) if "png" in formats else {}
    if "tensor" in formats:
        files = [paths.file(split, kind) for kind in ("image", "label")]
        tensors = [from_bytes(read_checked(paths, manifest, path), path) for path in files]
        images, labels = check_tensors(*tensors, *files)
    else:
        leaves = [read_leaf(paths, split, name, expected) for name, expected in sums.items()]
        images = torch.stack([read_image(io.BytesIO(leaf)) for leaf in leaves])
        labels = torch.tensor([classes.index(name.partition("/")[0]) for name in sums])
    return Split(images, labels, classes, list(sums) or numbered(labels, classes))


def load_locked(image_path, label_path, lock_flags=""):
    """Locked images uint8 [N, 3, H, W], labels int64 [N], and their manifest, from a pair of files.

    Where a manifest stands beside the images, both files must be those that it names, and where it names PNG files
    only, these are read. Without one, reads the same files, and the original's lists of float32 batches in [0, 1],
    which are rounded to the nearest 8-bit value; the manifest is then None. Raises UserError naming the file
    where one is absent, damaged or does not fit. lock_flags, such as " --dataset digits", go into the command
    that the error for an absent file names.
    """
    image_path, label_path = Path(image_path), Path(label_path)
    paths, split = split_path(image_path)
    manifest = read_manifest(paths)
    if manifest is None and paths.partial.exists():
        raise UserError(f"{image_path}: this lock is not finished; the command that began it finishes it")
    if manifest is None or "tensor" in formats_of(paths, manifest):
        for path in (image_path, label_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; make it with {lock_command(path)}{lock_flags}")
    if manifest is None:
        tensors = [from_bytes(path.read_bytes(), path) for path in (image_path, label_path)]
        return *check_tensors(*tensors, image_path, label_path), None
    locked = load_split(paths, split, manifest)
    own = manifest["files"].get(paths.name(paths.file(split, "label")))
    if own and sha256(label_path.read_bytes()) != own["sha256"]:
        raise UserError(f"{label_path}: changed, or not the labels that were locked with {image_path}")
    return locked.images, locked.labels, manifest


def check_tensors(images, labels, image_path, label_path):
    """images as uint8 and labels as int64; raises UserError where they are no images, no labels, or no pair."""
    if images.is_floating_point():
        rounding = 0.5 / 255
        if not ((images > -rounding) & (images < 1 + rounding)).all():
            raise UserError(f"{image_path}: images of floats must lie in [0, 1]; lock again")
        images = to_uint8(images)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise UserError(f"{image_path}: expected images [N, 3, H, W], found {images.dtype} {list(images.shape)}")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8) or labels.dim() != 1:
        raise UserError(f"{label_path}: expected labels [N], found {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise UserError(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels: lock again")
    return images, labels.long()


def lock_command(path):
    """The lock.py command that makes a locked file, as its name tells."""
    method, parameters = parse_suffix(split_path(path)[0].suffix or "basic")
    flags = "".join(f" --{name} {value:g}" for name, value in parameters.items() if value != 0.5)
    return f"python lock.py --lock-data {path.parent} --lock-method {method}{flags}"
