"""Augmentation: each transformation by its definition."""

import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional

import augmentation
from data import DATASETS, to_float
from tests.conftest import config_of


def test_random_crop_cuts_out_of_the_padded_image():
    images = torch.randint(1, 256, (400, 3, 6, 5), dtype=torch.uint8)
    crops = augmentation.random_crop(images, padding=2)
    windows = F.pad(images, [2] * 4).unfold(2, 6, 1).unfold(3, 5, 1)  # [N, 3, 5, 5, 6, 5]
    found = (windows == crops[:, :, None, None]).all(dim=(1, 4, 5)).view(400, 25)
    assert (found.sum(1) == 1).all()
    assert found.any(0).all()  # places differ from image to image, and each comes up
    rows = (augmentation.random_crop(torch.ones(500, 3, 16, 16)) == 0).all(dim=(1, 3)).sum(1)
    assert rows.max() == 4  # where nothing else is said


def test_random_flip():
    images = torch.rand(200, 3, 4, 4)
    flipped = augmentation.random_flip(images)
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], images.flip(-1), images))
    assert 80 < mirrored.sum() < 120


def test_random_rotation():
    """As torchvision turns each image, but for pixels halfway between two."""
    images = torch.rand(8, 3, 16, 12)
    torch.manual_seed(1)
    rotated = augmentation.random_rotation(images, degrees=20)
    torch.manual_seed(1)
    angles = torch.empty(8).uniform_(-20, 20).tolist()
    expected = torch.stack([functional.rotate(image, angle) for image, angle in zip(images, angles)])
    assert (rotated == expected).float().mean() > 0.99
    assert torch.equal(augmentation.random_rotation(images, degrees=0), images)


def test_color_jitter():
    """As torchvision changes each image, given the same factors in the same order."""
    images = torch.rand(6, 3, 5, 4)
    adjust = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    orders = set()
    for seed in range(10):
        torch.manual_seed(seed)
        changed = augmentation.color_jitter(images, strength=0.5)
        torch.manual_seed(seed)
        order, expected = torch.randperm(3).tolist(), list(images)
        for kind in order:
            factors = torch.empty(6).uniform_(0.5, 1.5).tolist()
            expected = [adjust[kind](image, factor) for image, factor in zip(expected, factors)]
        torch.testing.assert_close(changed, torch.stack(expected))
        orders.add(tuple(order))
    assert len(orders) > 3


def test_cutout():
    holes = (augmentation.cutout(torch.ones(500, 3, 32, 32), holes=1, length=8) == 0).all(dim=1)
    areas = holes.sum(dim=(1, 2))
    assert areas.max() == 64 and areas.min() >= 16  # cut off at a corner, a quarter is left
    rows, columns = holes.any(dim=2).sum(1), holes.any(dim=1).sum(1)
    assert torch.equal(rows * columns, areas)
    assert holes.any(dim=0).all()
    assert torch.equal(augmentation.cutout(torch.ones(2, 3, 8, 8), holes=0, length=8), torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize("length", [4, 5])
def test_the_centre_of_a_hole_is_any_pixel(length):
    """As DeVries & Taylor's code has it: two pixels before the centre, and from it on two, an odd length or not."""
    holes = (augmentation.cutout(torch.ones(500, 3, 9, 9), 1, length) == 0).all(dim=1)
    expected = {tuple(row for row in range(centre - 2, centre + 2) if 0 <= row < 9) for centre in range(9)}
    for lines in holes.any(dim=2), holes.any(dim=1):
        assert {tuple(line.nonzero()[:, 0].tolist()) for line in lines} == expected


def test_mixup_and_cutmix(tmp_path):
    """What they do to images, whose pixels are all the number of the image, they do to the targets."""
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8)
    for key in ("mixup", "cutmix"):
        config = config_of(tmp_path, **{key: "True"})
        mixed, targets = augmentation.make_mixer(config)(images, torch.arange(6))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(10.0))
        assert (mixed == images).any() == (key == "cutmix")
    assert augmentation.make_mixer(config_of(tmp_path)) is None


def test_preprocessing(tmp_path):
    images = torch.randint(256, (4, 3, 16, 12), dtype=torch.uint8)

    def preprocessed(key, value, images=images):
        return augmentation.preprocess(images, config_of(tmp_path, **{f"preprocess.{key}": value}))

    assert torch.equal(preprocessed("bits", "8"), images)
    assert torch.equal(preprocessed("bits", "2"), images // 64 * 64)
    grey = preprocessed("grayscale", "True")
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of BT.601
    assert grey.is_contiguous() and grey.shape == images.shape
    assert ((weights * images).sum(1, keepdim=True) - grey.float()).abs().max() <= 1.1
    ramps = torch.arange(0, 256, 16, dtype=torch.uint8).view(16, 1).expand(4, 3, 16, 12).clone()
    ramps[1:] = ramps[1:].flip(2)
    ramps[3] //= 2
    errors = [(preprocessed("jpeg_quality", str(q), ramps).float() - ramps).abs().mean((1, 2, 3)) for q in (90, 10)]
    assert (errors[0] < errors[1]).all() and errors[0].max() < 2 < errors[1].min() and errors[1].max() < 20
    file = io.BytesIO()
    Image.fromarray(ramps[1].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10)
    assert torch.equal(functional.pil_to_tensor(Image.open(file)), preprocessed("jpeg_quality", "10", ramps)[1])
    dot, line = torch.zeros(2, 1, 3, 15, 15, dtype=torch.uint8)
    dot[..., 7, 7] = line[..., 7] = 255
    for deviation in (1.0, 2.0):
        gauss = torch.exp(-((torch.arange(15) - 7.0) ** 2) / (2 * deviation**2))
        expected = 255 * torch.outer(gauss, gauss) / gauss.sum() ** 2
        blurred = preprocessed("blur", str(deviation), dot)
        torch.testing.assert_close(blurred.float(), expected.expand(1, 3, 15, 15), atol=1, rtol=0)
        blurred = preprocessed("blur", str(deviation), line)  # which is bright enough to show the ends of the kernel
        torch.testing.assert_close(blurred.float(), expected.sum(0).expand(1, 3, 15, 15), atol=0.6, rtol=0)
    large = torch.randint(256, (5, 3, 700, 700), dtype=torch.uint8)  # blurred in parts
    alone = [preprocessed("blur", "1.0", image[None]) for image in large]
    assert torch.equal(preprocessed("blur", "1.0", large), torch.cat(alone))
    one_by_one, steps = images, {"grayscale": "True", "blur": "1.0", "bits": "2", "jpeg_quality": "10"}
    for key, value in steps.items():
        one_by_one = preprocessed(key, value, one_by_one)
    config = config_of(tmp_path, **{f"preprocess.{key}": value for key, value in steps.items()})
    assert torch.equal(augmentation.preprocess(images, config), one_by_one)


def test_normalize_does_what_it_says(tmp_path):
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    plain = config_of(tmp_path)
    torch.testing.assert_close(augmentation.as_inputs(images, plain), torch.full((1, 3, 2, 2), 0.2))
    normal = config_of(tmp_path, **{"augmentation.normalize": "True"})
    torch.testing.assert_close(
        augmentation.as_inputs(images, normal)[0, :, 0, 0], torch.tensor([-1.4405, -1.4153, -1.2264]), atol=1e-4, rtol=0
    )


def test_the_digits_are_normalized_with_their_own_numbers():
    images = to_float(DATASETS["digits"].load(None, "train").images)
    assert (images.mean() - DATASETS["digits"].mean[0]).abs() < 1e-4
    assert (images.std() - DATASETS["digits"].std[0]).abs() < 1e-4


def test_enlarged_images_are_torchvisions(tmp_path):
    images = torch.rand(2, 3, 8, 6)
    assert torch.equal(augmentation.enlarge(images, config_of(tmp_path)), images)
    enlarged = augmentation.enlarge(images, config_of(tmp_path, enlarge="3"))
    torch.testing.assert_close(enlarged, functional.resize(images, [24, 18]))


def test_augment_does_what_the_config_says(tmp_path):
    images = torch.randint(1, 256, (60, 3, 8, 8), dtype=torch.uint8)
    off = {f"augmentation.{name}": "False" for name in ("random_crop", "random_horizontal_filp", "cutout")}
    plain = augmentation.augment(images, config_of(tmp_path, **off))
    assert torch.equal(plain, images / 255)
    for name in off:
        alone = augmentation.augment(images, config_of(tmp_path, **off | {name: "True"}))
        assert not torch.equal(alone, plain)
        flips = (alone == plain.flip(-1)).all(dim=(1, 2, 3)).any()
        assert flips == (name == "augmentation.random_horizontal_filp")
        assert (alone == 0).any() == (name != "augmentation.random_horizontal_filp")  # padding, or holes
    config = config_of(tmp_path, **off | {"augmentation.normalize": "True", "augmentation.cutout": "True"})
    assert (augmentation.augment(images, config) == 0).any()  # a hole is of the mean colour
