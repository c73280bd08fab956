"""The processes of a launch that render and score: one, or what torchrun or accelerate started."""

import contextlib
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from dalle2.errors import UserError

PATIENCE = timedelta(days=2)  # of a process that waits for slower ones; torch gives up in minutes


def join_processes():
    """accelerate.PartialState of this launch, on CPUs where there is no GPU. It may be called any
    number of times."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=not has_gpu, timeout=PATIENCE)


@contextlib.contextmanager
def share_errors():
    """A UserError that any process raises within it is raised by all of them at its end, so that
    none waits for one that is gone, and the first process prints it."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = error
    problems = [error for error in gather_object([problem]) if error]
    if problems:
        raise problems[0]
