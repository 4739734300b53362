"""Many runs at once, and what is gathered of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

import runs
import utils
from config import CONFIG
from experiments import __main__ as study
from experiments import pictures, tables
from experiments.variants import VARIANTS
from methods import METHODS
from models import MODELS
from tests.conftest import ROOT, config_of
from utils import UserError, flatten

MEASURED = ROOT / "results"
RESULT = {
    "architecture": "vgg19", "dataset": "cifar10", "lock_method": "basic", "name": "", "seed": 0, "epochs": 2,
    "locked_acc": 93.0, "orig_acc": 28.0,
    "config": {"epochs": 2, "seed": 0}, "lock": None,
    "history": [{"epoch": epoch, "locked_acc": 90.0 + epoch, "orig_acc": 30.0 - epoch} for epoch in (1, 2)],
}  # fmt: skip


def lock_of(**settings):
    """What of a manifest is looked at."""
    usual = {"eps": 0.5, "attack_steps": 100, "subset": None, "arch": "resnet50", "base_sha256": "0123456789"}
    settings = usual | {"original_sha256": {"train": "0", "test": "0"}} | settings
    return {"settings": settings, "report": {"train": {"images": settings["subset"] or 50000}}}


@pytest.fixture
def results(tmp_path):
    """Results of two seeds, and of another method, variant, data set, config and lock."""
    others = [
        {"seed": 1, "orig_acc": 30.0},
        {"lock_method": "horiz", "alpha": 0.3},
        {"name": "jpeg10"},
        {"name": "a$x_\n{|$"},
        {"dataset": "digits"},
        {"config": {"epochs": 2, "seed": 0, "batch_size": 8}},
        {"config": {"epochs": 2, "seed": 0, "locked_train_image": "other"}},
        {"config": {"epochs": 2, "seed": 0, "eval_freq": 5}},
        {"config": {"epochs": 2, "seed": 0, "train_on": "original"}},
        {"config": {"epochs": 2, "seed": 0, "subset": 9}},
        {"config": {"epochs": 2, "seed": 0, "enlarge": 2}},
        {"lock": lock_of(eps=2.0)},
        {"lock": lock_of(subset=64)},
        {"lock": lock_of(attack_steps=9)},
        {"dataset": "digits"},  # a copy
        {"seed": 1, "config": {"batch_size": 8, "seed": 1, "epochs": 2}},  # the keys of one above, reordered
    ]
    for index, other in enumerate([{}, *others]):  # only the second is of the same kind as the first
        folder = tmp_path / "runs" / f"{index:x}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(RESULT | other))
    return tmp_path / "runs"


def test_the_table_puts_seeds_together_beside_the_papers_numbers(results, command, capsys, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "runs").symlink_to(results)
    (tmp_path / "linked" / "again").symlink_to(tmp_path)
    command(study.main, "--work-path", tmp_path / "linked", results / "0", "--plot", tmp_path / "curves.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| data set | model | method | variant | lock | epochs | runs | original, % | best original, % | locked, % "
        "| control, original / locked | paper, original / locked |"
    )
    assert lines[2:] == [
        "| cifar10 | vgg19 | basic | plain | no manifest | 2 | 2 | 29.00 ± 1.41 | 29.00 ± 0.00 | 93.00 ± 0.00 "
        "| 28.00 / 93.00 | 28.77 / 93.58 |",
        "| cifar10 | vgg19 | basic | plain, batch_size 8 | no manifest | 2 | 2 | 28.00 ± 0.00 | 29.00 ± 0.00 "
        "| 93.00 ± 0.00 |  | 28.77 / 93.58 |",
        "| cifar10 | vgg19 | basic | plain, locked_train_image other | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 "
        "| 28.00 | 28.77 / 93.58 |",
        "| cifar10 | vgg19 | basic | plain, eval_freq 5 | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 "
        "| 28.00 / 93.00 | 28.77 / 93.58 |",
        "| cifar10 | vgg19 | basic | plain, train_on original | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 |  |  |",
        "| cifar10 | vgg19 | basic | plain, subset 9 | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 |  |  |",
        "| cifar10 | vgg19 | basic | plain, enlarge 2 | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 |  |  |",
        "| cifar10 | vgg19 | basic | plain | resnet50 0123456, eps 2, 100 steps, 50000 images | 2 | 1 | 28.00 | 29.00 "
        "| 93.00 |  |  |",
        "| cifar10 | vgg19 | basic | plain | resnet50 0123456, eps 0.5, 100 steps, 64 images | 2 | 1 | 28.00 | 29.00 "
        "| 93.00 |  |  |",
        "| cifar10 | vgg19 | basic | plain | resnet50 0123456, eps 0.5, 9 steps, 50000 images | 2 | 1 | 28.00 | 29.00 "
        "| 93.00 |  | 28.77 / 93.58 |",
        "| cifar10 | vgg19 | basic | jpeg10 | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 | 28.00 / 93.00 |  |",
        "| cifar10 | vgg19 | basic | a$x_ {/$ | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 | 28.00 / 93.00 |  |",
        "| cifar10 | vgg19 | horiz alpha 0.3 | plain | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 "
        "| 28.00 / 93.00 |  |",
        "| digits | vgg19 | basic | plain | no manifest | 2 | 1 | 28.00 | 29.00 | 93.00 |  |  |",
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_who_reads_the_table_may_end_early(results, tmp_path, monkeypatch, command, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        command(study.main, "--work-path", results, "--plot", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() and not capsys.readouterr().err


def test_what_is_drawn(results, monkeypatch, tmp_path):
    """In each panel a lock's locked curve, solid, and its original one, dashed, over the control's in grey."""
    figures = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    pictures.plot_curves(tables.gather([results]), tmp_path / "curves.png")
    (panel,) = [axis for axis in figures[0].axes if "jpeg10" in axis.get_title()]
    assert panel.get_xlabel() == "epoch, of 2" and not any("train_on" in axis.get_title() for axis in figures[0].axes)
    assert [(line.get_linestyle(), line.get_color(), list(line.get_ydata())) for line in panel.lines] == [
        ("--", "grey", [29, 28]), ("--", "C0", [29, 28]), ("-", "C0", [91, 92])
    ]  # fmt: skip
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_title()]
    assert len(titles) == len(set(titles)) == 12  # horiz shares that of basic; the control has none
    (panel,) = [axis for axis in figures[0].axes if axis.get_title() == "vgg19 on cifar10, plain\nlock: no manifest"]
    assert [line.get_color() for line in panel.lines] == ["grey", "C0", "C0", "C1", "C1"]


def test_each_of_many_methods_has_a_colour_of_its_own(monkeypatch, tmp_path):
    figures, changes = [], [{"lock_method": "horiz", "alpha": alpha / 10} for alpha in range(1, 12)]
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    pictures.plot_curves(gather_changed(tmp_path, *changes), tmp_path / "curves.png")
    (panel,) = figures[0].axes
    assert len({tuple(line.get_color()) for line in panel.lines}) == 11


def test_other_trainings_have_a_panel_of_their_own(monkeypatch, tmp_path):
    """Also where no row of the table reads as theirs: of each method there is one."""
    figures, changes = [], [{}, {"lock_method": "horiz", "config": {"epochs": 2, "seed": 0, "batch_size": 8}}]
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    for change in changes:
        folder = tmp_path / change.get("lock_method", "basic")
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(RESULT | change))
    pictures.plot_curves(tables.gather([tmp_path]), tmp_path / "curves.png")
    titles = [axis.get_title().partition("\n")[0] for axis in figures[0].axes]
    assert titles == ["vgg19 on cifar10, plain, batch_size 128", "vgg19 on cifar10, plain, batch_size 8"]


def test_a_control_that_is_not_drawn_beside_a_run_has_a_panel(monkeypatch, tmp_path):
    """One with mixup where one without is drawn, or in half precision."""
    figures, original = [], {"epochs": 2, "train_on": "original"}
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    mixed = {"name": "control_mixup", "config": original | {"mixup": True}}
    half = {"name": "control_half", "config": original | {"precision": "float16"}}
    changes = {"config": {"epochs": 2}}, {"name": "control", "config": original}, mixed, half
    pictures.plot_curves(gather_changed(tmp_path, *changes), tmp_path / "curves.png")
    titles = [axis.get_title().partition("\n")[0] for axis in figures[0].axes]
    names = ("plain", "control_mixup", "control_half")
    assert titles == [f"vgg19 on cifar10, {name}" for name in names]


@pytest.mark.parametrize(
    "one, other",
    [
        ({}, {"seed": 1, "config": {"train_on": "locked"}}),  # a default, written out
        ({}, {"history": RESULT["history"][:1]}),  # another run of that seed, no copy
        ({"lock": lock_of()}, {"lock": lock_of(), "seed": 1, "config": {"locked_train_image": "moved"}}),
        ({}, {"seed": 1, "dataset": "cifar", "config": {"dataset": "cifar"}}),
    ],
)
def test_results_that_belong_together(tmp_path, one, other):
    (group,) = gather_changed(tmp_path, one, other)
    assert len(group) == 2 and all(result["paper"] and result["label"] == "plain" for result in group)


def test_seeds_on_other_data_are_no_seeds_of_one_run(tmp_path):
    """Where a manifest does not tell, the hash of the data does."""
    groups = gather_changed(tmp_path, *({"seed": seed, "data_sha256": name} for seed, name in enumerate("aab")))
    assert [len(group) for group in groups] == [2, 1]
    assert [group[0]["label"] for group in groups] == ["plain, data_sha256 a", "plain, data_sha256 b"]


def test_of_pretrained_weights_the_seed_does_not_count(tmp_path):
    paths = ["a/seed0/b", "a/seed1/b", "a/seed0/b", "c/seed0/b"]
    changes = [{"config": {"pretrained": path}, "seed": seed} for seed, path in enumerate(paths)]
    same, other = gather_changed(tmp_path, *changes)
    assert ([result["seed"] for result in same], [result["seed"] for result in other]) == ([0, 1, 2], [3])
    assert not any(result["paper"] for result in same)
    control = {**same[0], "training": same[1]["training"] | {"train_on": "original"}}
    assert tables.control_of(same[0], [other, [control]]) == [control]


def test_without_a_manifest_a_control_is_of_the_same_originals(tmp_path):
    paths = {"a": {}, "b": {"train_on": "original"}}
    groups = gather_changed(tmp_path, *({"config": {"orig_data_path": path, **keys}} for path, keys in paths.items()))
    assert len(groups) == 2 and not any(tables.control_of(group[0], groups) for group in groups)


@pytest.mark.parametrize("pictured", ["a", "b"])
def test_of_copies_the_one_with_its_picture_counts(pictured, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / pictured / "images.png").touch()
    ((result,),) = tables.gather([tmp_path])
    assert result["folder"] == tmp_path / pictured


def test_a_folder_that_cannot_be_read_is_not_left_out(results, monkeypatch):
    scan = os.scandir

    def denied(path):
        if Path(path).name == "1":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="runs/1"):
        tables.gather([results])


def gather_changed(tmp_path, *changes):
    """The groups of some results that differ from RESULT."""
    for index, change in enumerate(changes):
        (tmp_path / f"{index}").mkdir()
        (tmp_path / f"{index}" / "result.json").write_text(json.dumps({**RESULT, "config": {}} | change))
    return tables.gather([tmp_path])


def test_a_line_is_the_mean_of_the_seeds_where_all_were_evaluated():
    axis = pictures.Figure().subplots()
    results = [{"curves": {"orig_acc": {1: 10, 2: 0, 4: 50}}}, {"curves": {"orig_acc": {1: 20, 4: 40}}}]
    assert pictures.draw(axis, results, "orig_acc", "C0", "--").get_xydata().tolist() == [[1, 15], [4, 45]]
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (10, 50)


def test_a_control_is_that_of_the_same_training():
    """By its config, whatever its name, but perhaps without mixup. Of several, one that was tested on the same lock, or
    else one with mixup, too, or of the same precision."""

    def run(train_on="locked", originals="0", eps=0.5, **keys):
        lock = lock_of(original_sha256={"train": originals}, eps=eps)
        result = {"dataset": "folder", "config": {"train_on": train_on, **keys}, "lock": lock}
        return {**result, "training": tables.training_of(result), "settings": tables.settings_of(result)}

    jpeg = {"preprocess": {"jpeg_quality": 10}}
    controls = [[run(train_on="original", **keys)] for keys in ({}, jpeg)]
    others = [[run(train_on="original", **keys)] for keys in ({"epochs": 9}, {"originals": "2"}, {"batch_size": 8})]
    elsewhere = [run(train_on="original", eps=2.0)]
    groups = [*others, elsewhere, [run()], *controls]
    for index, keys in enumerate(({}, jpeg)):
        assert tables.control_of(run(**keys), groups) is controls[index]
    assert tables.control_of(run(mixup=True, seed=3, eval_freq=9), groups) is controls[0]
    for eps in 2.0, 3.0:
        assert tables.control_of(run(eps=eps), groups) is elsewhere
    for other in run(preprocess={"bits": 2}), run(originals="1"), controls[0][0]:
        assert tables.control_of(other, groups) is None
    mixed, half = ([run(train_on="original", **keys)] for keys in ({"mixup": True}, {"precision": "float16"}))
    without = {"mixup_alpha": 9.0, "augmentation": {"length": 9}}  # of what is off
    groups = [mixed, half, *groups]
    for keys in {}, {"cutmix": True}, {"mixup": True, "eps": 2.0}:
        assert tables.control_of(run(**keys), groups) is (elsewhere if "eps" in keys else controls[0])
    assert tables.control_of(run(mixup=True), groups) is mixed
    assert tables.control_of(run(mixup=True, mixup_alpha=1.0, precision="float16"), groups) is half
    assert tables.control_of(run(), [mixed]) is None
    assert tables.control_of(run(**without), groups) is controls[0]
    assert tables.control_of(run(), [[run(train_on="original", **without)]]) is not None
    assert tables.control_of(run(mixup=True, mixup_alpha=1.0), [mixed]) is None


def test_rows_that_read_the_same_are_told_apart():
    """By what differs: a hash, or the end of a long text, only where nothing shorter does."""
    long = "x" * 40
    settings = [{"eps": 1, "a_sha256": "f"}, {"a_sha256": "f"}, {"eps": 2}, {"a_sha256": "e"}]
    assert tables.tell_apart(["a", "a", "b", "c"], settings) == ["eps 1", "", "", ""]
    assert tables.tell_apart("aaa", settings[:2] + settings[3:]) == ["eps 1, a_sha256 f", "a_sha256 f", "a_sha256 e"]
    named = tables.method_of({"lock_method": "mixandcat", "alpha": 0.5, "lambd": 0.3})
    assert named == "mixandcat lambd 0.3"
    paths = [{"path": f"{long}{end}", "a_sha256": end} for end in "12"]
    assert tables.tell_apart("aa", paths) == [f"path {long}1", f"path {long}2"]


def test_the_images_of_each_lock_are_shown(tmp_path):
    """The originals once where the next lock has the same; locks of one name, too; a preprocessed run's not at all."""
    plain, groups = {"lock.eps": 0.5}, []
    for method, originals, settings in (
        ("basic", 5, {"preprocess.blur": 1.0, **plain}),
        ("basic", 0, plain),
        ("basic", 0, {"lock.eps": 0.4}),
        ("horiz", 9, plain),
    ):
        folder = tmp_path / f"{len(groups)}"
        folder.mkdir()
        grid = runs.pictures(torch.full((2, 3, 8, 8), originals, dtype=torch.uint8), torch.zeros(2, 3, 8, 8).byte())
        save_image(grid, folder / "images.png")
        group = {"dataset": "digits", "method": method, "lock_name": "a", "folder": folder, "settings": settings}
        groups.append([group])
    found = pictures.images_by_lock(groups)
    assert {name: round(3 * len(rows) / grid.shape[1]) for name, rows in found.items()} == {
        "digits, basic (a), lock.eps 0.5": 3,
        "digits, basic (a), lock.eps 0.4": 2,
        "digits, horiz (a)": 3,
    }
    assert found["digits, basic (a), lock.eps 0.5"][9, 9, 0] == 0
    pictures.plot_images(groups, tmp_path / "shown.png")
    assert (tmp_path / "shown.png").stat().st_size > 1000
    (folder / "images.png").write_bytes((folder / "images.png").read_bytes()[:99])
    with pytest.raises(UserError, match="images.png: damaged; delete it"):
        pictures.images_by_lock(groups)


def table_rows(text):
    """Each row of the tables in Markdown, as the pair of its header and itself, lists of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        yield from ((header, row) for row in rows)


def fits(column, run):
    """Whether nothing that a column's header says of model, data set, method and epochs is otherwise in a run."""
    models = {column.partition(",")[0]} & MODELS.keys()
    datasets = {name for name in ("digits", "CIFAR-10") if name in column}
    methods = {name for name in METHODS if f"`{name}`" in column}
    epochs = set(re.findall(r"(\d+) epochs", column))
    dataset = {"digits": "digits", "cifar10": "CIFAR-10"}.get(run["dataset"])
    values = run["architecture"], dataset, run["lock_method"], str(run["epochs"])
    return all(not said or value in said for said, value in zip((models, datasets, methods, epochs), values))


def test_the_readmes_say_what_the_results_say():
    """Every group of runs in results/ has its accuracies in a row of the READMEs, and the paper's are tables.PAPER.

    A row's first cell names the run, and a column's header the rest of it (fits). Where a run's name has the eps of its
    lock, the row's second cell is how many attacks reached their target.
    """
    rows = [row for page in [ROOT / "README.md", *MEASURED.glob("*.md")] for row in table_rows(page.read_text())]
    models = next([cell.partition(",")[0] for cell in header] for header, row in rows if header[0] == "lock")
    groups, of_lock2 = tables.gather([MEASURED]), set()
    default = {key: value for key, value in flatten(CONFIG).items() if key in set().union(*VARIANTS.values())}
    for group in groups:
        first = group[0]
        names = [first["name"]] if first["name"] else [first["lock_method"], "plain", first["architecture"]]
        numbers = " / ".join(tables.mean_std([result[key] for result in group]) for key in ("orig_acc", "locked_acc"))
        found = [
            row
            for header, row in rows
            if row[0].rpartition("`, ")[2].strip("`") in names
            and any(cell == numbers and fits(column, first) for column, cell in zip(header, row))
        ]
        keys = {key: value for key, value in flatten(first["config"]).items() if default.get(key) not in (None, value)}
        assert VARIANTS.get(first["name"] or "plain", keys) == keys, first["folder"]
        if "_eps" in first["name"]:
            reached = f"{100 * first['lock']['report']['test']['attacks']['T1']:.0f}"
            found = [row for row in found if row[1] == reached]
        assert found, (names, numbers)
        if "lock2" in first["folder"].parts:
            of_lock2.add((first["architecture"], numbers))
    (repeated,) = (row for _, row in rows if row[0] == "that of `lock2`")
    assert of_lock2.issuperset(list(zip(models, repeated))[2:])
    papers = {
        (row[0].replace("-", "").lower(), method): cell
        for header, row in rows
        if header[0] == "model, trained on locked images" and "ours" not in row[0]
        for method, cell in zip(header[1:], row[1:])
        if cell
    }
    assert papers == {key: f"{orig:.2f} / {locked:.2f}" for key, (orig, locked) in tables.PAPER.items()}


def test_the_readme_says_what_controls_lose():
    """By how much locked images mislead each control, and what the lock takes, where both are of the same lock."""
    groups, expected = tables.gather([MEASURED]), []
    for group in groups:
        first, control = group[0], tables.control_of(group[0], groups)
        if not control or not tables.same_lock(control[0], first):
            continue
        if first["name"] in ("cutout", "mixup", "cutmix"):  # their controls are trained without
            continue
        original, locked = (mean(result[key] for result in control) for key in ("orig_acc", "locked_acc"))
        lost, taken = original - locked, original - mean(result["orig_acc"] for result in group)
        folder = next(part for part in first["folder"].relative_to(MEASURED).parts if part != "cifar10")
        words = [f"`{folder}`", first["architecture"], f"`{first['method']}`", first["name"] and f"`{first['name']}`"]
        name = ", ".join(word for word in words if word and word != "`basic`")
        # what is said of all of them there; in two epochs, that lock had not taken effect yet
        assert taken < 6 if lost <= 2.1 else taken > 20.5 if lost >= 8 else 2 < taken < 72 or first["name"] == "2epochs"
        expected.append((lost, [name, f"{lost:.1f}", f"{taken:.1f}"]))
    assert len(expected) == 47
    rows = table_rows((MEASURED / "models.md").read_text())
    assert [row for header, row in rows if header[1] == "a control loses"] == [row for _, row in sorted(expected)]


def test_mistakes(results, user_error, monkeypatch, tmp_path):
    assert "none: no such folder" in user_error(study.main, "--work-path", results, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no result.json" in user_error(study.main, "--work-path", tmp_path / "empty")
    for path in ("curves.gif", "none/curves.png"):  # told before anything is trained
        line = user_error(study.main, "--run", "--work-path", tmp_path, "--plot", path)
        assert f"--plot: {path}: name a PNG, PDF or SVG file, in a folder that there is" in line
    assert "unknown flag --epochs; flags of train.py go with --run" in user_error(study.main, "--epochs", 3)
    assert "--images: there is no images.png" in user_error(study.main, "--work-path", results, "--images", "i.png")
    line = user_error(study.main, "--work-path", results, "--plot", "i.png", "--images", "./i.png")
    assert "--images i.png: is the file of --plot; name another" in line
    assert "--run needs --work-path" in user_error(study.main, "--run")
    assert "--name: --run names its runs by variant" in user_error(
        study.main, "--run", "--work-path", "a", "--name", "b"
    )
    assert "--train_on: --variant control sets it" in user_error(
        study.main, "--run", "--work-path", "a", "--variant", "plain", "control", "--train_on=locked"
    )
    for methods in ([], ["--lock-method", "basic", "mixup"]):
        line = user_error(study.main, "--run", "--work-path", tmp_path, *methods, "--alpha", 0.3)
        assert "--alpha: name a --lock-method that it is for" in line
    monkeypatch.setattr(study, "TRAIN", str(tmp_path / "absent.py"))
    mixup = ["--variant", "mixup", "--lock-data", "mixup"]  # the second one is a folder
    assert "1 of 1 runs failed" in user_error(study.main, "--run", "--work-path", tmp_path / "none", *mixup)
    for content in ("{}", "[]", "{", json.dumps({**RESULT, "config": 3}), json.dumps({**RESULT, "history": None}),
                    json.dumps({**RESULT, "history": []}), json.dumps({**RESULT, "config": {"pretrained": 3}}),
                    json.dumps({**RESULT, "history": [{**RESULT["history"][0], "epoch": None}]}), "[" * 99999,
                    json.dumps({**RESULT, "lock": lock_of(original_sha256=0)}),
                    json.dumps({**RESULT, "name": None}), json.dumps({**RESULT, "alpha": "x"})):  # fmt: skip
        (results / "0" / "result.json").write_text(content)
        line = user_error(study.main, "--work-path", results, "--plot", tmp_path / "curves.png")
        assert "0/result.json: not a result of train.py" in line


def test_all_is_every_method_and_variant_and_each_run_may_go_on(monkeypatch, tmp_path):
    flags = ["--run", "--work-path", str(tmp_path), "--lock-method", "all", "--variant", "plain", "all"]
    flags += ["--alpha", "0", "--lambd", "0.4"]
    monkeypatch.setattr(sys, "argv", ["experiments", *flags])
    args, rest = study.parse_arguments()
    assert args.lock_method == list(METHODS) and args.variant == list(VARIANTS)
    assert all("--resume" in command for command in study.commands(args, rest))
    for flag, methods in {"--alpha": {"horiz", "mixandcat"}, "--lambd": {"mixup", "mixandcat"}}.items():
        given = [command for command in study.commands(args, rest) if flag in command]
        assert {command[command.index("--lock-method") + 1] for command in given} == methods


def test_every_combination_is_run_and_a_failure_costs_no_other_run(work, command, capsys):
    """The first of two methods is missing; the table shows what the others found, when it is gathered."""
    (work / "link").symlink_to(work)
    flags = ["--run", "--work-path", work, work / "link", "--lock-method", "mixup", "basic"]
    flags += ["--variant", "control", "jpeg10"]
    with pytest.raises(SystemExit):
        command(study.main, *flags, "--seed", 3, 3, "--jobs", 2, "--epochs", 1)
    out, error = capsys.readouterr()
    assert "2 of 4 runs failed, see above; the same command tries them again (a run whose folder you delete" in error
    assert out.count("train_image_50_mixup: no such file") == 2
    assert "preresnet8, basic, jpeg10, seed 3, 1 epochs" in out
    command(study.main, "--work-path", work)
    assert [line.split("|")[3:5] for line in capsys.readouterr().out.splitlines()[2:]] == [
        [" basic ", " control "],
        [" basic ", " jpeg10 "],
    ]
    for name, keys in {"control": ("original", 0), "jpeg10": ("locked", 10)}.items():
        config = json.loads((work / "basic" / name / "seed3" / "result.json").read_text())["config"]
        assert (config["train_on"], config["preprocess"]["jpeg_quality"], config["epochs"]) == (*keys, 1)


def test_a_run_takes_the_gpu_of_one_that_ended(tmp_path, monkeypatch):
    """Of three runs, two at a time, the first one lasts until the others are over."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "place, seed, begun = pathlib.Path(sys.argv[2]), sys.argv[-1], time.time()\n"
        "while seed == '0' and len(list(place.glob('seed*'))) < 2 and time.time() < begun + 60:\n"
        "    time.sleep(0.01)\n"
        "(place / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n"
        "(place / f'seed{seed}').write_text(os.environ['LOCAL_RANK'])\n"
        "print('done')"
    )
    monkeypatch.setattr(study, "TRAIN", script)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    args = SimpleNamespace(work_path=[tmp_path], lock_method=[None], variant=["plain"], seed=[0, 1, 2], jobs=2)
    study.run_all(args, [])
    first, second, third = [(tmp_path / f"seed{seed}").read_text() for seed in args.seed]
    assert second == third and {first, second} == {"0", "1"}
    assert (tmp_path / "threads").read_text() == str(max(1, torch.get_num_threads() // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    study.run_all(args, [])
    assert (tmp_path / "threads").read_text() == "3"
    slots = SimpleQueue()
    slots.put(0)
    with pytest.raises(OSError):
        study.run([tmp_path / "none"], slots, 1, [], Event())
    assert slots.get_nowait() == 0


def test_what_is_being_started_at_an_interrupt_ends_too():
    slots, stopped = SimpleQueue(), Event()
    slots.put(0)
    stopped.set()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert study.run(sleep, slots, 1, [], stopped) == (-signal.SIGTERM, "exit code -15")


def test_an_error_that_nobody_foresaw_is_told_as_a_whole():
    slots = SimpleQueue()
    slots.put(0)
    code, line = study.run([sys.executable, "-c", "1 / 0"], slots, 1, [], Event())
    assert code == 1 and line.startswith("Traceback") and line.endswith("ZeroDivisionError: division by zero")
    assert study.run([sys.executable, "-c", "exit(1)"], slots, 1, [], Event()) == (1, "exit code 1")


def test_an_interrupt_ends_what_is_running_and_starts_no_more(work):
    """SIGTERM, which reaches the parent alone, when the first of two trainings has written its log."""
    command = [sys.executable, *f"-m experiments --run --work-path {work} --seed 1 2 --epochs 999".split()]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        while not (work / "basic" / "seed1" / "log.txt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130 and "goes on from here" in process.stderr.read()
    with utils.exclusive(work / "basic" / "seed1"):  # nobody writes there any more
        assert not (work / "basic" / "seed2").exists()


def test_every_variant_is_one_that_train_knows(tmp_path):
    plain = flatten(config_of(tmp_path))
    for name, keys in VARIANTS.items():
        changed = flatten(config_of(tmp_path, **{key: str(value) for key, value in keys.items()}))
        assert [key for key in changed if changed[key] != plain[key]] == list(keys), name
