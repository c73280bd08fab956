"""Networks whose weights, average, gradients and optimizer state are sharded among the processes
(`--fsdp`): torch's FSDP2, on GPUs and on CPUs alike; and what processes tell each other.

What is saved is gathered first, so that checkpoints and exports are those of any other run and a
run may be resumed with or without it, on another number of processes.
"""

import inspect

import torch
from accelerate.utils import broadcast_object_list, recursively_apply
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

# on a CPU torch 2.6 cannot shard, and 2.7 and 2.8 halve the gradients of two processes
CAN_SHARD_ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
# every process takes its own share of what it has whole; torch 2.6 sends the first process's round
TAKE_OWN = {"src_data_rank": None} if "src_data_rank" in inspect.signature(
    distribute_tensor).parameters else {}


def shard(module, blocks, device):
    """Shards the parameters of `module` on `device` among all processes, in place. `blocks`,
    parts of it that are called as a whole, are gathered when they are computed, the rest when the
    module is."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if hasattr(module, "read_text"):  # the prior's other entry
        register_fsdp_forward_method(module, "read_text")


def gather(tensor):
    """The whole tensor of one that may be sharded; if it is, every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state, keep=True):
    """`state`, nested dicts and lists, with sharded tensors gathered on the CPU, one tensor at a
    time; a process that does not `keep` it has None in their place."""
    def collect(tensor):
        whole = gather(tensor)
        return whole.cpu() if keep else None
    return recursively_apply(collect, state, test_type=lambda value: isinstance(value, DTensor))


def broadcast_state(state, accelerator):
    """The first process's `state`, nested dicts and lists with tensors on the CPU, in every
    process; what the others pass is not read. One tensor at a time goes over the device."""
    if accelerator.num_processes == 1:
        return state
    tensors = []

    def describe(tensor):
        tensors.append(tensor)
        return tensor.to("meta")
    (described,) = broadcast_object_list([recursively_apply(describe, state)])
    tensors = iter(tensors)

    def fetch(meta):
        tensor = next(tensors).to(accelerator.device) if accelerator.is_main_process \
            else torch.empty_like(meta, device=accelerator.device)
        torch.distributed.broadcast(tensor, src=0)
        return tensor.cpu()
    return recursively_apply(fetch, described)


def holds_anywhere(condition, accelerator):
    """Whether `condition` holds in any process, the same answer in all."""
    if accelerator.num_processes == 1:
        return condition
    count = accelerator.reduce(torch.tensor(float(condition), device=accelerator.device), "sum")
    return bool(count)


def scatter_like(tensor, like):
    """`tensor`, whole and the same in all processes, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, **TAKE_OWN)


def load_module(module, saved):
    """module.load_state_dict of whole tensors."""
    current = module.state_dict()
    module.load_state_dict({name: scatter_like(value, current.get(name))
                            for name, value in saved.items()})


def load_optimizer(optimizer, saved):
    """optimizer.load_state_dict of whole tensors; all but the counts have their weight's shape."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = {index: {name: scatter_like(value, params[index] if value.ndim else None)
                     for name, value in values.items()}
             for index, values in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})
