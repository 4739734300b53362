"""Data sets, and images of one's own in a folder: what is read, what is refused, and the three commands on a folder."""

import errno
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

import data
import lock
import lockfiles
import train
from augmentation import preprocess
from data import to_float
from models import base
from tests.conftest import ROOT, base_flags, call, config_of, manifest_of, run_of
from utils import UserError

# A PNG of 1x1 pixels with 16 bits a colour, which Pillow reads, but cannot write.
RGB16 = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000c49444154789c6310320141"
    "0002b300d3fab702450000000049454e44ae426082"
)
COLOURS = torch.randint(256, (9, 12, 3), dtype=torch.uint8).numpy()
PARTLY_OPAQUE = Image.fromarray(np.dstack([COLOURS, 255 * np.eye(9, 12, dtype=np.uint8)]))


@pytest.mark.parametrize("split", data.SPLITS)
def test_cifar10_is_read_as_its_files_have_it(split, monkeypatch):
    """Without its files: as torchvision gives them, which are rows of pixels, and lists."""
    pixels = {"train": np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8)}
    pixels["test"] = pixels["train"][:, ::-1]
    classes = list("abcdefghij")

    def cifar10(root, train):
        assert root == "root"
        return SimpleNamespace(data=pixels["train" if train else "test"].copy(), targets=[3, 9], classes=classes)

    monkeypatch.setattr(data, "CIFAR10", cifar10)
    images, labels, *rest = data.load_cifar10("root", split)
    assert images.shape == (2, 3, 32, 32) and images.is_contiguous() and labels.tolist() == [3, 9]
    assert images[1, 2, 5, 7] == pixels[split][1, 5, 7, 2]
    assert rest == [classes, ["d/00000.png", "j/00001.png"]]


def test_the_digits_are_scikit_learns():
    """Enlarged as by torchvision."""
    digits = sklearn.datasets.load_digits()
    train, test = (data.load_digits(None, split) for split in data.SPLITS)
    labels = torch.cat([train.labels, test.labels])
    assert len(test.labels) == 360 and torch.equal(labels, torch.from_numpy(digits.target))
    small = torch.from_numpy(digits.images / 16).float()[:, None]
    expected = functional.resize(small, [32, 32], antialias=False).expand(-1, 3, -1, -1)
    images = to_float(torch.cat([train.images, test.images]))
    torch.testing.assert_close(images, expected, atol=0.51 / 255, rtol=0)


def write(root, name, image=None, **options):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(COLOURS)).save(root / name, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("train/cat/b.png", "train/cat/a.PNG", "train/dog/c.png", "test/cat/d.png", "test/dog/e.png"):
        write(tmp_path, name)
    (tmp_path / "train" / "cat" / ".hidden").touch()
    for name in ("train/.ipynb_checkpoints/a.png", "train/cat/.ipynb_checkpoints/a.png"):
        write(tmp_path, name)
    return tmp_path


def test_a_folder_is_read_by_name_a_class_after_the_other(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # beyond which Pillow warns
    grey = Image.fromarray(COLOURS[:, :, 0])
    write(folder, "train/cat/a.PNG", grey)
    opaque = np.dstack([COLOURS, np.full((9, 12), 255, np.uint8)])
    write(folder, "train/dog/c.png", Image.fromarray(opaque))
    palette = Image.fromarray(COLOURS).quantize(8)
    write(folder, "train/cat/b.png", palette, transparency=b"\xff" * 8)  # of which it warns, too
    train_split = data.load_folder(folder, "train")
    assert train_split.classes == ["cat", "dog"] and train_split.labels.tolist() == [0, 1, 0]
    assert train_split.names == ["cat/a.png", "dog/c.png", "cat/b.png"]
    assert [len(part) for part in train_split.first(2)] == [2, 2, 2, 2]  # of two classes
    (folder / "train" / "cat" / "b.png").write_bytes(b"not read")
    for found, expected in zip(data.load_folder(folder, "train", 2), train_split.first(2)):
        assert found == expected if isinstance(found, list) else torch.equal(found, expected)
    pixels = torch.from_numpy(COLOURS).permute(2, 0, 1)
    assert train_split.images.shape == (3, 3, 9, 12)
    few = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(train_split.images, torch.stack([pixels[:1].expand(3, -1, -1), pixels, few]))


def test_a_tree_is_read_in_the_order_of_its_originals(folder, tmp_path):
    for name in ("e.jpg", "e.mod.JPG", "e/f.png", "e f/f.png"):
        write(folder, f"train/cat/{name}")
    originals = data.load_folder(folder, "train")
    for split in data.SPLITS:
        lockfiles.write_tree(tmp_path / "tree" / split, data.load_folder(folder, split))
    assert data.load_folder(tmp_path / "tree", "train").names == originals.names


def test_a_folder_that_cannot_be_read_is_not_left_out(folder, monkeypatch):
    """Unless it is hidden. (That root may read everything would show nothing.)"""
    scan = os.scandir

    def denied(path):
        if Path(path).name in ("private", ".trash"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    for hidden in ("cat/.trash", ".trash"):
        (folder / "train" / hidden).mkdir()
    assert len(data.load_folder(folder, "train").names) == 3
    (folder / "train" / "cat" / "private").mkdir()
    with pytest.raises(PermissionError, match="train/cat/private"):
        data.load_folder(folder, "train")


def test_a_jpeg_is_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned left
    sideways = Image.new("RGB", (9, 12), "white")
    sideways.paste("black", (0, 0, 9, 6))
    write(folder, "test/cat/d.jpg", sideways, exif=exif, quality=95)
    image = data.read_image(folder / "test" / "cat" / "d.jpg")
    assert image.shape == (3, 9, 12)
    assert image[:, :, :5].float().mean() > 240 and image[:, :, -5:].float().mean() < 15


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: write(f, "test/cow/f.png"), "train: lacks the classes cow, which .*test has"),
        (lambda f: write(f, "test/cat/f.png", Image.new("RGB", (12, 10))), "f.png: is 12x10 pixels, but .* is 12x9"),
        (lambda f: write(f, "test/cat/f.gif"), "f.gif: is neither PNG nor JPEG"),
        (lambda f: write(f, "test/cat/f.png", format="GIF"), "f.png: cannot be read as PNG or JPEG"),
        (lambda f: write(f, "train/cat/a.PNG", Image.new("RGB", (12, 7))), "a.PNG: 12x7 pixels are too few"),
        (lambda f: write(f, "test/cat/f\\g.png"), "f.*g.png' cannot be the name of an image"),
        (lambda f: write(f, "test/cat/f\n.png"), "f.n.png' cannot be the name of an image"),
        (lambda f: write(f, "test/cat/f.png", Image.new("I;16", (12, 9))), "f.png: its pixels are I;16"),
        (lambda f: write(f, "test/cat/f.jpg", Image.new("CMYK", (12, 9))), "f.jpg: its pixels are CMYK; convert it to"),
        (lambda f: write(f, "test/cat/f.png", Image.new("RGBA", (12, 9))), "f.png: parts of it are transparent"),
        (lambda f: write(f, "test/cat/f.png", PARTLY_OPAQUE), "f.png: parts of it are transparent"),
        (
            lambda f: write(f, "test/cat/f.png", save_all=True, append_images=[Image.new("RGB", (12, 9))]),
            "f.png: is animated; save one of its frames",
        ),
        (lambda f: write(f, "test/cat/d.jpg"), "two images or folders would be named cat/d.png"),
        (lambda f: write(f, "test/cat/D.jpg"), "would be named cat/[dD].png, capitals aside"),
        (lambda f: [write(f, f"test/cat/{e}") for e in ("\xe9.png", "e\u0301.jpg")], "would be named cat/.*, capitals"),
        (lambda f: (f / "test" / "cow").symlink_to(f / "nowhere"), "test/cow: lies beside the folders of the classes"),
        (lambda f: write(f, "test/cat/c:d.png"), "cat/c:d.png has a colon in its name"),
        (lambda f: [write(f, "test/cat/f.jpg"), write(f, "test/cat/f.png/g.png")], "would be named cat/f.png"),
        (lambda f: (f / "test/cat/f.png").write_bytes(RGB16), "f.png: its pixels are RGB;16B; convert it to 8-bit"),
        (lambda f: (f / "test/cat/f.png").write_bytes(b"no image"), "f.png: cannot be read as PNG or JPEG"),
        (lambda f: (f / "test/dog/e.png").unlink(), "test: expected a folder of images for each class; .* none in dog"),
        (lambda f: [shutil.rmtree(f / "test" / name) for name in ("cat", "dog")], "for each class; it is empty"),
        (lambda f: (f / "test").rename(f / "val"), "test: no such folder; images go into .*test/<class>/"),
        (
            lambda f: [(f / "test" / name).rename(f / "test" / f".{name}") for name in ("cat", "dog")],
            "test: expected a folder of images for each class; all that it holds is hidden",
        ),
        (lambda f: write(f, "test/f.png"), "test/f.png: lies beside the folders of the classes"),
        (lambda f: write(f, "train/cow/f.png"), "test: lacks the classes cow, which .*train has"),
    ],
)
def test_what_cannot_be_read(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        data.load_folder(folder, "test")
    assert "\n" not in str(error.value)


def test_the_smallest_images_can_be_blurred_most(tmp_path):
    for name in ("train/cat/a.png", "test/cat/b.png"):
        write(tmp_path, name, Image.new("RGB", (8, 8), "white"))
    images = data.load_folder(tmp_path, "train").images
    assert torch.equal(preprocess(images, config_of(tmp_path, **{"preprocess.blur": "2.0"})), images)


def test_images_too_many_for_the_memory(folder, monkeypatch):
    def empty(*size, dtype):
        raise RuntimeError("you tried to allocate 108000000000 bytes")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match="test: 2 images of 12x9 pixels do not fit into memory"):
        data.load_folder(folder, "test")


def test_images_that_are_cut_short(folder):
    path = folder / "test" / "dog" / "e.png"
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match="e.png: cannot be read as PNG or JPEG"):
        data.load_folder(folder, "test")


def test_a_disk_that_fails_is_named_and_no_damage(folder, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error: .*e.png"):
        data.read_image(folder / "test" / "dog" / "e.png")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits 3 to 6 as PNG files of 24x20 pixels, and a base classifier trained on them."""
    root = tmp_path_factory.mktemp("digits")
    for split in data.SPLITS:
        part = data.load_digits(None, split)
        chosen = ((part.labels >= 3) & (part.labels <= 6)).nonzero().flatten().tolist()
        images, names = part.images[chosen, :, 4:24, 4:28], [part.names[index] for index in chosen]
        lockfiles.write_tree(root / "photos" / split, part._replace(images=images, names=names))
    call(base.main, *base_flags(root, root / "photos"), "--epochs", 2)
    return root


def test_the_three_commands_and_back(digits, command, user_error, tmp_path):
    photos, locked, key = digits / "photos", tmp_path / "locked", tmp_path / "key"
    flags = ["--dataset", "folder", "--orig-data", photos, "--arch", "preresnet8", "--attack-steps", 2,
             "--resume-path", digits / "base" / "checkpoint.pt.best", "--lock-data", locked]  # fmt: skip
    command(lock.main, *flags, "--format", "png", "tensor", "--key-out", key)
    manifest = manifest_of(locked)
    assert manifest["settings"]["classes"] == ["3", "4", "5", "6"]
    assert sorted(manifest["settings"]["target_maps"]["T1"]) == [0, 1, 2, 3]
    assert manifest["files"]["train_image_basic"]["shape"][1:] == [3, 20, 24]
    originals, tree = data.load_folder(photos, "test"), data.load_folder(locked / "basic", "test")
    assert tree.names == originals.names and torch.equal(tree.labels, originals.labels)
    assert torch.equal(tree.images, torch.cat(torch.load(locked / "test_image_basic")))
    assert (tree.images != originals.images).any(dim=(1, 2, 3)).all()

    (tmp_path / "config.yaml").write_text(
        f"{{architecture: preresnet8, dataset: folder, orig_data_path: {photos}, num_classes: 4}}"
    )
    command(train.main, "--work-path", tmp_path, "--lock-data", locked, "--epochs", 1)
    _, result = run_of(tmp_path)
    assert result["lock"] == manifest and result["dataset"] == "folder"

    command(lock.main, "--unlock", "--key", key, "--lock-data", locked, "--orig-data", tmp_path / "out")
    line = user_error(lock.main, *flags, "--overwrite")
    assert "train_sealed_basic: --overwrite would delete this seal for good; give --key-out" in line
    restored = data.load_folder(tmp_path / "out", "train")
    originals = data.load_folder(photos, "train")
    assert restored.names == originals.names and torch.equal(restored.images, originals.images)

    again = ["--work-path", tmp_path, "--lock-data", locked, "--overwrite"]
    assert "has 4 classes, but num_classes is 5; set it to 4" in user_error(train.main, *again, "--num_classes", 5)
    line = user_error(train.main, *again, "--dataset", "digits")
    assert f"{locked}/train_image_basic: its images differ in size from those in {photos}" in line
    for name in ("vgg19", "vit"):
        line = user_error(train.main, *again, "--architecture", name)
        assert f"{name}: does not take images of 24x20 pixels (" in line
    assert run_of(tmp_path)[1] == result


def test_the_script_of_the_readme_scales_images(monkeypatch, tmp_path):
    readme = (ROOT / "README.md").read_text()
    script = re.search(r'python -c "(\n[^\n]*from pathlib.*?)"\n', readme, re.DOTALL)[1]
    for split in data.SPLITS:
        write(tmp_path, f"originals/{split}/cat/a.jpg", Image.new("RGB", (90, 70)))
        (tmp_path / "originals" / split / "cat" / "._a.jpg").touch()
        write(tmp_path, f"linked/{split}/a.png")
        (tmp_path / "originals" / split / "dog").symlink_to(tmp_path / "linked" / split)
    (tmp_path / "originals" / ".git").mkdir()
    (tmp_path / "originals" / ".git" / "config").touch()
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    found = data.load_folder("photos", "train")
    assert found.images.shape == (2, 3, 64, 64) and found.classes == ["cat", "dog"]
    write(tmp_path, "originals/test/cat/b.png", Image.new("I;16", (90, 70), 1000))  # Pillow itself makes it white
    with pytest.raises(UserError, match="convert it to 8-bit RGB or grey"):
        exec(script, {})


def test_mistakes_with_a_folder(digits, user_error, monkeypatch, tmp_path):
    flags = ["--dataset", "folder", "--orig-data", digits / "photos", "--arch", "preresnet8",
             "--resume-path", digits / "base" / "checkpoint.pt.best", "--lock-data", tmp_path / "new"]  # fmt: skip
    for name in ("train/a/0.png", "train/b/1.png", "train/c/2.png", "test/a/3.png", "test/b/4.png", "test/c/5.png"):
        write(tmp_path / "three", name)
    line = user_error(lock.main, *flags, "--orig-data", tmp_path / "three")
    assert "not a checkpoint of --arch preresnet8 and 3 classes" in line
    for name in ("train/a/0.png", "test/a/1.png"):
        write(tmp_path / "one", name)
    line = user_error(lock.main, *flags, "--orig-data", tmp_path / "one")
    assert "images of one class cannot be sent to another" in line
    for name in ("train/a/0.png", "train/b/0.png", "test/a/1.png", "test/b/1.png"):
        write(tmp_path / "sizes", name, Image.new("RGB", (16, 16)) if name.startswith("test") else None)
    line = user_error(lock.main, *flags, "--orig-data", tmp_path / "sizes")
    assert "1.png: is 16x16 pixels, but" in line
    line = user_error(lock.main, *flags, "--lock-data", digits)
    assert "--resume-path" in line and "lies in the folder that is handed out" in line
    shutil.copy(digits / "base" / "checkpoint.pt.best", tmp_path / "base")
    flags += ["--resume-path", tmp_path / "base"]
    for inside in ("", "/new", "/.."):
        line = user_error(lock.main, *flags, "--lock-data", f"{digits}/photos{inside}")
        assert "what is handed out and the originals in" in line
    with monkeypatch.context() as patch:
        patch.chdir(digits)
        for orig in ("photos", "base/../photos"):
            line = user_error(lock.main, *flags, "--orig-data", orig, "--lock-data", "photos/new")
            assert "what is handed out and the originals in" in line
    assert not (digits / "photos" / "new").exists()  # it would be a class
    line = user_error(base.main, "--dataset", "folder", "--data", digits / "photos", "--adv-train", 0, "--arch",
                      "resnet18", "--out-dir", tmp_path, "--exp-name", "new")  # fmt: skip
    assert "--arch resnet18: does not take images of 24x20 pixels (robustness' own take 32x32)" in line
    assert not (tmp_path / "new").exists()
