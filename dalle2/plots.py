"""`curves.png`: a run's metrics.jsonl as pictures."""

import numpy as np

from dalle2.files import replace_file
from dalle2.logger import read_metrics

PANELS = (  # title, metrics, logarithmic
    ("loss", ("loss", "val_loss", "val_loss_raw"), True),
    ("validation loss by quartile of t", tuple(f"val_loss_q{k}" for k in (1, 2, 3, 4)), True),
    ("validation", ("val_cosine", "recall@1", "recall@5", "recall@10"), False),
    ("gradient norm", ("grad_norm",), True),
    ("learning rate", ("lr",), False),
)


def save_curves(metrics_path, path):
    """Draws the panels that the metrics have numbers for."""
    from matplotlib.figure import Figure
    rows = read_metrics(metrics_path)
    series = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
              for _, names, _ in PANELS for name in names}
    panels = [panel for panel in PANELS if any(series[name] for name in panel[1])]
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, names, logarithmic) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                                 panels):
        for name in filter(series.get, names):
            steps, values = zip(*series[name])
            dense = len(values) > 200
            (line,) = axes.plot(steps, values, label=name, linewidth=0.5 if dense else 1.5,
                                alpha=0.4 if dense else 1, marker="" if len(values) > 20 else "o")
            if dense:
                axes.plot(steps, smooth(values, len(values) // 50), color=line.get_color())
        if logarithmic and all(value > 0 for name in names for _, value in series[name]):
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=80))


def smooth(values, width):
    """Running mean over the last `width` values."""
    sums, stop = np.cumsum([0, *values]), np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    return (sums[stop] - sums[start]) / (stop - start)
