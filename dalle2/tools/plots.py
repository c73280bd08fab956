"""Pictures of what the tools measure."""

from dalle2.files import replace_file


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
