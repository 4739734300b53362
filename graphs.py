"""Models and training steps as graphs, so that a GPU need not wait for Python: torch.compile, and CUDA graphs.

Where one of them fails, it says so in a line, and the work goes on without it.
"""

import torch

from utils import first_line


class Compiled:
    """A function by torch.compile, where a gradient is taken, for inputs of the shape that it is first given so.

    Inputs of another shape, such as the last batch of a data set, and those that no gradient is taken of go through
    the function itself: compiling once more would take longer than that. Given to a module in place of its forward, it
    leaves all else about the module as it is.
    """

    def __init__(self, function, say=print):
        self.function, self.say = function, say
        self.compiled, self.shape = torch.compile(function, dynamic=False), None

    def __call__(self, inputs, *args, **kwargs):
        if self.compiled and torch.is_grad_enabled():
            self.shape = self.shape or inputs.shape
            if inputs.shape == self.shape:
                try:
                    return self.compiled(inputs, *args, **kwargs)
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:  # no C++ compiler, or one of many other reasons: none stops the work
                    self.say(f"torch.compile failed ({first_line(error)}): going on without")
                    self.compiled = None
        return self.function(inputs, *args, **kwargs)


class Captured:
    """A function of tensors on a GPU, whose kernels are recorded in a CUDA graph, and launched all at once.

    The first three calls run as they are: kernels are chosen and compiled in them. What the fourth does is recorded,
    and every later one replays it with its own tensors, unless they differ in shape or type from the first one's: it
    then runs as it is too. The function may change tensors in place, but must not read their values in Python, of
    which a recording knows nothing. What a call returns is overwritten by the next.
    """

    WARM_UP = 3

    def __init__(self, function, say=print):
        self.function, self.say = function, say
        self.stream = torch.cuda.Stream()  # a graph cannot be recorded on the default one
        self.signature, self.calls, self.graph = None, 0, None

    def __call__(self, *inputs):
        signature = [(tensor.shape, tensor.dtype) for tensor in inputs]
        self.signature = self.signature or signature
        if signature != self.signature:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.warm_up(inputs)
        if self.calls == self.WARM_UP + 1:
            self.record(inputs)
        if not self.graph:
            return self.function(*inputs)
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs

    def warm_up(self, inputs):
        """Run the function on the stream that it is recorded on: autograd keeps to that stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, inputs):
        """Record what the function does, which then does nothing yet."""
        self.inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.say(f"no CUDA graph was recorded ({first_line(error)}): going on without")
        else:
            self.graph = graph
