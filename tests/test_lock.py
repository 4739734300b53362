"""What lock.py makes of images: target maps, methods, measurements, and the report."""

import argparse
import os
import pickle
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import lock
import lockfiles
import shards
import utils
from data import to_float, to_uint8
from methods import TARGET_MAPS, combine, target_maps
from models import MODELS
from ranks import Ranks
from tests.conftest import lock_flags, small_classifier
from utils import UserError


def test_target_maps():
    """The maps as the authors' code gives them, and what is known of them."""
    t1, t2, t3, t4 = TARGET_MAPS.values()
    digits = ["".join(map(str, target_map)) for target_map in (t1, t2, t3, t4)]
    assert digits == ["8310249675", "4235718069", "6291075348", "3961584702"]
    assert (t1[0], t1[9], t4[4]) == (8, 5, 5)
    assert [sorted(target_map) for target_map in (t1, t2, t3, t4)] == [list(range(10))] * 4
    fixed = {name: [c for c in range(10) if target_map[c] == c] for name, target_map in TARGET_MAPS.items()}
    assert fixed == {"T1": [], "T2": [9], "T3": [], "T4": [7]}
    assert [c for c in range(10) if t2[c] == t3[c]] == [1]
    assert [c for c in range(10) if t3[c] == t4[c]] == [3]


@pytest.mark.parametrize("classes", range(2, 10))
def test_target_maps_of_fewer_classes_follow_the_papers(classes):
    """Each class goes to the first class that there is, on the way that the paper's map leads."""
    maps = target_maps(classes, seed=0)
    for name, target_map in maps.items():
        assert sorted(target_map) == list(range(classes))
        for label, target in enumerate(target_map):
            way = [TARGET_MAPS[name][label]]
            while way[-1] >= classes:
                way.append(TARGET_MAPS[name][way[-1]])
            assert target == way[-1]
    assert all(target != label for label, target in enumerate(maps["T1"]))
    assert target_maps(10, seed=0) == {name: list(paper) for name, paper in TARGET_MAPS.items()}


@pytest.mark.parametrize("classes", [11, 17])
def test_target_maps_of_more_classes_are_derangements_drawn_from_the_seed(classes):
    maps = target_maps(classes, seed=5)
    for target_map in maps.values():
        assert sorted(target_map) == list(range(classes))
        assert all(target != label for label, target in enumerate(target_map))
    assert len({tuple(target_map) for target_map in maps.values()}) == 4
    assert target_maps(classes, seed=5) == maps != target_maps(classes, seed=6)


def test_combine_equals_slicing_by_hand():
    a = {name: torch.rand(2, 3, 8, 10) for name in TARGET_MAPS}
    a1, a2, a3, a4 = a.values()
    assert torch.equal(combine(a, "basic"), a1)
    assert torch.allclose(combine(a, "mixup", lambd=0.3), 0.3 * a1 + 0.7 * a2)
    horiz = combine(a, "horiz", alpha=0.25)
    assert torch.equal(horiz[..., :2], a1[..., :2]) and torch.equal(horiz[..., 2:], a2[..., 2:])
    both = combine(a, "mixandcat", alpha=0.7, lambd=0.4)
    assert torch.allclose(both[..., :7], (0.4 * a1 + 0.6 * a2)[..., :7])
    assert torch.allclose(both[..., 7:], (0.4 * a3 + 0.6 * a4)[..., 7:])
    assert torch.equal(combine(a, "horiz", alpha=0), a2) and torch.equal(combine(a, "horiz", alpha=1), a1)


@pytest.mark.parametrize(
    "method, alpha, lambd, suffix, parameters",
    [
        ("basic", 0.3, 0.3, "basic", {}),
        ("mixup", 0.5, 0.29, "29_mixup", {"lambd": 0.29}),  # int(100 * 0.29) is 28
        ("horiz", 0.125, 0.5, "12.5_horiz", {"alpha": 0.125}),
        ("mixandcat", 0.5, 0.5, "mixandcat", {}),
        ("mixandcat", 0.3, 0.5, "30_50_mixandcat", {"alpha": 0.3, "lambd": 0.5}),
        ("mixandcat", 0.5, 0.3, "50_30_mixandcat", {"alpha": 0.5, "lambd": 0.3}),
    ],
)
def test_suffix(method, alpha, lambd, suffix, parameters):
    assert lockfiles.lock_suffix(method, alpha, lambd) == suffix
    assert lockfiles.parse_suffix(suffix) == (method, parameters)


@pytest.mark.parametrize(
    "suffix",
    ["old_basic", "50_30_20_mixup", "1e400_mixup", "050_horiz", "mixup", "x", "", "101_mixup", "-5_horiz", "nan_mixup"],
)
def test_a_suffix_that_no_lock_has(suffix):
    assert lockfiles.parse_suffix(suffix) is None


def test_suffixes_of_different_locks_differ():
    assert lockfiles.lock_suffix("mixup", lambd=0.333333333) != lockfiles.lock_suffix("mixup", lambd=0.3333334)
    assert lockfiles.lock_suffix("mixup", lambd=utils.number(float, 0)("-0.0")) == "0_mixup"


@pytest.mark.parametrize("method, flag", [("horiz", "--alpha"), ("mixup", "--lambd")])
@pytest.mark.parametrize("value", ["0", "1"])
def test_a_share_can_be_nothing_or_all(method, flag, value, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lock.py", "--lock-method", method, flag, value])
    assert list(lock.suffixes_of(lock.parse_arguments()).values()) == [f"{100 * int(value)}_{method}"]


class Fixed(nn.Module):
    """Classifies by the mean of the pixels: images of grey level (c + 0.5) / 10 are of class c."""

    def forward(self, images):
        return -(images.mean(dim=(1, 2, 3))[:, None] * 10 - torch.arange(10) - 0.5).abs()


def lock_by(method, folder, classifier, images, labels, split, **flags):
    """Lock a split in batches, by way of shards; returns the locked images, and what was measured."""
    flags = {"eps": 0.5, "attack_lr": 0.1, "alpha": 0.5, "lambd": 0.5, **flags}
    paths = lockfiles.Paths(folder, method)
    paths.partial.mkdir()
    args, maps = argparse.Namespace(**flags), target_maps(10, seed=0)
    device = torch.device("cpu")
    lock_batch = partial(lock.lock_batch, classifier, classifier, maps, args)
    lock.lock_split(lock_batch, images, labels, split, {method: paths}, args, device, Ranks())
    locked, measured, made_with = shards.read_shards(paths, split, range(0, len(images), args.batch_size))
    assert {one["device"][:3] for one in made_with} == {"CPU"}
    return locked, measured


def test_what_is_left_to_do_is_what_rank_0_says(tmp_path):
    """The others may be on machines that have no shards."""
    seen, args = [], argparse.Namespace(batch_size=4, attack_steps=1)
    ranks = argparse.Namespace(rank=1, world_size=2, say=print, gather=lambda _: None, abort_if_any=lambda _: None)
    ranks.on_rank0 = lambda *_: {4: ["basic"], 8: ["basic"]}
    images, labels, locks = torch.zeros(12, 3, 8, 8), torch.arange(12), {"basic": lockfiles.Paths(tmp_path, "basic")}

    def lock_batch(images, labels, *rest):
        seen.append(labels.tolist())

    lock.lock_split(lock_batch, images, labels, "train", locks, args, torch.device("cpu"), ranks)
    assert seen == [[8, 9, 10, 11]]


def test_targets_come_from_labels_on_train_and_from_predictions_on_test(monkeypatch, tmp_path):
    """The classes below are wrong on purpose: labels and predictions never agree."""
    aimed_at = []
    monkeypatch.setattr(lock, "attack", lambda model, images, targets, *rest, **_: aimed_at.append(targets) or images)
    predicted = torch.arange(10)
    images = ((predicted + 0.5) / 10 * 255).round().to(torch.uint8)[:, None, None, None].expand(10, 3, 16, 16)
    labels = (predicted + 3) % 10
    for split, classes in {"train": labels, "test": predicted}.items():
        aimed_at.clear()
        (tmp_path / split).mkdir()
        _, measured = lock_by("horiz", tmp_path / split, Fixed(), images, labels, split, attack_steps=1, batch_size=4)
        t1, t2 = (torch.tensor(TARGET_MAPS[name]) for name in ("T1", "T2"))
        assert torch.equal(torch.cat(aimed_at[0::2]), t1[classes])
        assert torch.equal(torch.cat(aimed_at[1::2]), t2[classes])
        assert measured["base"].sum() == 0


def test_a_batch_is_attacked_combined_and_rounded_as_its_flags_say(tmp_path, capsys):
    classifier, images = small_classifier(), torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(5)
    flags = {"eps": 0.8, "attack_lr": 0.3, "attack_steps": 4, "alpha": 0.25, "lambd": 0.7, "batch_size": 5}
    locked, measured = lock_by("mixandcat", tmp_path, classifier, images, labels, "train", **flags)
    assert re.search(r"100%\|[^%]*$", capsys.readouterr().err)  # where the progress ends
    attacked = {
        name: lock.attack(classifier, to_float(images), torch.tensor(target_map)[labels], 0.8, 0.3, 4)
        for name, target_map in TARGET_MAPS.items()
    }
    assert torch.equal(locked, to_uint8(combine(attacked, "mixandcat", 0.25, 0.7)))
    for name, target_map in TARGET_MAPS.items():
        reached = classifier(attacked[name]).argmax(1) == torch.tensor(target_map)[labels]
        assert torch.equal(measured[name], reached.float())
    targets = torch.stack([torch.tensor(target_map)[labels] for target_map in TARGET_MAPS.values()])
    for name, values in lock.measure(classifier, images, locked, labels, targets).items():
        assert torch.equal(measured[name], values.float())


def test_report():
    measured = {
        "base": torch.tensor([1.0, 1, 1, 0]), "T1": torch.tensor([1.0, 1, 0, 0]),
        "to_target": torch.tensor([1.0, 0, 0, 0]), "to_true": torch.zeros(4),
        "l2": torch.tensor([0, 0.3, 0.4, 0.5]), "ssim": torch.tensor([1, 0.9, 0.9, 0.8]),
        "psnr": torch.tensor([torch.inf, 40, 41, 42]),
    }  # fmt: skip
    text = " ".join(lock.report(shards.summarize(measured, "basic")).split())
    assert text == (
        "base classifier, on the originals 75.00% right attacks that reach their target T1 50.00% "
        "locked images, sent to a target 25.00%, still given the true label 0.00% "
        "L2 distance to the originals mean 0.300, largest 0.500 "
        "likeness PSNR 41.00 dB, SSIM 0.9000, 1 images unchanged "
        "WEAK: many attacks miss their target: raise --eps and --attack-lr, or --attack-steps"
    )
    nine_of_ten = {name: torch.tensor([0.0] + [1.0] * 9) for name in measured}
    for to_true, weak in {0: False, 2: False, 3: True}.items():
        tried = {**nine_of_ten, "to_true": torch.arange(10.0) < to_true}
        assert bool(list(lock.weaknesses(shards.summarize(tried, "basic")))) == weak
    eight_of_ten = {**nine_of_ten, "to_true": torch.zeros(10), "T1": torch.arange(10.0) < 8}
    assert "miss their target" in " ".join(lock.weaknesses(shards.summarize(eight_of_ten, "basic")))
    strong = {**measured, "T1": torch.ones(4)}
    assert not list(lock.weaknesses(shards.summarize(strong, "basic")))
    blind = {**strong, "base": torch.tensor([1.0, 0, 0, 0])}
    assert "wrong on most originals" in " ".join(lock.weaknesses(shards.summarize(blind, "basic")))
    weak = {**strong, "to_true": torch.tensor([1.0, 1, 0, 0])}
    line = " ".join(lock.weaknesses(shards.summarize(weak, "basic")))
    assert "raise --eps" in line and "train a better base classifier" in line
    one_misses = {**measured, "T2": torch.ones(4)}
    assert "miss their target" in " ".join(lock.weaknesses(shards.summarize(one_misses, "mixup")))
    unchanged = {**measured, "l2": torch.zeros(4)}
    assert "PSNR infinite" in lock.report(shards.summarize(unchanged, "basic"))
    weak = {**weak, "T2": torch.ones(4)}
    assert "lock by basic" in " ".join(lock.weaknesses(shards.summarize(weak, "mixup")))


def test_measurements():
    images = torch.randint(50, 200, (3, 3, 16, 16), dtype=torch.uint8)
    locked = images.clone()
    locked[1, 0, 0, 0] += 51  # 0.2 in one of 768 values
    classifier = small_classifier()
    predictions = classifier(locked / 255).argmax(1)
    targets = torch.stack([predictions, (predictions + 1) % 10])
    measured = lock.measure(classifier, images, locked, (predictions + 1) % 10, targets)
    assert measured["to_target"].all() and not measured["to_true"].any()
    torch.testing.assert_close(measured["l2"], torch.tensor([0, 0.2, 0]))
    assert measured["psnr"][0].isinf()
    torch.testing.assert_close(measured["psnr"][1], 10 * torch.log10(torch.tensor(768 / 0.04)))
    assert measured["ssim"][0] == 1 and measured["ssim"][1] < 1
    dark, light = (torch.full((1, 3, 16, 16), grey, dtype=torch.uint8) for grey in (51, 204))  # 0.2 and 0.8
    (ssim,) = lock.measure(classifier, dark, light, predictions[:1], targets[:, :1])["ssim"]
    assert ssim.item() == pytest.approx((2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4), rel=1e-4)
    measured = lock.measure(Fixed(), dark - 13, light + 13, torch.tensor([8]), torch.tensor([[1]]))
    assert measured["to_true"].all() and not measured["to_target"].any()  # as the one that is delivered is seen


@pytest.mark.skipif("CIFAR10_ROOT" not in os.environ, reason="CIFAR10_ROOT names no folder with CIFAR-10")
@pytest.mark.parametrize("split", data.SPLITS)
def test_locked_cifar10_is_aligned_with_the_batch_files(split, tmp_path):
    """The last images of a split, against the bytes of its last batch file."""
    name = {"train": "data_batch_5", "test": "test_batch"}[split]
    batch = pickle.loads(Path(os.environ["CIFAR10_ROOT"], "cifar-10-batches-py", name).read_bytes(), encoding="bytes")
    images, labels, *_ = data.load_cifar10(os.environ["CIFAR10_ROOT"], split)
    assert len(images) == {"train": 50_000, "test": 10_000}[split]
    last = images[-16:], labels[-16:]
    locked, _ = lock_by("basic", tmp_path, small_classifier(), *last, split, attack_steps=3, batch_size=8)
    originals = torch.tensor(batch[b"data"][-16:]).view(16, 3, 32, 32)
    assert labels[-16:].tolist() == batch[b"labels"][-16:]
    distances = (to_float(locked) - to_float(originals)).flatten(1).norm(dim=1)
    assert 0 < distances.min() and distances.max() < 0.5 + 0.5 / 255 * 3072**0.5


def test_larger_images_are_attacked_in_smaller_batches():
    cpu = torch.device("cpu")
    sizes = [lock.default_batch_size(torch.empty(1, 3, size, 2 * size), cpu) for size in (16, 32, 64, 500)]
    assert sizes == [256, 64, 16, 1]


@pytest.mark.parametrize("unit", ["AMX", None])
def test_a_long_lock_is_compiled_where_that_is_faster(unit, monkeypatch):
    """Long are a million images through the network: 10,000 in both splits, 100 times each."""
    monkeypatch.setattr(utils, "bfloat16_unit", lambda: unit)
    splits = {
        split: data.Split(torch.empty(count, 3, 32, 32, device="meta"), torch.zeros(count), [], [])
        for split, count in {"train": 8000, "test": 2000}.items()
    }
    flags = {"overwrite": True, "precision": "auto", "compile": "auto", "batch_size": None}

    def choice(**changes):
        args = argparse.Namespace(**flags | {"attack_steps": 99} | changes)
        return lock.choose(args, {}, {}, nn.Conv2d(3, 10, 3), splits, torch.device("cpu"))[0]

    precision, compile, _ = choice().values()
    assert (precision, compile) == (("bfloat16", "always") if unit else ("float32", "never"))
    for changes in {"attack_steps": 98}, {"precision": "float32"}, {"compile": "never"}:
        assert choice(**changes)["compile"] == "never"
    assert choice(attack_steps=1, compile="always")["compile"] == "always"


@pytest.mark.parametrize(
    "features, unit",
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX"),
        ({"amx_bf16": False, "avx512_bf16": True}, "AVX512_BF16"),
        ({"amx_bf16": False, "avx512_f": True}, None),
    ],
)
def test_the_precision_on_a_cpu(features, unit, monkeypatch):
    """Some CPUs multiply matrices of bfloat16, which helps no model of depthwise convolutions or attention."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert utils.bfloat16_unit() == unit
    device, _ = utils.set_up_device()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32

    def picked(arch, name="auto"):
        return utils.pick_precision(name, device, MODELS[arch]())[0]

    assert picked("vgg11") == ("bfloat16" if unit else "float32")
    assert picked("mobilenet_v2") == picked("vit") == "float32"
    assert [picked("vgg11", name) for name in utils.PRECISIONS] == list(utils.PRECISIONS)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert picked("vgg11") == "float32"


@pytest.mark.parametrize(
    "capability, picked",
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((7, 0), "float16"), ((6, 1), "float32")],
)
def test_the_precision_on_a_gpu(capability, picked, monkeypatch):
    """In what its tensor cores multiply: they are of Volta and later, those for bfloat16 of Ampere and later."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.pick_precision("auto", torch.device("cuda", 0), MODELS["vit"]())[0] == picked


@pytest.mark.parametrize(
    "choice, picked",
    [
        ({"name": "auto", "faster": True, "passes": 10**6}, "always"),
        ({"name": "auto", "faster": True, "passes": 10**6 - 1}, "never"),
        ({"name": "auto", "faster": False, "passes": 10**9}, "never"),
        ({"name": "auto", "faster": True, "passes": 10**9, "begun": "never"}, "never"),
        ({"name": "auto", "faster": False, "passes": 1, "begun": "always"}, "always"),
        ({"name": "always", "faster": False, "passes": 1, "begun": "never"}, "always"),
    ],
)
def test_what_auto_means_for_compile(choice, picked):
    assert utils.pick_compile(**choice) == picked


def test_alpha_is_rounded_down():
    a = {name: torch.rand(1, 3, 2, 10) for name in ("T1", "T2")}
    both = combine(a, "horiz", alpha=0.29)
    assert torch.equal(both[..., :2], a["T1"][..., :2]) and torch.equal(both[..., 2:], a["T2"][..., 2:])
    wide = combine({"T1": torch.ones(1, 1, 1, 100), "T2": torch.zeros(1, 1, 1, 100)}, "horiz", alpha=0.29)
    assert wide.sum() == 29  # though in floats 0.29 * 100 is less


class Constant(nn.Module):
    """Sees one class in every image."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, images):
        return F.one_hot(torch.full((len(images),), self.seen), 10) + 0 * images.sum()


def measured_of(classifier, folded):
    """What lock_batch measures of ten images, one of each class, locked by basic."""
    args = argparse.Namespace(eps=0.5, attack_lr=0.1, attack_steps=1, alpha=0.5, lambd=0.5, precision="bfloat16")
    images, labels = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8), torch.arange(10)
    constants = classifier, folded, target_maps(10, 0), args
    return lock.lock_batch(*constants, images, labels, "test", ["basic"], lambda: None)["basic"][1]


def test_the_classifier_and_not_the_folded_one_predicts_and_measures():
    measured = measured_of(Constant(3), Constant(TARGET_MAPS["T1"][3]))
    true = F.one_hot(torch.tensor(3), 10).float()
    assert torch.equal(measured["base"], true) and torch.equal(measured["to_true"], true)
    assert not measured["T1"].any() and not measured["to_target"].any()


def test_a_folded_classifier_that_gives_nan_is_not_attacked(tmp_path):
    folded = small_classifier()
    folded[7].bias.data[0] = torch.nan  # one logit of ten
    with pytest.raises(UserError, match="gives NaN or infinity: choose --precision float32, or train it again"):
        measured_of(Constant(3), folded)
    images, labels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=int)
    with pytest.raises(UserError, match="gives NaN or infinity: train it again"):  # which ends the lock
        flags = {"attack_steps": 1, "batch_size": 2, "precision": "float32"}
        lock_by("basic", tmp_path, folded, images, labels, "test", **flags)


def test_the_progress_ends_at_the_last_image(place, command, tmp_path):
    """And not a little beyond, of which tqdm warns: in floating point, fifteen fifths are more than three."""
    assert sum([1 / 5] * 15) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        command(lock.main, *lock_flags(place, tmp_path), "--subset", 3, "--batch-size", 1, "--attack-steps", 4)


def test_a_lock_computes_in_its_precision_and_compiles_its_batches(place, command, monkeypatch, tmp_path):
    made, folded = [], lock.FoldedClassifier
    monkeypatch.setattr(lock, "FoldedClassifier", lambda *args: made.append(args[1]) or folded(*args))
    monkeypatch.setattr(lock, "Compiled", lambda forward, size, say: made.append(size) or forward)
    measuring, lock_batch = [], lock.lock_batch
    monkeypatch.setattr(lock, "lock_batch", lambda *args: measuring.append(args[0]) or lock_batch(*args))
    flags = [*lock_flags(place, tmp_path), "--batch-size", 500, "--precision", "bfloat16", "--compile", "always"]
    command(lock.main, *flags)
    assert made == [torch.bfloat16, 96]
    weights = [parameter for classifier in measuring for parameter in classifier.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.dim() == 4)
