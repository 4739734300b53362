"""torch.compile and CUDA graphs: they do what the plain code does, and say where they cannot."""

import gc
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphs
import lock
import lockfiles
import train
from graphs import Captured, Compiled
from lockfiles import Paths
from tests.conftest import config_of, lock_flags, new_learner
from utils import UserError, load_whole


def tensors(tree):
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """A CUDA graph as it would be on a CPU: what is recorded happens to the same memory again with each replay.

    As with the real one, nothing happens while it is recorded, and what would read a tensor in Python, or bring one
    from there, is refused.
    """

    REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.known = [], [], [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if name in self.REFUSED:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        self.before += [(tensor, tensor.clone()) for tensor in tensors((args, kwargs)) if id(tensor) not in self.known]
        results = function(*args, **kwargs)
        self.made += tensors(results)  # kept, so that no other tensor gets the same id
        self.known.update(map(id, tensors(results)))
        self.calls.append((function, args, kwargs, results))
        return results

    @torch.no_grad()
    def undo(self):
        """Take back what recording did to the tensors that were there before."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, recorded in self.calls:
            results = function(*args, **kwargs)
            if not any(value.alias_info for value in function._schema.returns):  # neither in place, nor a view
                for mine, new in zip(tensors(recorded), tensors(results)):
                    mine.copy_(new)


class Recording:
    """Stands for torch.cuda.graph."""

    def __init__(self, tape, stream):
        self.tape = tape

    def __enter__(self):
        self.tape.__enter__()

    def __exit__(self, *error):
        self.tape.__exit__(*error)
        self.tape.undo()


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def no_gpu(monkeypatch):
    """Lets Captured run on the CPU."""
    for name, value in {
        "CUDAGraph": Tape,
        "graph": Recording,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)


def test_a_memory_that_is_full_when_a_model_is_compiled_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=torch.cuda.OutOfMemoryError))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Compiled(nn.Conv2d(3, 2, 3).forward, 1, say=pytest.fail)(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("gpu", [True, False])
def test_a_step_is_captured_where_it_is_compiled_on_a_gpu(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "on_gpu", lambda learner: gpu)
    monkeypatch.setattr(train, "Captured", lambda step: "captured")
    steps = [
        train.make_step(new_learner(config), config)
        for config in (config_of(tmp_path, architecture="preresnet8", compile=value) for value in ("always", "never"))
    ]
    assert [step == "captured" for step in steps] == [gpu, False]


def train_some(config, change=lambda step: step, epochs=3, device="cpu", lr=0.1):
    """A short training, its step changed; returns all that a checkpoint holds of it, and what each epoch returned."""
    torch.manual_seed(0)
    learner = new_learner(config, device)
    images, labels = torch.randint(256, (44, 3, 8, 8), dtype=torch.uint8), torch.arange(44) % 10
    images, labels = images.to(device), labels.to(device)
    step = change(train.make_step(learner, config, say=pytest.fail))
    results = []
    for epoch in range(epochs):
        learner.optimizer.param_groups[0]["lr"].fill_(lr / (epoch + 1))
        results.append(train.train_epoch(step, images, labels, config))
    momentum = {i: state["momentum_buffer"] for i, state in learner.optimizer.state_dict()["state"].items()}
    return {**learner.model.state_dict(), **momentum, "scale": learner.scaler.get_scale()}, results


@pytest.mark.parametrize(
    "keys",
    [{}, {"precision": "bfloat16"}, {"precision": "float16"}, {"mixup": "True"}, {"adversarial.eps": "0.5"}],
    ids=lambda keys: "".join(keys.values()),
)
def test_a_captured_training_is_the_plain_one(no_gpu, tmp_path, keys):
    """Weights, running statistics, momentum, losses and accuracies, bit for bit, over changing learning rates and
    batches of two sizes."""
    config = config_of(tmp_path, architecture="preresnet8", batch_size="8", **{"precision": "float32"} | keys)
    expected, expected_results = train_some(config)
    steps = []
    state, results = train_some(config, lambda step: steps.append(Captured(step)) or steps[0])
    assert steps[0].graph.calls
    assert results == expected_results
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name


def test_what_cannot_be_captured(no_gpu):
    """As a function that reads a value in Python."""
    captured = Captured(lambda values: (values.sum().item(),))
    for _ in range(3):
        assert captured(torch.ones(3)) == (3,)
    with pytest.raises(UserError, match="not be recorded .*_local_scalar_dense.* set compile to never"):
        captured(torch.ones(3))
    assert gc.isenabled()


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")], ids=repr)
def test_a_full_memory_stays_one(no_gpu, error):
    """Of which run_command says something else than of what cannot be captured."""

    def fills_the_memory(values):
        raise error

    captured = Captured(lambda values: (values,))
    for _ in range(3):
        captured(torch.ones(3))
    captured.function = fills_the_memory
    with pytest.raises(type(error)) as raised:
        captured(torch.ones(3))
    assert raised.value is error


def test_every_call_computes_on_the_same_memory(no_gpu):
    """So that the strides and kernels of the first ones are those that are recorded."""
    seen, given = [], [torch.rand(2, 3), torch.rand(3, 2).T, torch.rand(2, 3), torch.rand(2, 3)]
    captured = Captured(lambda values: (seen.append((values.data_ptr(), values.stride())), values + 0)[1:])
    for values in given:
        assert torch.equal(captured(values)[0], values)
    assert len(seen) == 4 and len(set(seen)) == 1


def test_no_garbage_is_collected_in_a_recording(no_gpu):
    collecting = []
    captured = Captured(lambda values: (collecting.append(gc.isenabled()), values + 0)[1:])
    for _ in range(5):
        captured(torch.ones(3))
    assert collecting == [True, True, True, False] and gc.isenabled()


def test_one_size_is_compiled(compiles):
    model = nn.Conv2d(3, 2, 3)
    compiled = Compiled(model.forward, batch_size=4)
    with torch.no_grad():
        compiled(torch.rand(4, 3, 8, 8))
    for n in (1, 4, 4, 1, 4):
        images = torch.rand(n, 3, 8, 8)
        assert torch.equal(compiled(images), model(images))
    assert len(compiles) == 3


def test_a_compiled_training_is_the_plain_one(compiles, tmp_path):
    keys = {"architecture": "preresnet8", "precision": "float32", "batch_size": "8"}
    expected, _ = train_some(config_of(tmp_path, **keys))
    assert not compiles
    state, _ = train_some(config_of(tmp_path, **keys, compile="always"))
    assert len(compiles) == 15  # of 18 steps, three with the last four images
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(state[name]), torch.as_tensor(value))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile looks at, and does not show
def test_a_compiled_lock_is_the_plain_one(compiles, command, place, tmp_path):
    """Batches of 40 images are compiled: two of the training and two of the test set, each with 3 + 1 evaluations."""
    flags = [*lock_flags(place, tmp_path), "--lock-method", "basic"]
    command(lock.main, *flags, "--compile", "always")
    assert len(compiles) == 4 * (3 + 1)
    compiled, plain = (lockfiles.read_manifest(Paths(folder, "basic")) for folder in (tmp_path, place))
    assert compiled["settings"] == plain["settings"] | {"compile": "always"}
    for split in ("train", "test"):
        images = [load_whole(Paths(folder, "basic").file(split, "image")) for folder in (tmp_path, place)]
        assert all(map(torch.equal, *images))


def passes(graph_module, example_inputs):
    return make_boxed_func(graph_module.forward)


def fails(graph_module, example_inputs):
    raise RuntimeError("\nFailed to find C compiler. Please specify one.\nmore")


@pytest.mark.parametrize(
    "part",
    [
        "fw_compiler",
        pytest.param(
            "bw_compiler",
            marks=pytest.mark.skipif(
                not hasattr(functorch_config, "force_non_lazy_backward_lowering"), reason="this torch compiles it later"
            ),
        ),
    ],
)
def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, part):
    backend = aot_autograd(**{"fw_compiler": passes, "bw_compiler": passes} | {part: fails})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    said = []
    model, images = nn.Conv2d(3, 2, 3), torch.rand(1, 3, 8, 8)
    compiled = Compiled(model.forward, 1, said.append)
    for _ in range(2):
        outputs = compiled(images)
        assert torch.equal(outputs, model(images))
        outputs.sum().backward()
    assert said == ["torch.compile failed (Failed to find C compiler): going on without"]


def test_a_python_that_torch_compile_refuses(monkeypatch):
    monkeypatch.setattr(torch, "compile", fails)
    said, images = [], torch.rand(1, 3, 8, 8)
    model = nn.Conv2d(3, 2, 3)
    compiled = Compiled(model.forward, 1, said.append, mode="reduce-overhead")
    assert all(torch.equal(compiled(images), model(images)) for _ in range(2)) and len(said) == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_failure_after_others_worked(monkeypatch, mode):
    """With that mode, the second call records a CUDA graph; what a recording that fails leaves behind is broken."""
    forward, images, said = nn.Conv2d(3, 2, 3).forward, torch.rand(1, 3, 8, 8), []
    outcomes = iter([forward, partial(fails, forward)])
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: next(outcomes)(*args))
    compiled = Compiled(forward, 1, said.append, mode)
    assert torch.equal(compiled(images), forward(images)) and not said
    if mode:
        with pytest.raises(UserError, match="not be recorded .*Failed to find C compiler.* set compile to never"):
            compiled(images)
    else:
        assert torch.equal(compiled(images), forward(images)) and len(said) == 1


def test_garbage_is_collected_before_a_recording():
    """By torch itself, of itself only up to 2.8."""
    assert getattr(torch.compiler.config, "force_cudagraph_gc", True)


def test_a_failure_to_compile_ends_a_recording(monkeypatch):
    """Going on without, as elsewhere, would record the slower step for good."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: partial(fails, function))
    compiled = Compiled(nn.Conv2d(3, 2, 3).forward, 1)
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        compiled(torch.rand(1, 3, 8, 8))
