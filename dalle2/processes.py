"""The processes of a launch that render and score: one, or what torchrun or accelerate started."""

import contextlib
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from dalle2.config import UserError

PATIENCE = timedelta(days=2)  # of a process that waits for slower ones; torch gives up in minutes


def join_processes():
    """accelerate.PartialState of this launch, on CPUs where there is no GPU. To be called as often
    as one likes."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@contextlib.contextmanager
def share_errors():
    """A UserError that any process raises within it is raised by all of them at its end, so that
    none waits for one that is gone, and the first process tells it."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = [told for told in gather_object([problem]) if told]
    if problems:
        raise UserError(problems[0])
