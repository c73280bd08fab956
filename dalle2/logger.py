"""`metrics.jsonl`: one JSON object a line, none doubled and none missing after a resume."""

import json
from pathlib import Path


class MetricsLog:
    """Appends to `path`; lines of steps after `step`, from a run that was cut off, are dropped."""

    def __init__(self, path, step=0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, rows):
        """rows: list of dicts, each with its `step`."""
        with open(self.path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # a line that was cut off


def read_metrics(path):
    """list of dicts of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
