"""The lock methods of the paper as data: target maps, which attacks a method needs, and how those are combined."""

from fractions import Fraction

import torch

from utils import UserError

# True class -> target class, in CIFAR-10's order. T2 keeps class 9 and T4 class 7, as the authors' do.
TARGET_MAPS = {
    "T1": (8, 3, 1, 0, 2, 4, 9, 6, 7, 5),
    "T2": (4, 2, 3, 5, 7, 1, 8, 0, 6, 9),
    "T3": (6, 2, 9, 1, 0, 7, 5, 3, 4, 8),
    "T4": (3, 9, 6, 1, 5, 8, 4, 7, 0, 2),
}
# The methods' parameters, as in the paper, in the order of a file's name
PARAMETERS = {"alpha": 0.5, "lambd": 0.5}
# The sides of a locked image, from left to right; each side is one attack, or a blend of two.
METHODS = {
    "basic": (("T1",),),
    "mixup": (("T1", "T2"),),
    "horiz": (("T1",), ("T2",)),
    "mixandcat": (("T1", "T2"), ("T3", "T4")),
}


def attacks_of(methods):
    """The names of the target maps that the methods need, each once."""
    return list(dict.fromkeys(name for method in methods for side in METHODS[method] for name in side))


def parameters_of(methods):
    """Which of the PARAMETERS any of the methods reads."""
    layouts = [METHODS[method] for method in methods]
    read = {
        "alpha": any(len(sides) > 1 for sides in layouts),
        "lambd": any(len(attacks) > 1 for sides in layouts for attacks in sides),
    }
    return [name for name in PARAMETERS if read[name]]


def given_parameters(args, methods):
    """The parameters that flags give, by name; raises UserError for one that none of the methods reads."""
    given = {name: value for name in PARAMETERS if (value := getattr(args, name)) is not None}
    read = parameters_of(methods)
    for name in given:
        if name not in read:
            raise UserError(f"--{name}: name a --lock-method that it is for, or leave it out")
    return given


def target_maps(num_classes, seed):
    """The target maps of a data set, by name, as lists of num_classes.

    Up to ten classes use the paper's, followed until they lead to a class that there is; more classes use random
    permutations that keep no class, the same for the same seed.
    """
    if num_classes > len(TARGET_MAPS["T1"]):
        generator = torch.Generator().manual_seed(seed)
        return {name: derangement(num_classes, generator) for name in TARGET_MAPS}
    maps = {}
    for name, target_map in TARGET_MAPS.items():
        maps[name] = list(target_map[:num_classes])
        while max(maps[name]) >= num_classes:
            maps[name] = [target if target < num_classes else target_map[target] for target in maps[name]]
    return maps


def derangement(n, generator):
    """A random permutation of 0..n-1, as a list, that keeps nothing in its place."""
    while True:
        permutation = torch.randperm(n, generator=generator)
        if (permutation != torch.arange(n)).all():
            return permutation.tolist()


def combine(attacked, method, alpha=PARAMETERS["alpha"], lambd=PARAMETERS["lambd"]):
    """Put the attacks of a method together.

    attacked maps the name of a target map to images [N, C, H, W]; alpha and lambd from 0 to 1. A blend is lambd of its
    first attack and 1 - lambd of its second; of two sides, the left takes the columns [0, alpha * W), rounded down.
    """
    sides = [
        attacked[names[0]] if len(names) == 1 else lambd * attacked[names[0]] + (1 - lambd) * attacked[names[1]]
        for names in METHODS[method]
    ]
    if len(sides) == 1:
        return sides[0]
    column = int(Fraction(str(alpha)) * sides[0].shape[-1])  # in floats, 0.29 * 100 is less than 29
    return torch.cat([sides[0][..., :column], sides[1][..., column:]], dim=-1)
