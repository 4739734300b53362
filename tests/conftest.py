import os
import sys

# The tests compare bit for bit, which a GPU does not promise: they run on the CPU everywhere.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from torch import nn

import utils


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def command(monkeypatch):
    """Runs a command's main function with its arguments, as the shell would, in this process."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        utils.run_command(main)

    return run


@pytest.fixture
def user_error(command, capsys):
    """Runs a command that must end in one line on standard error and exit code 2; returns the line."""

    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command(main, *arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return run


def small_classifier(classes=10):
    """An untrained network with the layers that matter to an attack: convolutions, batch norm, a kink, pooling."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
    for parameter in model.parameters():  # larger weights than PyTorch's, so that an attack moves the losses
        parameter.data *= 2
    return model.eval().requires_grad_(False)
