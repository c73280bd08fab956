"""Pictures of numbers: `curves.png` of a run's metrics.jsonl, the trade-off of a sweep."""

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
    sums, out = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - width] if i >= width else 0)
        out.append(sums / min(i + 1, width))
    return out


def save_tradeoff(rows, path, *, label, series, best=None, photos=None):
    """CLIP score against CMMD: a point a row of `rows`, dicts with "clip_score", "cmmd" and
    "cmmd_error", named by its key `label`; lines join the rows that have the same `series`, a
    function of a row. best: the row to ring; photos: the CLIP score of the true photos."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(map(series, rows)):
        group = [row for row in rows if series(row) == name]
        x, y, error = ([row[key] for row in group] for key in ("cmmd", "clip_score", "cmmd_error"))
        axes.errorbar(x, y, xerr=error, label=name or None, marker="o", linewidth=1.5,
                      elinewidth=0.5)
        for row in group:
            axes.annotate(str(row[label]).removesuffix(".0"), (row["cmmd"], row["clip_score"]),
                          xytext=(5, 5), textcoords="offset points", fontsize=9)
    if best:
        axes.plot(best["cmmd"], best["clip_score"], "o", markersize=14, fillstyle="none",
                  color="black", linestyle="", label="lowest CMMD")
    if photos is not None:
        axes.axhline(photos, color="gray", linestyle=":", label="the true photos")
    axes.set_title(f"points: {label}; bars: standard error")
    axes.set_xlabel("CMMD (lower is better)")
    axes.set_ylabel("CLIP score (higher is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=80))
