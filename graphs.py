"""Models and training steps as graphs, so that a GPU need not wait for Python: torch.compile, and CUDA graphs."""

import gc
from contextlib import contextmanager

import torch
from torch._functorch import config as functorch_config

from utils import UserError, first_line, memory_is_full

if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
    # the gradient is compiled together with the function, so that what fails there fails where it is caught
    functorch_config.force_non_lazy_backward_lowering = True
if hasattr(torch.compiler.config, "force_cudagraph_gc"):
    # torch 2.9 and newer no longer collect garbage before they record a graph: see no_garbage. (In some versions this
    # holds in this thread only; a backward pass is recorded in another, but right after the forward pass in this one.)
    torch.compiler.config.force_cudagraph_gc = True


class Compiled:
    """A function of images [N, C, H, W], compiled by torch.compile for full batches with gradients enabled.

    Batches of another size, such as the last one of a data set, and those without gradients go through the function
    itself: compiling once more would take longer than that. Where torch.compile fails, it says so once, and everything
    goes through the function; but where the memory is full, or a CUDA graph is being recorded, the error is raised.
    Given to a module in place of its forward, it leaves all else about the module as it is. mode is torch.compile's;
    with one that records CUDA graphs, a failure after the first call raises UserError: torch has left the stream and
    its memory as they are in a recording.
    """

    def __init__(self, function, batch_size, say=print, mode=None):
        self.function, self.batch_size, self.say, self.mode = function, batch_size, say, mode
        self.compiled, self.failed = None, False

    def __call__(self, images, *args, **kwargs):
        if not self.failed and torch.is_grad_enabled() and len(images) == self.batch_size:
            first = self.compiled is None
            try:  # torch.compile itself refuses a Python that is newer than it
                self.compiled = self.compiled or torch.compile(self.function, dynamic=False, mode=self.mode)
                return self.compiled(images, *args, **kwargs)
            except Exception as error:  # no C++ compiler, or one of many other reasons that need not stop the work
                recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
                if recording or memory_is_full(error):
                    raise
                if self.mode and not first:
                    raise not_recorded(error) from error
                reason = first_line(getattr(error, "inner_exception", error))
                self.say(f"torch.compile failed ({reason}): going on without")
                self.failed = True
        return self.function(images, *args, **kwargs)


@contextmanager
def no_garbage():
    """Collect no garbage meanwhile: a graph or kernel that is freed during a recording ends it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def not_recorded(error):
    """A UserError for an error that ended the recording of a CUDA graph."""
    return UserError(f"a CUDA graph could not be recorded ({first_line(error)}); set compile to never")


class Captured:
    """A function of tensors on a GPU, whose kernels are recorded in a CUDA graph, and then launched all at once.

    Each call copies its tensors to the same memory. The first three run on the stream that is recorded later: kernels
    are chosen and compiled in them. The fourth records, and it and every later one replay. Calls with tensors of other
    shapes or types than the first one's run as they are, and do not count. The function may change tensors in place,
    but must not read their values in Python, of which a recording knows nothing. What a call returns is overwritten by
    the next.
    """

    WARM_UP = 3

    def __init__(self, function):
        self.function = function
        self.stream = torch.cuda.Stream()  # nothing can be recorded on the default one
        self.inputs, self.outputs, self.calls, self.graph = None, None, 0, None

    def __call__(self, *inputs):
        self.inputs = self.inputs or [tensor.clone() for tensor in inputs]
        if any(mine.shape != given.shape or mine.dtype != given.dtype for mine, given in zip(self.inputs, inputs)):
            return self.function(*inputs)
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.warm_up()
        if not self.graph:
            self.record()
        self.graph.replay()
        return self.outputs

    def warm_up(self):
        """Run the function on the stream that it is recorded on; its backward pass runs there too."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self):
        """Record the function's kernels without running them; raises UserError where that cannot be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with no_garbage(), torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the error at the end of a recording hides the one that ended it
            if memory_is_full(cause):
                raise cause
            raise not_recorded(cause) from error
        self.graph = graph
