"""The one training loop, for CLIP, prior and every decoder stage.

A stage is a module, a function that draws its batches and a function that gives their loss. The
loop accumulates, clips, steps, averages, logs, validates, saves and resumes.
"""

import contextlib
import copy
import json
import math
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from dalle2.checkpoint import load_newest_checkpoint, save_checkpoint
from dalle2.config import UserError
from dalle2.ema import PowerAverages, save_snapshot
from dalle2.files import hold_lock, replace_file
from dalle2.images import save_jpeg
from dalle2.logger import MetricsLog
from dalle2.optimizer import build_optimizers
from dalle2.plots import save_curves
from dalle2.rng import BatchRandom
from dalle2.sharding import (
    broadcast_state,
    gather,
    gather_state,
    load_module,
    load_optimizer,
    shard,
)

LOG_EVERY = 25
SHOWN = "loss", "val_loss", "val_cosine", "recall@1"  # beside the progress bar
MAX_BAD_STEPS = 20     # in a row without a finite gradient; fp16 needs a few to find its scale
BATCHES_AHEAD = 3      # that are drawn while the device computes
TRIAL_STEPS = 2        # in which several processes look whether their rows fit into memory
MAY_CHANGE = {  # what a resumed run may set otherwise
    "num_steps", "save_every", "save_minutes", "validate_every", "snapshot_every",
    "mixed_precision", "device_batch_size", "gradient_checkpointing", "channels_last", "compile",
    "fsdp"}


def train(
    *,
    module,          # network to train, on the CPU
    compute_loss,    # (module, batch, BatchRandom on the device) -> loss, a scalar or (B,)
    draw_batch,      # (step, rows, BatchRandom on the CPU) -> dict of tensors; rows is a slice
    train_config,    # TrainConfig
    run_dir,         # folder for config.json, metrics.jsonl, curves.png, checkpoints/, samples/
    header,          # what the run is, as JSON: written to config.json, compared on resuming
    accelerator,     # accelerate.Accelerator
    export,          # (state dict of the averaged weights, step, last): writes the exported file
    validate=None,   # (module, brief) -> {name: number} with "val_loss"; brief: only the losses
    sample=None,     # (averaged module) -> a picture for samples/, (3, H, W) in [0, 1], or None
    list_blocks=lambda module: (),  # its blocks, with --fsdp gathered one by one
    can_split=True,  # whether the loss of a batch is the mean of the losses of its rows
    log_with="tensorboard",  # "tensorboard", "wandb" or "none", beside metrics.jsonl
):
    """Trains until `train_config.num_steps`, starting from the newest checkpoint in `run_dir`.

    Every process calls it and takes the same path through it; files are written by the first.
    SIGTERM and SIGINT save, then exit with 128 + the signal's number. Raises UserError where the
    run cannot continue, with the last good checkpoint kept.
    """
    c, run_dir, is_main = train_config, Path(run_dir), accelerator.is_main_process
    rows = find_own_rows(c.batch_size, accelerator)
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(hold_lock(run_dir / ".lock", wait=False, told=UserError(
                f"--output_dir: {run_dir} is in use by another process")))
        stop = stack.enter_context(catch_signals())
        stack.enter_context(explain_memory(can_split))
        trained = TrainState(module, c, accelerator, list_blocks, can_split)

        # ---- resume: the first process reads, so that the others need no run folder
        start, best = 0, {"step": 0, "val_loss": math.inf}
        state = load_newest_checkpoint(run_dir / "checkpoints") if is_main else None
        state = broadcast_state(state, accelerator)
        if state is not None:
            check_same_run(state["header"], header, run_dir)
            trained.load_state(state)
            start, best = state["step"], state["best"]
            del state

        if start >= c.num_steps:
            accelerator.print(f"{run_dir}: finished, {start} of {c.num_steps} steps done")
            average = trained.collect_average()
            if is_main:
                export(average, start, last=best["step"] > 0)
            return
        accelerator.print(f"{run_dir}: step {start} to {c.num_steps} on {trained}")
        log = None
        if is_main:
            replace_file(run_dir / "config.json",
                         lambda part: part.write_text(json.dumps(header, indent=2)))
            log = stack.enter_context(MetricsLog(run_dir, start, log_with, header))
        if holds_anywhere(sample is None, accelerator):  # a stage before this one is not there
            sample = None

        # ---- steps
        pending = []  # (step, lr, loss, gradient norm), tensors until they are written
        bad_steps, stopped = 0, False
        saved_at = pending_since = time.monotonic()
        progress = stack.enter_context(tqdm(
            total=c.num_steps, initial=start, desc=str(run_dir), unit="step", disable=not is_main,
            mininterval=0.1 if sys.stderr.isatty() else 10))
        batches = stack.enter_context(draw_ahead(draw_batch, c, rows, start, accelerator.device))
        for step, batch in batches:
            trained.model.train()
            lr_factor = compute_lr_factor(c, step)
            loss = trained.compute_gradients(step, batch, compute_loss,
                                             is_trial=step < start + TRIAL_STEPS)
            grad_norm = trained.update_weights(step, lr_factor)
            pending.append((step + 1, c.lr * lr_factor, loss, grad_norm))
            progress.update()

            # ---- what is due
            done = step + 1
            stopped = agree_to_stop(stop, done, accelerator)
            ends = done == c.num_steps or stopped
            validates = validate and (done == c.num_steps or done % c.validate_every == 0)
            snapshots = c.snapshot_every and done % c.snapshot_every == 0
            saves = ends or done % c.save_every == 0
            if not (saves or validates or snapshots or done % LOG_EVERY == 0):
                continue
            metrics = collect_rows(pending, pending_since, accelerator, c.batch_size)
            bad_steps, pending = count_bad_steps(metrics, bad_steps, run_dir), []
            if c.save_minutes:
                minutes = (time.monotonic() - saved_at) / 60
                saves |= holds_anywhere(minutes > c.save_minutes, accelerator)

            # ---- validate; the best weights are those that are used
            is_best = False
            if validates:
                metrics[-1].update(run_validation(validate, trained.module, trained.average))
                is_best = metrics[-1]["val_loss"] < best["val_loss"]
                if is_best:
                    best = {"step": done, "val_loss": metrics[-1]["val_loss"]}
            if is_main:
                log.write(metrics)
                progress.set_postfix({name: f"{value:.4f}" for name, value in metrics[-1].items()
                                      if name in SHOWN})

            # ---- export, save, sample
            if is_best or saves:
                average = trained.collect_average()
                if is_main and (is_best or not best["step"]):
                    export(average, done, last=False)
                if is_main and saves and best["step"]:
                    export(average, done, last=True)
                del average
            if snapshots:
                averages = trained.collect_snapshots()
                if is_main:
                    save_snapshot(run_dir, done, averages, header)
                del averages
            if saves:
                state = {"step": done, "header": header, "best": best, **trained.collect_state()}
                if is_main:
                    save_checkpoint(run_dir / "checkpoints", state, must=ends)
                    save_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
                del state
                saved_at = time.monotonic()
            if saves and sample and not stopped and (is_main or trained.is_shared):
                trained.average.eval()
                picture = sample(trained.average)
                if is_main and picture is not None:
                    save_jpeg(picture, run_dir / "samples" / f"step_{done:08d}.jpg")
            if stopped:
                break
            pending_since = time.monotonic()
        accelerator.wait_for_everyone()
    if stopped:
        accelerator.print(f"{run_dir}: stopped and saved at step {done}; the same command resumes")
        sys.exit(128 + stop[0])


# ----------------------------------------------------------------------------------------------
# a network in training


class TrainState:
    """A network with the average of its weights and its optimizers, on the device, whole or shared
    out among the processes. `model` is what computes gradients, `module` the network itself.
    `device_batch_size` rows are computed at a time."""

    def __init__(self, module, config, accelerator, list_blocks=lambda module: (), can_split=True):
        self.config, self.accelerator, self.can_split = config, accelerator, can_split
        self.is_shared = config.fsdp and accelerator.num_processes > 1
        share = count_rows(config.batch_size, accelerator.num_processes)
        self.device_batch_size = min(config.device_batch_size or share, share) if can_split \
            else share
        memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        module = module.to(accelerator.device, memory_format=memory_format)
        self.average = copy.deepcopy(module).requires_grad_(False)
        if config.compile:
            module.compile()
        if self.is_shared:
            for network in (module, self.average):
                shard(network, list_blocks(network), accelerator.device)
        # evaluation_mode: without DDP, which FSDP stands in for
        self.model = accelerator.prepare_model(module, evaluation_mode=self.is_shared)
        self.optimizers = [accelerator.prepare(o) for o in build_optimizers(module, config)]
        self.module = accelerator.unwrap_model(self.model)
        self.snapshots = PowerAverages(self.module) if config.snapshot_every else None

    def __str__(self):
        sharing = "weights shared out, " if self.is_shared else ""
        return (f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {sharing}"
                f"{self.device_batch_size} rows at a time, "
                f"precision {self.accelerator.mixed_precision}")

    def compute_gradients(self, step, batch, compute_loss, is_trial=False):
        """Gradients of `batch`, this process's rows of the batch of `step`, `device_batch_size`
        rows at a time. Returns the mean loss, left on the device: nothing here waits for it.

        Where memory runs out, the rows are halved and the batch is computed again: the sum of the
        gradients is the same. One process does so at any step; several, that meet in the middle of
        a step to add up their gradients, do so in trials, which leave no gradients behind.
        """
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
        accelerator, config = self.accelerator, self.config
        share = count_rows(config.batch_size, accelerator.num_processes)
        losses = []
        for first in range(0, share, self.device_batch_size):
            last = min(first + self.device_batch_size, share)
            part = {name: value[first:last] for name, value in batch.items()}
            offset = accelerator.process_index * share
            random = BatchRandom(config.seed, step, "noise", batch_size=config.batch_size,
                                 rows=slice(offset + first, offset + last),
                                 device=accelerator.device)
            waits = sync and last == share  # gradients meet after the last part
            with contextlib.nullcontext() if waits else accelerator.no_sync(self.model):
                loss = compute_loss(self.model, part, random).mean() * ((last - first) / share)
                accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _halve_rows(self):
        self._clear_gradients()
        torch.cuda.empty_cache()
        before, self.device_batch_size = self.device_batch_size, -(-self.device_batch_size // 2)
        if self.accelerator.is_main_process:
            tqdm.write(f"out of memory with {before} rows at a time: now {self.device_batch_size} "
                       f"(--device_batch_size {self.device_batch_size} starts with so many)")

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

    def collect_state(self):
        """What a checkpoint holds of it, whole, in the first process. Every process has to call
        this and the next method where the network is shared out."""
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

    def load_state(self, state):
        load_module(self.module, state["module"])
        load_module(self.average, state["ema"])
        if self.snapshots and state["snapshots"]:
            self.snapshots.load_state_dict(state["snapshots"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def take_step(optimizers, grad_norm, scaler=None):
    """A step of torch's optimizers, left out where the gradient is not finite: with fp16 the scaler
    sees to that, otherwise the optimizers are told on the device."""
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


# ----------------------------------------------------------------------------------------------
# batches


@contextlib.contextmanager
def draw_ahead(draw_batch, config, rows, start, device):
    """An iterator over (step, batch) from step `start`. A thread draws BATCHES_AHEAD batches while
    the device computes; a batch is a function of its step, so it is the same batch."""
    def draw(step):
        random = BatchRandom(config.seed, step, "data", batch_size=config.batch_size, rows=rows)
        batch = draw_batch(step, rows, random)
        if device.type == "cuda":  # from pinned memory a copy to the GPU keeps nobody waiting
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch

    def iterate():
        drawn = deque()
        for step in range(start, config.num_steps):
            drawn.append((step, pool.submit(draw, step)))
            if len(drawn) > BATCHES_AHEAD:
                step, future = drawn.popleft()
                yield step, future.result()
        for step, future in drawn:
            yield step, future.result()
    with ThreadPoolExecutor(1, "draw") as pool:
        try:
            yield iterate()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def find_own_rows(batch_size, accelerator):
    """This process's slice of a global batch; UserError where it does not divide."""
    share = count_rows(batch_size, accelerator.num_processes)
    return slice(share * accelerator.process_index, share * (accelerator.process_index + 1))


def count_rows(batch_size, num_processes):
    """Rows of a global batch for one process; UserError where it does not divide."""
    if batch_size % num_processes:
        raise UserError(f"--batch_size: {batch_size} does not divide among {num_processes} "
                        "processes")
    return batch_size // num_processes


# ----------------------------------------------------------------------------------------------
# small parts


@contextlib.contextmanager
def catch_signals():
    """Yields a list that the number of a SIGTERM or SIGINT is put into; restored afterwards."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, lambda got, frame: caught.append(got)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def agree_to_stop(caught, step, accelerator):
    """Whether a signal came, the same answer in all processes; several look every tenth step."""
    if accelerator.num_processes > 1 and step % 10:
        return False
    stop = holds_anywhere(bool(caught), accelerator)
    if stop and not caught:
        caught.append(signal.SIGTERM)
    return stop


def holds_anywhere(condition, accelerator):
    """Whether `condition` holds in any process, the same answer in all."""
    if accelerator.num_processes == 1:
        return condition
    count = accelerator.reduce(torch.tensor(float(condition), device=accelerator.device), "sum")
    return bool(count)


@contextlib.contextmanager
def explain_memory(can_split):
    """Turns CUDA's lack of memory into a UserError that names the flags that help."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        flag = "device_batch_size" if can_split else "batch_size"
        advice = ", or --gradient_checkpointing, or --fsdp on more devices" if can_split else ""
        raise UserError(f"--{flag}: out of GPU memory; take fewer rows at a time{advice}") \
            from error


def count_bad_steps(rows, before, run_dir):
    """Marks the skipped steps in `rows`; how many in a row lie behind now. UserError where that is
    MAX_BAD_STEPS."""
    for row in rows:
        finite = math.isfinite(row["grad_norm"])
        before = 0 if finite else before + 1
        if not finite:
            row["skipped"] = True
        if before == MAX_BAD_STEPS:
            raise UserError(f"--lr: {run_dir}: no finite gradient in {before} steps up to step "
                            f"{row['step']}; a lower learning rate, a longer warm-up or "
                            "--mixed_precision no or bf16 may help. The last checkpoint is kept")
    return before


def run_validation(validate, module, average):
    """Metrics of the averaged weights, and the losses of the raw ones with "_raw" at the end."""
    average.eval()
    row = validate(average, brief=False)
    module.eval()
    return row | {f"{name}_raw": value for name, value in validate(module, brief=True).items()}


def compute_lr_factor(config, step):
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then cosine to zero or
    constant."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "constant":
        return warmup
    rest = max(1, config.num_steps - config.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * max(0, step - config.warmup_steps) / rest))


def check_same_run(saved, wanted, run_dir):
    """Raises UserError naming the fields in which a checkpoint's header differs from this run's."""
    saved, wanted = flatten(saved), flatten(wanted)
    differ = sorted(name for name in saved.keys() | wanted.keys()
                    if saved.get(name) != wanted.get(name)
                    and name.rsplit(".", 1)[-1] not in MAY_CHANGE)
    if differ:
        changes = "; ".join(f"{n}: {saved.get(n)} before, {wanted.get(n)} now" for n in differ[:4])
        raise UserError(f"--output_dir: {run_dir} holds a run with other settings ({changes}); "
                        "choose another folder or the same settings")


def flatten(value, prefix=""):
    """Nested dicts and lists as {"a.b.0": leaf}."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in pairs
                for name, leaf in flatten(part, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: value}


def collect_rows(pending, since, accelerator, batch_size):
    """The pending steps, begun at the time `since`, as metrics rows; losses averaged over all
    processes."""
    losses = torch.stack([loss for _, _, loss, _ in pending]).float()
    losses = accelerator.reduce(losses, "mean").tolist()
    rate = len(pending) * batch_size / (time.monotonic() - since)  # the line above has waited
    return [{"step": step, "samples_seen": step * batch_size, "loss": loss, "lr": lr,
             "grad_norm": float(norm), "samples_per_sec": round(rate, 1)}
            for (step, lr, _, norm), loss in zip(pending, losses)]
