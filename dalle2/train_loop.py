"""The one training loop, for CLIP, prior and every decoder stage.

A stage is a module, a function that draws its batches and a function that gives their loss. The
loop accumulates, clips, steps, averages, logs, validates, saves and resumes.
"""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dalle2.checkpoint import load_newest_checkpoint, save_checkpoint
from dalle2.config import UserError
from dalle2.files import hold_lock, replace_file
from dalle2.images import save_jpeg
from dalle2.logger import MetricsLog
from dalle2.optimizer import build_optimizers
from dalle2.plots import save_curves
from dalle2.rng import BatchRandom
from dalle2.sharding import gather, gather_state, load_module, load_optimizer, shard

LOG_EVERY = 25
SHOWN = "loss", "val_loss", "val_cosine", "recall@1"  # beside the progress bar
MAX_BAD_STEPS = 20     # in a row without a finite gradient; fp16 needs a few to find its scale
MAY_CHANGE = {  # what a resumed run may set otherwise
    "num_steps", "save_every", "save_minutes", "validate_every", "mixed_precision",
    "gradient_accumulation_steps", "compile", "fsdp"}


def train(
    *,
    module,          # network to train, on the CPU
    compute_loss,    # (module, batch, BatchRandom on the device) -> loss, a scalar or (B,)
    draw_batch,      # (step, rows, BatchRandom on the CPU) -> dict of tensors; rows is a slice
    train_config,    # TrainConfig
    run_dir,         # folder for config.json, metrics.jsonl, curves.png, checkpoints/, samples/
    header,          # what the run is, as JSON: written to config.json, compared on resuming
    accelerator,     # accelerate.Accelerator
    export,          # (state dict of the averaged weights, step, best): writes the exported file
    validate=None,   # (module, brief) -> {name: number} with "val_loss"; brief: only the losses
    sample=None,     # (averaged module) -> a picture for samples/, (3, H, W) in [0, 1], or None
    list_blocks=lambda module: (),  # its blocks, with --fsdp gathered one by one
    log_with="tensorboard",  # "tensorboard", "wandb" or "none", beside metrics.jsonl
):
    """Trains until `train_config.num_steps`, going on from the newest checkpoint in `run_dir`.

    SIGTERM and SIGINT save, then exit with 128 + the signal's number. Raises UserError where the
    run cannot go on, with the last good checkpoint kept.
    """
    c, run_dir, is_main = train_config, Path(run_dir), accelerator.is_main_process
    export = export if is_main else do_nothing
    count_rows(c, accelerator.num_processes)  # a batch that does not divide is told before anything
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(hold_lock(run_dir / ".lock", wait=False, told=UserError(
                f"--output_dir: {run_dir} is in use by another process")))
        stop = stack.enter_context(catch_signals())
        stack.enter_context(explain_memory(c))
        trained = Trained(module, c, accelerator, list_blocks)

        # ---- resume
        start, best = 0, {"step": 0, "val_loss": math.inf}
        state = load_newest_checkpoint(run_dir / "checkpoints")
        if state is not None:
            check_same_run(state["header"], header, run_dir)
            trained.load_state(state)
            start, best = state["step"], state["best"]
            del state

        if start >= c.num_steps:
            accelerator.print(f"{run_dir}: finished, {start} of {c.num_steps} steps done")
            return export(trained.collect_average(), start, best=False)
        accelerator.print(f"{run_dir}: step {start} to {c.num_steps} on {trained}")
        if is_main:
            replace_file(run_dir / "config.json",
                         lambda part: part.write_text(json.dumps(header, indent=2)))
            log = stack.enter_context(MetricsLog(run_dir, start, log_with, header))

        # ---- steps
        pending = []  # (step, lr, loss, gradient norm), tensors until they are written
        bad_steps, stopped = 0, False
        saved_at = pending_since = time.monotonic()
        progress = stack.enter_context(tqdm(
            total=c.num_steps, initial=start, desc=str(run_dir), unit="step", disable=not is_main,
            mininterval=0.1 if sys.stderr.isatty() else 10))
        for step in range(start, c.num_steps):
            if stopped:
                break
            trained.model.train()
            lr_factor = compute_lr_factor(c, step)
            loss = compute_gradients(trained.model, accelerator, c, step, draw_batch, compute_loss)
            grad_norm = update_weights(trained.model, trained.optimizers, accelerator, c, lr_factor)
            trained.average.update_parameters(trained.module)
            pending.append((step + 1, c.lr * lr_factor, loss, grad_norm))
            progress.update()

            # ---- log, validate, save: the first process, or all, where all hold a share
            done = step + 1
            stopped = agree_to_stop(stop, done, accelerator)
            ends = done == c.num_steps or stopped
            validates = validate and (done == c.num_steps or done % c.validate_every == 0)
            saves = ends or done % c.save_every == 0
            if not (saves or validates or done % LOG_EVERY == 0):
                continue
            rows = collect_rows(pending, pending_since, accelerator, c.batch_size)
            bad_steps, pending = count_bad_steps(rows, bad_steps, run_dir), []
            if c.save_minutes:
                minutes = (time.monotonic() - saved_at) / 60
                saves |= holds_anywhere(minutes > c.save_minutes, accelerator)
            saved_at = time.monotonic() if saves else saved_at
            if not (is_main or trained.is_shared):
                continue
            if validates:
                row = run_validation(validate, trained.module, trained.average)
                if trained.is_shared:
                    (row,) = broadcast_object_list([row])  # one answer to whether it is the best
                rows[-1].update(row)
                if row["val_loss"] < best["val_loss"]:
                    best = {"step": done, "val_loss": row["val_loss"]}
                    export(trained.collect_average(), done, best=True)
            if is_main:
                log.write(rows)
                progress.set_postfix({name: f"{value:.4f}" for name, value in rows[-1].items()
                                      if name in SHOWN})
            if saves:
                state = {"step": done, "header": header, "best": best, **trained.collect_state()}
                if is_main:
                    save_checkpoint(run_dir / "checkpoints", state, must=ends)
                    save_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
                del state
                export(trained.collect_average(), done, best=False)
                picture = sample(trained.average.module) if sample and not stopped else None
                if is_main and picture is not None:
                    save_jpeg(picture, run_dir / "samples" / f"step_{done:08d}.jpg")
            pending_since = time.monotonic()
        accelerator.wait_for_everyone()
    if stopped:
        accelerator.print(f"{run_dir}: stopped and saved at step {done}; the same command goes on")
        sys.exit(128 + stop[0])


# ----------------------------------------------------------------------------------------------
# its parts


class Trained:
    """A network with the average of its weights and its optimizers, on the device, whole or shared
    out among the processes. `model` is what computes gradients, `module` the network itself."""

    def __init__(self, module, config, accelerator, list_blocks):
        self.accelerator = accelerator
        self.is_shared = config.fsdp and accelerator.num_processes > 1
        module = module.to(accelerator.device)
        self.average = AveragedModel(module, multi_avg_fn=build_ema_function(config.ema_decay))
        if config.compile:
            module.compile()
        if self.is_shared:
            for network in (module, self.average.module):
                shard(network, list_blocks(network), accelerator.device)
        # evaluation_mode: without DDP, which FSDP stands in for
        self.model = accelerator.prepare_model(module, evaluation_mode=self.is_shared)
        self.optimizers = [accelerator.prepare(o) for o in build_optimizers(module, config)]
        self.module = accelerator.unwrap_model(self.model)

    def __str__(self):
        way = "weights shared out, " if self.is_shared else ""
        return (f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {way}"
                f"precision {self.accelerator.mixed_precision}")

    def collect_state(self):
        """What a checkpoint holds of it, whole, in the first process. Every process has to call
        this and the next method where the network is shared out."""
        scaler = self.accelerator.scaler
        return gather_state({
            "module": self.module.state_dict(), "ema": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": scaler.state_dict() if scaler else {}}, self.accelerator.is_main_process)

    def collect_average(self):
        """The averaged weights by name, whole, in the first process."""
        return gather_state(self.average.module.state_dict(), self.accelerator.is_main_process)

    def load_state(self, state):
        load_module(self.module, state["module"])
        load_module(self.average, state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def do_nothing(*args, **kwargs):
    pass


def compute_gradients(model, accelerator, config, step, draw_batch, compute_loss):
    """Gradients of `step`, in `gradient_accumulation_steps` parts. Returns this process's mean
    loss, left on the device: nothing here waits for it."""
    losses, parts = [], config.gradient_accumulation_steps
    size = count_rows(config, accelerator.num_processes)
    for part in range(parts):
        first = (part * accelerator.num_processes + accelerator.process_index) * size
        rows = slice(first, first + size)
        key = dict(batch_size=config.batch_size, rows=rows)
        batch = draw_batch(step, rows, BatchRandom(config.seed, step, "data", **key))
        batch = {name: move(value, accelerator.device) for name, value in batch.items()}
        with contextlib.nullcontext() if part == parts - 1 else accelerator.no_sync(model):
            loss = compute_loss(model, batch, BatchRandom(
                config.seed, step, "noise", device=accelerator.device, **key)).mean()
            accelerator.backward(loss / parts)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def update_weights(model, optimizers, accelerator, config, lr_factor):
    """Clips the gradients, steps and forgets them. Returns their norm, left on the device."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
    grad_norm = gather(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if accelerator.scaler is None:
        skip_unless_finite(optimizers, grad_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return grad_norm.detach()


def move(tensor, device):
    """`tensor` on `device`, without waiting where it goes to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
def explain_memory(config):
    """Turns CUDA's lack of memory into a UserError that names the flags that help."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        parts = config.gradient_accumulation_steps
        raise UserError(f"--gradient_accumulation_steps: out of GPU memory; {2 * parts} instead of "
                        f"{parts} halves what a step needs, a --batch_size below "
                        f"{config.batch_size} too") from error


def skip_unless_finite(optimizers, grad_norm):
    """Tells the optimizers, on the device, to leave weights and moments alone at this step if the
    gradient is not finite."""
    found_inf = 1 - torch.isfinite(grad_norm).float()
    for optimizer in optimizers:
        optimizer.optimizer.found_inf = found_inf


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
    row = validate(average.module, brief=False)
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


def build_ema_function(decay):
    """multi_avg_fn for AveragedModel: its decay grows as (1 + n) / (10 + n) up to `decay`, so that
    the random start is forgotten soon."""
    @torch.no_grad()
    def update(averaged, current, num_averaged):
        n = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
    return update


def count_rows(config, num_processes):
    """Rows of the global batch for one process and accumulation step; UserError if uneven."""
    parts = num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(f"--batch_size: {config.batch_size} does not divide among {num_processes} "
                        f"processes x {config.gradient_accumulation_steps} accumulation steps")
    return config.batch_size // parts


def check_same_run(saved, wanted, run_dir):
    """Raises UserError naming the fields in which a checkpoint's header differs from this run's."""
    saved, wanted = flatten(saved), flatten(wanted)
    differ = sorted(name for name in saved.keys() | wanted.keys()
                    if saved.get(name) != wanted.get(name)
                    and name.rsplit(".", 1)[-1] not in MAY_CHANGE)
    if differ:
        told = "; ".join(f"{n}: {saved.get(n)} before, {wanted.get(n)} now" for n in differ[:4])
        raise UserError(f"--output_dir: {run_dir} holds a run with other settings ({told}); "
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
