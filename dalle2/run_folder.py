"""A run's folder: config.json, metrics.jsonl, curves.png, checkpoints/, samples/, averages/."""

import contextlib
import json
from pathlib import Path

from dalle2.checkpoint import load_newest_checkpoint, save_checkpoint
from dalle2.ema import save_snapshot
from dalle2.errors import UserError
from dalle2.files import hold_lock, replace_file
from dalle2.images import save_jpeg
from dalle2.logger import MetricsLog
from dalle2.plots import save_curves


class RunFolder(contextlib.ExitStack):
    """The folder of a run as a context manager, which holds its lock. Only the writer, the first
    process, reads and writes: in the others every method does nothing and gives None."""

    def __init__(self, path, is_writer):
        super().__init__()
        self.path, self.is_writer, self.log = Path(path), is_writer, None

    def __enter__(self):
        super().__enter__()
        if self.is_writer:
            self.enter_context(hold_lock(self.path / ".lock", UserError(
                f"{self.path} is in use by another process", "output_dir")))
        return self

    def load_checkpoint(self):
        return load_newest_checkpoint(self.path / "checkpoints") if self.is_writer else None

    def begin(self, step, header, log_with):
        """Records what the run is, and opens the log at `step`."""
        if self.is_writer:
            replace_file(self.path / "config.json",
                         lambda part: part.write_text(json.dumps(header, indent=2)))
            self.log = self.enter_context(MetricsLog(self.path, step, log_with, header))

    def write_metrics(self, rows):
        if self.is_writer:
            self.log.write(rows)

    def save_checkpoint(self, state, must):
        if self.is_writer:
            save_checkpoint(self.path / "checkpoints", state, must)
            save_curves(self.path / "metrics.jsonl", self.path / "curves.png")

    def save_snapshots(self, step, averages, header):
        if self.is_writer:
            save_snapshot(self.path, step, averages, header)

    def save_sample(self, step, picture):
        """picture (3, H, W) in [0, 1], or None."""
        if self.is_writer and picture is not None:
            save_jpeg(picture, self.path / "samples" / f"step_{step:08d}.jpg")
            self.log.tracker.log_picture(picture, step)
