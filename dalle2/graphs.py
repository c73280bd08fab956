"""CUDA graphs: the kernels of a forward and backward pass, recorded once and launched as one.

A small network on a fast GPU waits for its kernels to be launched, one by one, and not for their
results: docs/results/gpu.md. torch.cuda.make_graphed_callables is not used: it records a
network alone, and what is around it, noise, crops, the loss, has half as many kernels again.
"""

import torch

EAGER_CALLS = 3  # before the recording: libraries choose their kernels, caches are filled


class GraphedGradients:
    """`compute(batch)`, which leaves gradients in `params` and returns a tensor, recorded at the
    fourth call and replayed from then on. batch: {name: tensor on the GPU}, of the same shapes at
    every call; whatever else `compute` reads has to stay where it is in memory. `generator` is
    where its random numbers come from; it may be seeded before each call."""

    def __init__(self, compute, params, generator):
        self.compute, self.params, self.generator = compute, params, generator
        self.stream, self.calls, self.graph = torch.cuda.Stream(generator.device), 0, None

    def __call__(self, batch):
        """What `compute(batch)` returns; nothing here waits for the GPU but the recording."""
        if self.calls < EAGER_CALLS:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # gradients must not be tied to the main stream
                result = self.compute(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.record(batch)
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.graph.replay()
        for param, grad in zip(self.params, self.grads):
            param.grad = grad
        return self.result.clone()

    def record(self, batch):
        self.batch = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # thread_local: the thread that draws batches allocates pinned memory meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.result = self.compute(self.batch)
        self.grads, self.graph = [param.grad for param in self.params], graph
