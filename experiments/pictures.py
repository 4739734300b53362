"""Pictures of what experiments found: the curves of their runs, and the images of each lock."""

import json
import math
from textwrap import wrap

import numpy as np
from matplotlib import colormaps, image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import utils
from experiments.tables import control_of, lock_settings, tell_apart
from utils import UserError


def panels_of(groups):
    """Yields (title, groups) for each panel of a picture of curves: the groups of one model, training and lock.

    A control that is drawn beside what it controls has no panel of its own.
    """
    controls = filter(None, (control_of(group[0], groups) for group in groups))
    used, panels = [kind_of(control) for control in controls], {}
    for group in groups:
        first = group[0]
        if kind_of(group) not in used:
            model = "{architecture} on {dataset}, {label}".format(**first)
            key = model, first["lock_name"], first["epochs"], json.dumps(first["training"])
            panels.setdefault(key, []).append(group)
    names = [key[:3] for key in panels]
    differences = tell_apart(names, [members[0][0]["training"] for members in panels.values()])
    for (model, lock, _), members, difference in zip(names, panels.values(), differences):
        title = "\n".join(wrap(", ".join(filter(None, [model, difference])), 52))
        yield f"{title}\nlock: {lock}", members


def kind_of(group):
    """What makes a group another control, whatever the lock that it was tested on: its training and precision."""
    return group[0]["training"], group[0]["config"].get("precision")


def plot_curves(groups, path):
    """Write a picture of the curves: a panel for each model, training and lock, a colour for each method, and in grey
    what a control of that training, if there is one, comes to on original images. Other controls have panels, too.

    A line is the mean of the seeds, and the band around it goes from the least to the largest.
    """
    panels = list(panels_of(groups))
    methods = dict.fromkeys(group[0]["method"] for _, members in panels for group in members)
    palette = [f"C{index}" for index in range(10)]
    if len(methods) > len(palette):
        palette = colormaps["turbo"](np.linspace(0, 1, len(methods)))
    colors = dict(zip(methods, palette))
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(4 * columns, 6.5), 3 * rows + 0.5), layout="constrained")
    figure.suptitle("Accuracy on locked test images (solid) and on original ones (dashed), %")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    lines = {}
    for axis, (title, members) in zip(axes.flat, panels):
        axis.set_title(title, fontsize="small", parse_math=False)
        axis.set(xlabel=f"epoch, of {members[0][0]['epochs']}", ylim=(0, 100))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        control = control_of(members[0][0], groups)
        if control:
            lines["control: trained on original images"] = draw(axis, control, "orig_acc", "grey", "--")
        for group in members:
            draw(axis, group, "orig_acc", colors[group[0]["method"]], "--")
            lines[group[0]["method"]] = draw(axis, group, "locked_acc", colors[group[0]["method"]], "-")
    legend = figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    with utils.naming(path):
        figure.savefig(path, dpi=100)


def draw(axis, results, key, color, style):
    """Draw what results have of a key at each epoch that all of them evaluated; returns the line."""
    curves = [result["curves"][key] for result in results]
    epochs = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])  # [results, epochs]
    marker = "." if len(epochs) == 1 else None
    axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2)
    return axis.plot(epochs, values.mean(0), style, color=color, marker=marker)[0]


def images_by_lock(groups):
    """What the runs of each lock saw, by the name of the lock, as pictures [height, width, colours] of rows of images:
    the originals, unless they are those of the lock above, locked images, and the difference.

    A run that saw them preprocessed counts only where there is no other. Raises UserError for a damaged picture.
    """
    locks, found, originals = {}, {}, None
    for group in sorted(groups, key=lambda group: any(key.startswith("preprocess.") for key in group[0]["settings"])):
        name = "{dataset}, {method} ({lock_name})".format(**group[0])
        settings = lock_settings(group[0])
        file = next((file for result in group if (file := result["folder"] / "images.png").exists()), None)
        if file:
            locks.setdefault(json.dumps([name, settings], sort_keys=True), (name, settings, file))
    locks = list(locks.values())
    differences = tell_apart([name for name, _, _ in locks], [settings for _, settings, _ in locks])
    for (name, _, file), difference in zip(locks, differences):
        with utils.telling_damage(lambda _: f"{file}: damaged; delete it, and train.py --resume writes it again"):
            rows = image.imread(file)
        height = len(rows) // 3
        repeated = originals is not None and np.array_equal(originals, rows[:height])
        originals = rows[:height]
        found[", ".join(filter(None, [name, difference]))] = rows[height:] if repeated else rows
    return found


def plot_images(groups, path):
    """Write a picture of the images that the runs of each lock saw."""
    found = images_by_lock(groups)
    if not found:
        raise UserError("--images: there is no images.png beside any result.json; train.py writes it")
    heights = [len(rows) / rows.shape[1] for rows in found.values()]
    figure = Figure(figsize=(10, 10 * sum(heights) + 0.3 * len(heights) + 0.4), layout="constrained")
    figure.suptitle("Originals; for each lock, its images and ten times the difference")
    axes = figure.subplots(len(found), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, found.items()):
        axis.set_axis_off()
        axis.set_title(title, loc="left", fontsize="medium", parse_math=False)
        axis.imshow(rows)
    with utils.naming(path):
        figure.savefig(path, dpi=100)
