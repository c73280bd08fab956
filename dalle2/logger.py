"""`metrics.jsonl`, one JSON object a line, none doubled and none missing after a resume; and the
same numbers, with sample pictures and report cards, to TensorBoard or Weights & Biases."""

import json
import math
from pathlib import Path

from dalle2.errors import UserError


class MetricsLog:
    """Appends to `<run_dir>/metrics.jsonl`; lines of steps after `step`, from a run that was cut
    off, are dropped. log_with: "tensorboard", "wandb" or "none". A context manager."""

    def __init__(self, run_dir, step=0, log_with="none", config=None):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.tracker = open_tracker(log_with, Path(run_dir), step, config)

    def write(self, rows):
        """rows: list of dicts, each with its `step`. A number that is not finite becomes null."""
        rows = [{name: value if not isinstance(value, float) or math.isfinite(value) else None
                 for name, value in row.items()} for row in rows]
        with open(self.path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self.tracker.log({name: value for name, value in row.items()
                              if name != "step" and value is not None}, row["step"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.tracker.close()


class Tracker:
    """What the numbers of a run are sent to besides its own file: nothing."""

    def log(self, values, step):
        """values: {name: number}."""

    def log_picture(self, picture, step):
        """picture (3, H, W) in [0, 1]."""

    def log_text(self, name, text):
        """text: Markdown."""

    def close(self):
        pass


class TensorBoardTracker(Tracker):
    def __init__(self, run_dir, step):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def log(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_picture(self, picture, step):
        self.writer.add_image("samples", picture, step)

    def log_text(self, name, text):
        self.writer.add_text(name, text)

    def close(self):
        self.writer.close()


class WandbTracker(Tracker):
    def __init__(self, run_dir, config):
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb is not installed (pip install wandb)", "log_with") from error
        self.to_picture = wandb.Image
        self.run = wandb.init(project="dalle2", name=str(run_dir), dir=run_dir, config=config,
                              id="-".join(run_dir.absolute().parts[1:])[-120:], resume="allow")

    def log(self, values, step):
        self.run.log(values, step=step)

    def log_picture(self, picture, step):
        self.run.log({"samples": self.to_picture(picture)}, step=step)

    def log_text(self, name, text):
        self.run.summary[name] = text

    def close(self):
        self.run.finish()


def open_tracker(log_with, run_dir, step=0, config=None):
    """The Tracker "tensorboard", "wandb" or "none" of a run that goes on after `step`."""
    if log_with == "tensorboard":
        return TensorBoardTracker(Path(run_dir), step)
    return WandbTracker(Path(run_dir), config) if log_with == "wandb" else Tracker()


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # a line that was cut off


def read_metrics(path):
    """list of dicts of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
