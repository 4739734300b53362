"""What images go through before a model sees them: once, as a data set, and in training a batch at a time."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from data import DATASETS, to_float


def random_crop(images, padding=4):
    """Each image [N, C, H, W] cut at its own random place out of its zero-padded self, at the same size."""
    n, _, height, width = images.shape
    rows, columns = (torch.randint(2 * padding + 1, (n,), device=images.device) for _ in range(2))
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # views [N, C, row, column, H, W]
    return windows[torch.arange(n, device=images.device), :, rows, columns]


def random_flip(images):
    """Each image [N, C, H, W] mirrored left to right, or not, with equal chance."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(-1), images)


def random_rotation(images, degrees):
    """Each image, float [N, C, H, W], turned around its centre by its own angle, of so many degrees at most.

    Each pixel takes the value of the nearest one; what comes from outside is 0.
    """
    n, _, height, width = images.shape
    angles = torch.empty(n, device=images.device).uniform_(-degrees, degrees).deg2rad()
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def color_jitter(images, strength):
    """Images, float [N, 3, H, W] in [0, 1], each with its own brightness, contrast and saturation.

    Each of the three is multiplied by a factor from 1 - strength to 1 + strength, one after the other in an order
    that is drawn for all images together.
    """
    degenerate = [  # what an image is with a factor of 0, as PIL.ImageEnhance calls it
        torch.zeros_like,
        lambda images: functional.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True).expand_as(images),
        lambda images: functional.rgb_to_grayscale(images).expand_as(images),
    ]
    for kind in torch.randperm(3).tolist():
        factors = torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(1 - strength, 1 + strength)
        images = torch.lerp(degenerate[kind](images), images, factors).clamp(0, 1)
    return images


def cutout(images, holes, length):
    """Each image [N, C, H, W] with square holes of zeros at random places, some cut off by an edge.

    Source: DeVries & Taylor, 2017; length is the side of a hole in pixels, and an odd one counts as the even below.
    """
    n, _, height, width = images.shape
    for _ in range(holes):
        inside = []
        for size in (height, width):
            start = torch.randint(size, (n, 1), device=images.device) - length // 2
            position = torch.arange(size, device=images.device)
            inside.append((position >= start) & (position < start + length // 2 * 2))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        images = images.masked_fill(hole, 0)
    return images


def make_mixer(config):
    """A function of float inputs [N, C, H, W] and targets int64 [N] that blends or splices each with another.

    What it returns as targets are probabilities [N, classes]. None where the config asks for neither mixup (Zhang et
    al., 2018) nor CutMix (Yun et al., 2019).
    """
    if config.cutmix:
        return v2.CutMix(alpha=config.cutmix_alpha, num_classes=config.num_classes)
    if config.mixup:
        return v2.MixUp(alpha=config.mixup_alpha, num_classes=config.num_classes)
    return None


def as_inputs(images, config):
    """uint8 images [N, 3, H, W] as float inputs: pixels in [0, 1], or normalised where the config says so."""
    inputs = to_float(images)
    if config.augmentation.normalize:
        mean, std = mean_and_std(config.dataset, inputs.device)
        inputs = (inputs - mean) / std
    return inputs


@lru_cache  # a GPU would wait for them to be copied to it, in every step
def mean_and_std(dataset, device):
    """The mean and the standard deviation of each colour in a data set, of pixels in [0, 1], as two [3, 1, 1]."""
    found = DATASETS[dataset]
    return [torch.tensor(values, device=device)[:, None, None] for values in (found.mean, found.std)]


def enlarge(inputs, config):
    """Inputs [N, C, H, W] enlarged as the config says, by bilinear interpolation."""
    return F.interpolate(inputs, scale_factor=config.enlarge, mode="bilinear") if config.enlarge > 1 else inputs


def augment(images, config):
    """uint8 training images [N, 3, H, W] as float inputs, augmented as the config says."""
    options = config.augmentation
    if options.random_crop:
        images = random_crop(images)
    if options.random_horizontal_filp:
        images = random_flip(images)
    inputs = as_inputs(images, config)
    return cutout(inputs, options.holes, options.length) if options.cutout else inputs


def compress(image, quality):
    """An image, uint8 [3, H, W], after JPEG of a quality from 1 to 100."""
    picture = functional.to_pil_image(image)  # of tensors, torchvision's jpeg is deprecated
    return functional.pil_to_tensor(functional.jpeg(picture, quality))


def preprocess(images, config):
    """The countermeasures of the config's preprocess section, applied to a whole data set, uint8 images [N, 3, H, W].

    In this order: grayscale; Gaussian blur, its kernel three standard deviations to each side; the highest bits of each
    channel alone; and the compression of JPEG.
    """
    options = config.preprocess
    if options.grayscale:
        images = functional.rgb_to_grayscale(images, num_output_channels=3)
    if options.blur > 0:
        size = 2 * math.ceil(3 * options.blur) + 1
        parts = images.split(max(1, 2**22 // images[0].numel()))  # a blur takes 60 times the memory of its images
        images = torch.cat([functional.gaussian_blur(part, size, options.blur) for part in parts])
    if options.bits < 8:
        images = functional.posterize(images, options.bits)
    if options.jpeg_quality > 0:
        images = torch.stack([compress(image, options.jpeg_quality) for image in images])
    return images.contiguous()
