"""A network in training: with the average of its weights and its optimizers, on its device, and
computed as many rows at a time as memory holds."""

import contextlib
import copy

import torch
from tqdm import tqdm

from dalle2.ema import PowerAverages
from dalle2.errors import UserError
from dalle2.graphs import GraphedGradients
from dalle2.optimizer import build_optimizers
from dalle2.rng import BatchRandom, derive_seed
from dalle2.sharding import (
    CAN_SHARD_ON_CPU,
    gather,
    gather_state,
    holds_anywhere,
    load_module,
    load_optimizer,
    shard,
)


class TrainState:
    """A network with the average of its weights and its optimizers, on the device, whole or sharded
    among the processes. `model` is what computes gradients, `module` the network itself.
    `device_batch_size` rows are computed at a time."""

    def __init__(self, module, config, accelerator, list_blocks=lambda module: (), can_split=True):
        self.config, self.accelerator, self.can_split = config, accelerator, can_split
        self.is_shared = config.fsdp and accelerator.num_processes > 1
        self.share = count_rows(config.batch_size, accelerator.num_processes)  # of a global batch
        self.device_batch_size = min(config.device_batch_size or self.share, self.share) \
            if can_split else self.share
        memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        module = module.to(accelerator.device, memory_format=memory_format)
        self.average = copy.deepcopy(module).requires_grad_(False)
        if config.compile:
            module.compile()
        if self.is_shared:
            if accelerator.device.type == "cpu" and not CAN_SHARD_ON_CPU:
                raise UserError(f"needs torch 2.11 on a CPU, this is {torch.__version__}", "fsdp")
            for network in (module, self.average):
                shard(network, list_blocks(network), accelerator.device)
        # evaluation_mode: without DDP, which FSDP stands in for
        self.model = accelerator.prepare_model(module, evaluation_mode=self.is_shared)
        self.optimizers = [accelerator.prepare(o) for o in build_optimizers(module, config)]
        self.module = accelerator.unwrap_model(self.model)
        # not for a CLIP: open_clip picks a caption's end with an index from the CPU
        self.can_graph = (config.cuda_graphs and can_split and accelerator.device.type == "cuda"
                          and accelerator.num_processes == 1)
        self.graph = None
        self.snapshots = PowerAverages(self.module) if config.snapshot_every else None
        # the first process samples; all do where each holds but a share of the weights
        self.samples_here = accelerator.is_main_process or self.is_shared

    def __str__(self):
        sharing = "weights sharded, " if self.is_shared else ""
        precision = self.accelerator.mixed_precision
        return (f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {sharing}"
                f"{self.device_batch_size} rows at a time, "
                f"{'fp32' if precision == 'no' else precision}")

    def compute_gradients(self, step, batch, compute_loss, is_trial=False):
        """Gradients of `batch`, this process's rows of the batch of `step`, `device_batch_size`
        rows at a time. Returns the mean loss, left on the device: nothing here waits for it.

        Where memory runs out, the rows are halved and the batch is computed again: the sum of the
        gradients is the same. One process does so at any step; several, that meet in the middle of
        a step to add up their gradients, do so in trials, which leave no gradients behind.
        """
        self.model.train()
        batch = {name: value.to(self.accelerator.device, non_blocking=True)
                 for name, value in batch.items()}
        if self.accelerator.num_processes == 1:
            while (loss := self._try(step, batch, compute_loss, sync=True)) is None:
                self._halve_rows()
            return loss
        while is_trial and self.can_split and not self.is_shared:
            loss = self._try(step, batch, compute_loss, sync=False)
            self._clear_gradients()
            if not holds_anywhere(loss is None, self.accelerator):
                break
            self._halve_rows()
        return self._compute(step, batch, compute_loss, sync=True)

    def _try(self, step, batch, compute_loss, sync):
        """What `_compute` returns, or None where memory runs out and fewer rows can be tried."""
        try:
            return self._compute(step, batch, compute_loss, sync)
        except torch.cuda.OutOfMemoryError:
            if self.device_batch_size == 1 or not self.can_split:
                raise
        return None

    def _compute(self, step, batch, compute_loss, sync):
        accelerator, share = self.accelerator, self.share
        key, losses = (self.config.seed, step, "noise"), []
        if self.can_graph and self.device_batch_size == share:
            return self._replay(key, batch, compute_loss)
        for first in range(0, share, self.device_batch_size):
            last = min(first + self.device_batch_size, share)
            part = {name: value[first:last] for name, value in batch.items()}
            waits = sync and last == share  # gradients meet after the last part
            with contextlib.nullcontext() if waits else accelerator.no_sync(self.model):
                losses.append(self._compute_part(part, self._build_random(key, first, last),
                                                 compute_loss))
        return torch.stack(losses).sum()

    def _replay(self, key, batch, compute_loss):
        """All rows at once, by a CUDA graph."""
        if self.graph is None:
            random = self._build_random(key, 0, self.share)
            params = [param for param in self.module.parameters() if param.requires_grad]
            self.graph = GraphedGradients(
                lambda batch: self._compute_part(batch, random, compute_loss), params,
                random.generator)
        self.graph.generator.manual_seed(derive_seed(*key))
        return self.graph(batch)

    def _compute_part(self, part, random, compute_loss):
        """Adds the gradients of the rows `part`; their loss, as a part of the batch's."""
        loss = compute_loss(self.model, part, random).mean()
        loss = loss * (len(next(iter(part.values()))) / self.share)
        self.accelerator.backward(loss)
        return loss.detach()

    def _build_random(self, key, first, last):
        """The random numbers of the rows `first` to `last` of this process."""
        offset = self.accelerator.process_index * self.share
        return BatchRandom(*key, batch_size=self.config.batch_size, device=self.accelerator.device,
                           rows=slice(offset + first, offset + last))

    def _halve_rows(self):
        self.graph = None
        self._clear_gradients()
        torch.cuda.empty_cache()
        before, self.device_batch_size = self.device_batch_size, -(-self.device_batch_size // 2)
        if self.accelerator.is_main_process:
            tqdm.write(f"out of memory with {before} rows at a time: now {self.device_batch_size} "
                       f"(--device_batch_size {self.device_batch_size} starts with these)")

    def _clear_gradients(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def update_weights(self, step, lr_factor):
        """Clips the gradients, steps, updates the average. Returns the gradients' norm, left on
        the device."""
        accelerator, config = self.accelerator, self.config
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        norm = gather(accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        take_step([optimizer.optimizer for optimizer in self.optimizers], norm, accelerator.scaler)
        self._clear_gradients()
        update_average(self.average, self.module, compute_ema_decay(config.ema_decay, step))
        if self.snapshots:
            self.snapshots.update(step + 1)
        return norm.detach()

    def collect(self):
        """What a checkpoint holds of it, whole, in the first process. Every process has to call
        this and the next method where the network is sharded."""
        scaler = self.accelerator.scaler
        return gather_state({
            "module": self.module.state_dict(), "ema": self.average.state_dict(),
            "snapshots": self.snapshots.state_dict() if self.snapshots else {},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": scaler.state_dict() if scaler else {}}, self.accelerator.is_main_process)

    def collect_average(self):
        """The averaged weights by name, whole, in the first process."""
        return gather_state(self.average.state_dict(), self.accelerator.is_main_process)

    def collect_snapshots(self):
        """{length: weights by name} for `save_snapshot`, whole, in the first process."""
        return gather_state(self.snapshots.collect(), self.accelerator.is_main_process)

    def load(self, saved):
        """Takes what `collect` gave, in every process."""
        load_module(self.module, saved["module"])
        load_module(self.average, saved["ema"])
        if self.snapshots and saved["snapshots"]:
            self.snapshots.load_state_dict(saved["snapshots"])
        for optimizer, of_optimizer in zip(self.optimizers, saved["optimizers"], strict=True):
            load_optimizer(optimizer, of_optimizer)
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


def take_step(optimizers, grad_norm, scaler=None):
    """A step of torch's optimizers, left out where the gradient is not finite: with fp16 the scaler
    skips it, otherwise the optimizers read it on the device."""
    if scaler is None:
        found_inf = 1 - torch.isfinite(grad_norm).float()
        for optimizer in optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
        return
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()  # once: it belongs to the step, not to an optimizer


@torch.no_grad()
def update_average(average, module, decay):
    """Moves the weights of `average` towards those of `module`; its buffers are copies. torch's
    AveragedModel keeps the count of its updates on the device and waits for it at every step."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for kept, buffer in zip(average.buffers(), module.buffers()):
        kept.copy_(buffer)


def compute_ema_decay(ema_decay, step):
    """The average's decay at `step` (from 0): 0, then growing as (1 + n) / (10 + n) up to
    `ema_decay`, so that the random start is forgotten soon."""
    return min(ema_decay, (1 + step) / (10 + step)) if step else 0.0


def count_rows(batch_size, num_processes):
    """Rows of a global batch for one process; UserError where it does not divide."""
    if batch_size % num_processes:
        raise UserError(f"{batch_size} does not divide among {num_processes} "
                        "processes", "batch_size")
    return batch_size // num_processes


@contextlib.contextmanager
def explain_memory(can_split, can_checkpoint):
    """Turns CUDA's lack of memory into a UserError that names the flags that help."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        argument = "device_batch_size" if can_split else "batch_size"
        advice = ", or --gradient_checkpointing" if can_checkpoint else ""
        advice += ", or --fsdp on more devices" if can_split else ""
        raise UserError(f"out of GPU memory; take fewer rows at a time{advice}", argument) \
            from error
