"""What images go through before a model sees them: augmentation, a batch at a time and on its device, and mixing."""

import torch
import torch.nn.functional as F

from data import DATASETS, to_float


def random_crop(images, padding=4):
    """Each image [N, C, H, W] cut at its own random place out of its zero-padded self, at the same size."""
    n, channels, height, width = images.shape
    device = images.device
    rows = torch.randint(2 * padding + 1, (n, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * padding + 1, (n, 1), device=device) + torch.arange(width, device=device)
    padded = F.pad(images, [padding] * 4)
    n, channels = torch.arange(n, device=device), torch.arange(channels, device=device)
    return padded[n[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images):
    """Each image [N, C, H, W] mirrored left to right, or not, with equal chance."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(-1), images)


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


def mixup(inputs, targets, alpha):
    """Blend a batch with a shuffle of itself (Zhang et al., 2018).

    Returns the blend, the targets of its other part, and the weight of the first part; alpha 0 blends nothing.
    """
    weight = torch.distributions.Beta(alpha, alpha).sample().item() if alpha > 0 else 1.0
    order = torch.randperm(len(inputs), device=inputs.device)
    return weight * inputs + (1 - weight) * inputs[order], targets[order], weight


def as_inputs(images, config):
    """uint8 images [N, 3, H, W] as float inputs: pixels in [0, 1], or normalised where the config says so."""
    inputs = to_float(images)
    if config.augmentation.normalize:
        dataset = DATASETS[config.dataset]
        mean, std = (
            torch.tensor(values, device=inputs.device)[:, None, None] for values in (dataset.mean, dataset.std)
        )
        inputs = (inputs - mean) / std
    return inputs


def augment(images, config):
    """uint8 training images [N, 3, H, W] as float inputs, augmented as the config says."""
    options = config.augmentation
    if options.random_crop:
        images = random_crop(images)
    if options.random_horizontal_filp:
        images = random_flip(images)
    inputs = as_inputs(images, config)
    return cutout(inputs, options.holes, options.length) if options.cutout else inputs
