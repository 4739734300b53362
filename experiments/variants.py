"""Ways to train on a lock, by name, as keys of train.py."""

# As the paper does, a control, and what is known to weaken locks of this kind.
VARIANTS = {
    "plain": {},
    "control": {"train_on": "original"},
    "grayscale": {"preprocess.grayscale": True},
    "blur": {"preprocess.blur": 1.0},
    "bits2": {"preprocess.bits": 2},
    "jpeg10": {"preprocess.jpeg_quality": 10},
    "cutout": {"augmentation.cutout": True},
    "mixup": {"mixup": True},
    "cutmix": {"cutmix": True},
    "adversarial": {"adversarial.eps": 0.5},
}
# What costs accuracy even without a lock has a control, which tells how much.
VARIANTS |= {
    f"control_{name}": {**VARIANTS["control"], **keys}
    for name, keys in VARIANTS.items()
    if any(key.startswith(("preprocess.", "adversarial.")) for key in keys)
}
