"""The one training loop, for CLIP, prior and every decoder stage.

A stage is a module, a function that draws its batches and a function that gives their loss. The
loop accumulates, clips, steps, averages, logs, validates, saves and resumes.
"""

import contextlib
import json
import math
import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dalle2.checkpoint import load_newest_checkpoint, replace_file, save_checkpoint
from dalle2.config import UserError
from dalle2.logger import MetricsLog
from dalle2.rng import BatchRandom

LOG_EVERY = 25
MAY_CHANGE = ("num_steps", "save_every", "validate_every", "gradient_accumulation_steps",
              "mixed_precision")  # train settings that a resumed run may set anew


def train(
    *,
    module,          # network to train, on the CPU
    compute_loss,    # (module, batch, BatchRandom on the device) -> loss, a scalar or (B,)
    draw_batch,      # (step, rows, BatchRandom on the CPU) -> dict of tensors; rows is a slice
    train_config,    # TrainConfig
    run_dir,         # folder for config.json, metrics.jsonl, checkpoints/, samples/
    header,          # what the run is, as JSON: written to config.json, compared on resuming
    accelerator,     # accelerate.Accelerator
    export,          # (state dict of the averaged weights, step): writes the exported file
    validate=None,   # averaged module -> {name: number}
    sample=None,     # (averaged module, path of a JPEG): draws pictures
):
    """Trains until `train_config.num_steps`, going on from the newest checkpoint in `run_dir`."""
    c, run_dir, device = train_config, Path(run_dir), accelerator.device
    is_main = accelerator.is_main_process

    # ---- model, average, optimizer
    module = module.to(device)
    ema = AveragedModel(module, multi_avg_fn=build_ema_function(c.ema_decay))
    optimizer = torch.optim.AdamW(split_weight_decay(module, c.weight_decay), lr=c.lr,
                                  betas=(0.9, c.adam_beta2), fused=True)
    model, optimizer = accelerator.prepare(module, optimizer)
    module = accelerator.unwrap_model(model)

    # ---- resume
    start = 0
    state = load_newest_checkpoint(run_dir / "checkpoints")
    if state is not None:
        check_same_run(state["header"], header, run_dir)
        module.load_state_dict(state["module"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        start = state["step"]
        del state
    if start >= c.num_steps:
        accelerator.print(f"{run_dir}: finished, {start} of {c.num_steps} steps done")
        if is_main:
            export(ema.module.state_dict(), start)
        return
    if is_main:
        replace_file(run_dir / "config.json",
                     lambda part: part.write_text(json.dumps(header, indent=2)))
        log = MetricsLog(run_dir / "metrics.jsonl", start)
    size = count_rows(c, accelerator.num_processes)

    # ---- steps
    pending = []  # (step, lr, loss, gradient norm), tensors until they are written
    progress = tqdm(total=c.num_steps, initial=start, desc=str(run_dir), unit="step",
                    disable=not is_main, mininterval=0.1 if sys.stderr.isatty() else 10)
    for step in range(start, c.num_steps):
        model.train()
        lr = compute_lr(c, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for micro_step in range(c.gradient_accumulation_steps):
            first = (micro_step * accelerator.num_processes + accelerator.process_index) * size
            rows = slice(first, first + size)
            key = dict(batch_size=c.batch_size, rows=rows)
            batch = draw_batch(step, rows, BatchRandom(c.seed, step, "data", **key))
            batch = {name: value.to(device) for name, value in batch.items()}
            last = micro_step == c.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = compute_loss(
                    model, batch, BatchRandom(c.seed, step, "noise", device=device, **key)).mean()
                accelerator.backward(loss / c.gradient_accumulation_steps)
            losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), c.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(module)
        pending.append((step + 1, lr, torch.stack(losses).mean(), grad_norm.detach()))
        progress.update()

        # ---- log, validate, save
        done = step + 1
        ends = done == c.num_steps
        row = {}
        if validate and (ends or done % c.validate_every == 0):
            ema.eval()
            row = validate(ema.module) if is_main else {}
        if ends or row or done % LOG_EVERY == 0 or done % c.save_every == 0:
            rows = collect_rows(pending, accelerator, c.batch_size, progress)
            pending = []
            if is_main:
                rows[-1].update(row)
                log.write(rows)
                progress.set_postfix(loss=f"{rows[-1]['loss']:.4f}", **{
                    name: f"{value:.4f}" for name, value in row.items()})
        if is_main and (ends or done % c.save_every == 0):
            save_checkpoint(run_dir / "checkpoints", done, {
                "step": done, "header": header, "module": module.state_dict(),
                "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {}})
            ema.eval()
            export(ema.module.state_dict(), done)
            if sample:
                sample(ema.module, run_dir / "samples" / f"step_{done:08d}.jpg")
    progress.close()
    accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------------
# its parts


def compute_lr(config, step):
    """Learning rate of `step` (from 0): linear warm-up, then cosine to zero or constant."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "constant":
        return config.lr * warmup
    rest = max(1, config.num_steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (
        1 + math.cos(math.pi * max(0, step - config.warmup_steps) / rest))


def split_weight_decay(module, weight_decay):
    """Parameter groups: matrices and kernels decay; gains, biases and single vectors do not."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.squeeze().ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.squeeze().ndim < 2], "weight_decay": 0.0}]


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


def collect_rows(pending, accelerator, batch_size, progress):
    """The pending steps as metrics rows; losses averaged over all processes."""
    losses = torch.stack([loss for _, _, loss, _ in pending]).float()
    losses = accelerator.reduce(losses, "mean").tolist()
    rate = progress.format_dict["rate"] or 0
    return [{"step": step, "samples_seen": step * batch_size, "loss": loss, "lr": lr,
             "grad_norm": float(norm), "samples_per_sec": round(rate * batch_size, 1)}
            for (step, lr, _, norm), loss in zip(pending, losses)]
