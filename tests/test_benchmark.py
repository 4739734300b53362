"""The benchmark: every line can be measured, and counts the work that there is. How fast it is, no test asks."""

import multiprocessing
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.benchmarks import speed
from utils import UserError

SMALLEST = speed.Size(
    reference_batch=2,
    batch=2,
    steps=1,
    batches=1,
    rounds=1,
    base_batch=2,
    models={"preresnet8": 2},
    workers=(1, 1),
    together=("preresnet8",),
    jobs=2,
)


def test_every_line_is_measured(command, capsys, monkeypatch):
    monkeypatch.setitem(speed.SIZES, "cpu", SMALLEST)
    monkeypatch.setattr(speed, "ceilings", lambda *args: (1e12, 1e9))
    monkeypatch.setattr(speed, "together", lambda *args: nullcontext(lambda: None))
    command(speed.main, "--profile")
    out = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [name for name, *_ in lines[1:]] == [
        "a step of the attack on ResNet-50",
        "a step of the lock by all four methods",
        "train the base classifier, ResNet-50, batch 2",
        "train preresnet8, batch 2",
        "2 at once: preresnet8, batch 2",
    ]
    ratios = [ratio for _, _, _, ratio, *_ in lines[1:]]
    assert all(re.fullmatch(r"\d+\.\dx", ratio) and float(ratio.removesuffix("x")) > 0 for ratio in ratios)
    assert out.count("```\n") == 8  # profiles of all but the last


def test_nobody_waits_for_a_process_that_was_killed():
    others = multiprocessing.active_children()
    with speed.together(2, "preresnet8", SMALLEST) as epoch:
        for _ in range(2):
            epoch()
        started = [process for process in multiprocessing.active_children() if process not in others]
        assert len(started) == 2
        started[0].kill()
        with pytest.raises(UserError, match="one of the processes that train at once failed"):
            epoch()
    assert not any(process.is_alive() for process in started)


def test_the_cost_of_a_model():
    """A multiplication and an addition for each weight and place; what every layer reads and writes, in two bytes."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 32 * 32, 7))
    flops, size = speed.cost_of(model, torch.bfloat16, passes=3)
    assert flops == 3 * 2 * (3 * 5 * 9 + 5 * 7) * 32 * 32
    assert size == 3 * 2 * ((3 + 5 + 5) * 32 * 32 + 7)
