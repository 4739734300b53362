"""Data sets: CIFAR-10, scikit-learn's digits, and folders of images."""

import io
import itertools
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10

from utils import UserError, in_threads, naming, telling_damage

SPLITS = ("train", "test")


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
    """load(root, split, count=None) returns a Split, or the first count images of it; raises UserError where root does
    not hold one.

    mean and std are the numbers that its pixels in [0, 1] are normalised with, one for each channel.
    """

    load: Callable
    mean: tuple
    std: tuple


def numbered(labels, classes):
    """Names of images that have none: their class and their index."""
    return [f"{classes[label]}/{index:05d}.png" for index, label in enumerate(labels.tolist())]


def load_cifar10(root, split, count=None):
    """CIFAR-10 (Krizhevsky, 2009), in the order of its batch files; raises UserError where it is absent or damaged."""
    try:
        data = CIFAR10(root, train=split == "train")
    except RuntimeError as error:  # torchvision checks every file's MD5
        raise UserError(
            f"{root}: CIFAR-10 is not there, or a file of it is damaged; download it with "
            f"python -c \"from torchvision.datasets import CIFAR10; CIFAR10('{root}', download=True)\", "
            "or give --dataset folder for images of your own"
        ) from error
    images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    return Split(images, labels, data.classes, numbered(labels, data.classes)).first(count)


def load_digits(root, split, count=None):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels enlarged to 3x32x32; the last 360 are the test set.

    They come inside scikit-learn (from UCI's Optical Recognition of Handwritten Digits): root is not read.
    """
    from sklearn import datasets  # here, because only this data set needs it, and it is slow to import

    pixels, labels = datasets.load_digits(return_X_y=True)
    part = slice(None, -360) if split == "train" else slice(-360, None)
    images = torch.from_numpy(pixels[part]).float().div(16).reshape(-1, 1, 8, 8)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    labels, classes = torch.from_numpy(labels[part]).long(), [str(digit) for digit in range(10)]
    return Split(to_uint8(images), labels, classes, numbered(labels, classes)).first(count)


def load_folder(root, split, count=None):
    """The images in root/<split>/<class>/, PNG or JPEG and of one size: of each class the first by name, then the
    second, and so on.

    So the first images of a split, which --subset takes, are of every class; no others are read then. Raises UserError
    naming the file or folder where one cannot be used.
    """
    folder, train = Path(root, split), Path(root, "train")
    listed = {path: list_images(path) for path in dict.fromkeys((folder, train))}
    for one, other in ((folder, train), (train, folder)):
        lacking = sorted(set(listed[other][0]) - set(listed[one][0]))
        if lacking:
            raise UserError(f"{one}: lacks the classes {', '.join(lacking)}, which {other} has")
    classes, samples = listed[folder]
    first, _ = listed[train][1][0]
    size = read_image(first).shape
    if min(size[1:]) < 8:
        raise UserError(f"{first}: {size[2]}x{size[1]} pixels are too few; take images of at least 8x8")
    samples = by_turns(samples, folder)[:count]
    try:
        images = torch.empty(len(samples), *size, dtype=torch.uint8)
    except RuntimeError as error:
        what = f"{len(samples)} images of {size[2]}x{size[1]} pixels"
        raise UserError(f"{folder}: {what} do not fit into memory; scale them down") from error

    def read(index):
        path, *_ = samples[index]
        image = decode_image(path)
        if image.shape != size:
            found, expected = (f"{shape[2]}x{shape[1]}" for shape in (image.shape, size))
            raise UserError(f"{path}: is {found} pixels, but {first} is {expected}; bring all images to one size")
        images[index].numpy()[:] = image.numpy()

    with no_warnings():
        in_threads(read, range(len(samples)), desc=f"reading {folder}", unit="image")
    _, labels, names = zip(*samples)
    colon = next((name for name in names if ":" in name), None)
    if colon:
        raise UserError(f"{folder}: {colon} has a colon in its name, which Windows does not take; rename it")
    # to macOS and Windows, a capital is a small letter, and to macOS an accent with or in its letter the same
    check_names(names, classes, folder, fold=lambda name: unicodedata.normalize("NFC", name).lower())
    return Split(images, torch.tensor(labels), classes, list(names))


def by_turns(samples, folder):
    """(path, label, name) for each sample (path, label) below a folder: of each class the first, then the second, and
    so on.

    The name is that of the PNG file that it will be; samples are sorted by it, so that a folder of these files is read
    in the order of its originals.
    """
    named = [(path, label, Path(path).relative_to(folder).with_suffix(".png").as_posix()) for path, label in samples]
    named.sort(key=lambda sample: (sample[1], os.path.split(sample[2])))
    classes = [list(group) for _, group in itertools.groupby(named, key=lambda sample: sample[1])]
    return [*filter(None, itertools.chain(*itertools.zip_longest(*classes)))]


def is_plain(name):
    """Whether a text can be the name of a file or folder, and of none but one inside the folder that it is put in."""
    separators = set("/\\:" if os.name == "nt" else "/\\")  # on Windows a colon ends the name of a disk
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & separators


def check_names(names, classes, where, fold=str):
    """Raise UserError unless the names are those of as many PNG files, each below the folder of a class.

    fold maps names that count as one to the same text.
    """
    folders = set()
    for name in names:
        parts = name.split("/")
        if not all(map(is_plain, parts)) or len(parts) < 2 or parts[0] not in classes or not name.endswith(".png"):
            raise UserError(f"{where}: {name!r} cannot be the name of an image; rename it")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    found = Counter(map(fold, [*names, *folders]))
    twice = next((name for name in [*names, *folders] if found[fold(name)] > 1), None)
    if twice:
        raise UserError(f"{where}: two images or folders would be named {twice}, capitals aside; rename one")


def visible(names):
    """The names that are not hidden, as Jupyter's .ipynb_checkpoints is."""
    return [name for name in names if not name.startswith(".")]


def list_images(folder):
    """The classes that have a folder in this one, and (path, label) of each image below it, PNG or JPEG; both sorted.

    Raises UserError for any other file that is not hidden, and OSError where a folder cannot be read.
    """

    def unreadable(error):  # which os.walk would leave out
        raise error

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; images go into {folder}/<class>/")
    classes, samples = sorted(visible(os.listdir(folder))), []
    loose = next((name for name in classes if not (folder / name).is_dir()), None)
    if loose:
        raise UserError(f"{folder / loose}: lies beside the folders of the classes; move it into one, or take it away")
    for label, name in enumerate(classes):
        for root, subfolders, files in os.walk(folder / name, onerror=unreadable, followlinks=True):
            subfolders[:] = visible(subfolders)
            samples += [(os.path.join(root, file), label) for file in visible(files)]
    samples.sort(key=lambda sample: (sample[1], os.path.split(sample[0])))
    other = next((path for path, _ in samples if not path.lower().endswith((".png", ".jpg", ".jpeg"))), None)
    if other:
        raise UserError(f"{other}: is neither PNG nor JPEG; convert it, or take it away")
    expected = f"{folder}: expected a folder of images for each class"
    if not classes:
        raise UserError(f"{expected}; {'all that it holds is hidden' if any(folder.iterdir()) else 'it is empty'}")
    empty = sorted(set(classes) - {classes[label] for _, label in samples})
    if empty:
        raise UserError(f"{expected}; there are none in {', '.join(empty)}")
    return classes, samples


@contextmanager
def no_warnings():
    """Show no warnings meanwhile, in any thread: of what Pillow thinks of files that it can read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_image(path):
    """decode_image, without Pillow's warnings."""
    with no_warnings():
        return decode_image(path)


def decode_image(path, content=None):
    """An image as uint8 [3, H, W], turned upright, of a file, or of its bytes where they have been read already.

    Raises UserError where it is damaged, or holds what 8-bit RGB cannot: more bits, transparency, CMYK, an animation.
    """
    file = path if content is None else io.BytesIO(content)
    what = f"{path}: cannot be read as PNG or JPEG"
    # why would name the buffer, not the file
    damage = telling_damage(lambda why: f"{what} ({why})" if content is None else what)
    with naming(path), damage, Image.open(file, formats=("PNG", "JPEG")) as image:
        raw = image.tile[0][3] if image.format == "PNG" else image.mode  # of 16-bit colours the mode is RGB too
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") or ";16" in raw:
            raise UserError(f"{path}: its pixels are {raw}; convert it to 8-bit RGB or grey")
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise UserError(f"{path}: parts of it are transparent; convert it to RGB")
        if image.format == "PNG" and image.is_animated:
            raise UserError(f"{path}: is animated; save one of its frames in its place")
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


CIFAR = Dataset(load_cifar10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
DATASETS = {
    "cifar": CIFAR,  # robustness' name for it
    "cifar10": CIFAR,  # CIFAR-ZOO's
    "digits": Dataset(load_digits, mean=(0.3054,) * 3, std=(0.3228,) * 3),  # of the training set, after enlarging
    "folder": Dataset(load_folder, mean=(0.5,) * 3, std=(0.25,) * 3),  # round numbers: of these images nothing is known
}


def canonical_name(dataset):
    """cifar and cifar10 are one data set."""
    return "cifar10" if dataset == "cifar" else dataset


def to_uint8(images):
    """Pixels in [0, 1], any shape, to the nearest of 0..255."""
    return (images * 255).round().to(torch.uint8)


def to_float(images):
    """uint8 pixels, any shape, to float32 in [0, 1]."""
    return images.float() / 255
