"""The attack: projected gradient descent in an L2 ball around each image."""

import torch
import torch.nn.functional as F


def project(images, centers, eps):
    """The images [N, C, H, W] moved into the L2 balls of radius eps around their centers, then into [0, 1]."""
    delta = (images - centers).renorm(p=2, dim=0, maxnorm=eps)
    return (centers + delta).clamp(0, 1)


def gradient_of(losses, logits, x):
    """The gradient of every image's own loss [N, C, H, W]; losses [N] come from logits [N, classes], and those from x.

    As in loss scaling (Micikevicius et al., 2018), each image's gradient at its logits is scaled to norm 1 on its way
    through the network, and scaled back after it: in float16, that of a loss of 1e-5 would underflow to 0.
    """
    (logit_gradient,) = torch.autograd.grad(losses.sum(), logits)
    scale = logit_gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(logit_gradient.dtype).tiny)
    (gradient,) = torch.autograd.grad(logits, x, logit_gradient / scale)
    return gradient * scale[:, :, None, None]


def attack(classifier, images, targets, eps, step_size, steps, targeted=True, on_step=lambda: None):
    """PGD in an L2 ball (Madry et al., 2018), without random start; equals robustness' AttackerModel (use_best=True).

    classifier maps images [N, C, H, W] in [0, 1] to logits [N, classes]; targets int64 [N], or probabilities
    [N, classes]; eps and step_size in units of those pixels. Returns for each image the best of its steps + 1 iterates,
    the image itself and the last one included: that of the lowest cross-entropy to its target, or, where targeted is
    false and the attack leads away from the targets, of the highest. An iterate whose loss is NaN or infinity is never
    better than another. on_step is called after each evaluation.
    """
    x, best = images, images
    best_losses = torch.full((len(images),), torch.inf, device=images.device)
    for step in range(steps + 1):
        x = x.detach().requires_grad_()  # the last one too, or torch.compile would compile once more for it
        logits = classifier(x)
        losses = F.cross_entropy(logits, targets, reduction="none") * (1 if targeted else -1)
        better = (losses.detach() < best_losses) & losses.isfinite()
        best_losses = torch.where(better, losses.detach(), best_losses)
        best = torch.where(better[:, None, None, None], x.detach(), best)
        if step < steps:
            gradient = gradient_of(losses, logits, x)
            norms = gradient.flatten(1).norm(dim=1)[:, None, None, None]
            x = project(x.detach() - step_size * gradient / (norms + 1e-10), images, eps)
        on_step()
    return best
