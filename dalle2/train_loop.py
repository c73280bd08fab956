"""The one training loop, for CLIP, prior and every decoder stage.

It receives a network and a task (`dalle2.tasks`), which draws batches, computes their losses,
validates, samples and exports. The loop itself accumulates gradients, clips, steps, averages, logs,
saves and resumes.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from dalle2.config import get_default
from dalle2.errors import UserError
from dalle2.rng import BatchRandom
from dalle2.run_folder import RunFolder
from dalle2.sharding import broadcast_state, holds_anywhere
from dalle2.train_state import TrainState, count_rows, explain_memory

LOG_EVERY = 25
SHOWN = "loss", "val_loss", "val_cosine", "recall@1", "gpu_gb"  # beside the progress bar
MAX_BAD_STEPS = 20     # in a row without a finite gradient; fp16 needs a few to find its scale
BATCHES_AHEAD = 3      # that are drawn while the device computes
TRIAL_STEPS = 2        # in which several processes find out whether their rows fit into memory
MAY_CHANGE = {  # what a resumed run may set otherwise
    "num_steps", "save_every", "save_minutes", "validate_every", "snapshot_every",
    "mixed_precision", "device_batch_size", "gradient_checkpointing", "channels_last", "compile",
    "cuda_graphs", "fsdp",
    "sample_timesteps", "cond_scale", "num_candidates", "lowres_noise_level",  # how it is sampled
    "clip_pretrained", "relative_path"}  # where its CLIP lies; "fingerprint" says which one it is


def train(
    *,
    task,                    # what is trained: a Task of dalle2.tasks
    module,                  # its network, on the CPU
    run_dir,                 # for config.json, metrics.jsonl, curves.png, checkpoints/, samples/
    accelerator,             # accelerate.Accelerator: devices, precision, processes
    list_blocks=lambda module: (),  # parts of the network that --fsdp gathers one by one
    log_with="tensorboard",  # "tensorboard", "wandb" or "none", beside metrics.jsonl
):
    """Trains until `num_steps`, starting from the newest checkpoint in `run_dir`.

    Every process calls it and takes the same path through it; the first one reads and writes the
    run's folder. SIGTERM and SIGINT save, then exit with 128 + the signal's number. Returns False
    where nothing was left to train, otherwise True. Raises UserError where the run cannot continue,
    with the last good checkpoint kept.
    """
    c, header = task.config.train, task.describe_run()
    rows = find_own_rows(c.batch_size, accelerator)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(run_dir, accelerator.is_main_process))
        stop = stack.enter_context(catch_signals())
        stack.enter_context(explain_memory(
            task.can_split, hasattr(task.config, "gradient_checkpointing")))
        state = TrainState(module, c, accelerator, list_blocks, task.can_split)

        # ---- resume: the first process reads, so that the others need no run folder
        start, best = 0, {"step": 0, "score": math.inf}
        saved = broadcast_state(folder.load_checkpoint(), accelerator)
        if saved is not None:
            check_same_run(saved["header"], header, run_dir)
            state.load(saved)
            start, best = saved["step"], saved["best"]
            del saved
        if start >= c.num_steps:
            accelerator.print(f"{run_dir}: finished, {start} of {c.num_steps} steps done")
            task.export(state.collect_average(), start, last=best["step"] > 0)
            return False
        accelerator.print(f"{run_dir}: step {start} to {c.num_steps} on {state}")
        folder.begin(start, header, log_with)
        can_sample = not holds_anywhere(not task.can_sample, accelerator)

        # ---- steps
        pending = []  # (step, lr, loss, gradient norm), tensors until they are written
        bad_steps, stopped = 0, False
        saved_at = pending_since = time.monotonic()
        progress = stack.enter_context(show_progress(start, c.num_steps, run_dir, accelerator))
        batches = stack.enter_context(draw_ahead(task, rows, start, accelerator.device))
        for step, batch in batches:
            lr_factor = compute_lr_factor(c, step)
            loss = state.compute_gradients(step, batch, task.loss,
                                           is_trial=step < start + TRIAL_STEPS)
            grad_norm = state.update_weights(step, lr_factor)
            pending.append((step + 1, c.lr * lr_factor, loss, grad_norm))
            progress.update()

            # ---- what is due after this step
            done = step + 1
            stopped = agree_to_stop(stop, done, accelerator)
            ends = done == c.num_steps or stopped
            validates = task.num_val and (done == c.num_steps or done % c.validate_every == 0)
            snapshots = c.snapshot_every and done % c.snapshot_every == 0
            saves = ends or done % c.save_every == 0
            if not (saves or validates or snapshots or done % LOG_EVERY == 0):
                continue
            metrics = collect_metrics(pending, pending_since, accelerator, c.batch_size)
            bad_steps, pending = count_bad_steps(metrics, bad_steps, run_dir), []
            if c.save_minutes:
                minutes = (time.monotonic() - saved_at) / 60
                saves |= holds_anywhere(minutes > c.save_minutes, accelerator)

            # ---- validate and log
            is_best = False
            if validates:
                metrics[-1].update(run_validation(task, state.module, state.average))
                score = task.score(metrics[-1])
                is_best = score < best["score"]
                if is_best:
                    best = {"step": done, "score": score}
            folder.write_metrics(metrics)
            progress.set_postfix({name: f"{metrics[-1][name]:.4f}" for name in SHOWN
                                  if name in metrics[-1]})

            # ---- export: the best weights are those that are used, the last lie beside them
            if is_best or (saves and not best["step"]):
                task.export(state.collect_average(), done, last=False)
            if saves and best["step"]:
                task.export(state.collect_average(), done, last=True)
            if snapshots:
                folder.save_snapshots(done, state.collect_snapshots(), header)

            # ---- save, and draw pictures to look at
            if saves:
                folder.save_checkpoint({"step": done, "header": header, "best": best,
                                        **state.collect()}, must=ends)
                saved_at = time.monotonic()
            if saves and can_sample and not stopped and state.samples_here:
                folder.save_sample(done, task.sample(state.average.eval()))
            if stopped:
                break
            pending_since = time.monotonic()
        accelerator.wait_for_everyone()
    if stopped:
        accelerator.print(f"{run_dir}: stopped and saved at step {done}; the same command resumes")
        sys.exit(128 + stop[0])
    return True


# ----------------------------------------------------------------------------------------------
# batches


@contextlib.contextmanager
def draw_ahead(task, rows, start, device):
    """An iterator over (step, batch) from step `start`. A thread draws BATCHES_AHEAD batches while
    the device computes; a batch is a function of its step, so it is the same batch."""
    config = task.config.train

    def draw(step):
        random = BatchRandom(config.seed, step, "data", batch_size=config.batch_size, rows=rows)
        batch = task.draw(step, rows, random)
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


def count_bad_steps(rows, before, run_dir):
    """Marks the skipped steps in `rows`; how many in a row lie behind now. UserError where that is
    MAX_BAD_STEPS."""
    for row in rows:
        finite = math.isfinite(row["grad_norm"])
        before = 0 if finite else before + 1
        if not finite:
            row["skipped"] = True
        if before == MAX_BAD_STEPS:
            raise UserError(f"{run_dir}: no finite gradient in {before} steps up to step "
                            f"{row['step']}; a lower learning rate, a longer warm-up or "
                            "--mixed_precision no or bf16 may help. The last checkpoint is kept",
                            "lr")
    return before


def show_progress(start, num_steps, run_dir, accelerator):
    """The progress bar, shown by the first process; into a file a line every ten seconds."""
    return tqdm(total=num_steps, initial=start, desc=str(run_dir), unit="step",
                disable=not accelerator.is_main_process,
                mininterval=0.1 if sys.stderr.isatty() else 10)


def run_validation(task, module, average):
    """Metrics of the averaged weights, and the losses of the raw ones with "_raw" at the end. A
    network that --compile compiled for training is not compiled again for this."""
    average.eval()
    module.eval()
    with torch.compiler.set_stance("force_eager"):
        return task.validate(average, brief=False) | {
            f"{name}_raw": loss for name, loss in task.validate(module, brief=True).items()}


def compute_lr_factor(config, step):
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then cosine to zero or
    constant."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "constant":
        return warmup
    rest = max(1, config.num_steps - config.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * max(0, step - config.warmup_steps) / rest))


def check_same_run(saved, wanted, run_dir):
    """Raises UserError naming the fields in which a checkpoint's header differs from this run's. A
    field that the code did not have when the run began counts as its default."""
    saved, wanted = flatten(saved), flatten(wanted)
    field = {name: name.rsplit(".", 1)[-1] for name in saved.keys() | wanted.keys()}
    before = {name: saved.get(name, get_default(field[name])) for name in field}
    differ = sorted(name for name in field if before[name] != wanted.get(name)
                    and field[name] not in MAY_CHANGE)
    if differ:
        changes = "; ".join(f"{n}: {before[n]} before, {wanted.get(n)} now" for n in differ[:4])
        raise UserError(f"{run_dir} holds a run with other settings ({changes}); "
                        "choose another folder or the same settings", "output_dir")


def flatten(value, prefix=""):
    """Nested dicts and lists as {"a.b.0": leaf}."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in pairs
                for name, leaf in flatten(part, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: value}


def collect_metrics(pending, since, accelerator, batch_size):
    """The pending steps as metrics rows, timed from `since`; losses averaged over all
    processes."""
    losses = torch.stack([loss for _, _, loss, _ in pending]).float()
    losses = accelerator.reduce(losses, "mean").tolist()
    rate = len(pending) * batch_size / (time.monotonic() - since)  # the line above has waited
    memory = {"gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} \
        if accelerator.device.type == "cuda" else {}
    return [{"step": step, "samples_seen": step * batch_size, "loss": loss, "lr": lr,
             "grad_norm": float(norm), "samples_per_sec": round(rate, 1), **memory}
            for (step, lr, _, norm), loss in zip(pending, losses)]
