"""A device that is always behind: a launched step computes only when its result is asked for, after those before it.

What the engine does to rows, pages and slots between the two then meets a step that has not run yet, as on a GPU.
"""

import dataclasses
from collections import deque

import torch


class LateStep:
    def __init__(self, device, launch):
        self.device = device
        self.launch = launch
        self.launched = None

    def wait(self):
        self.device.run_until(self)
        return self.launched.wait()


class LateDevice:
    """In place of a `Runner`, whose steps must not be padded: those of a captured step lie in memory that is reused."""

    def __init__(self, runner):
        self.runner = runner
        self.queue = deque()

    def launch(self, step, inputs, record, num_sampled, scoring):
        assert step.shape is None
        values = {field.name: getattr(step.batch, field.name) for field in dataclasses.fields(step.batch)}
        tensors = {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
        source = None if step.source is None else step.source.clone()
        own = dataclasses.replace(step, batch=dataclasses.replace(step.batch, **tensors), source=source)
        late = LateStep(self, lambda: self.runner.launch(own, inputs, record, num_sampled, scoring))
        self.queue.append(late)
        return late

    def run_until(self, step):
        while self.queue:
            late = self.queue.popleft()
            late.launched = late.launch()
            if late is step:
                return
