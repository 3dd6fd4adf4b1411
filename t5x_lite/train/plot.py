"""The loss curves of a run as a picture, from its metrics.jsonl."""

from pathlib import Path

from t5x_lite.errors import UserError
from t5x_lite.metrics import MetricsLog

# Colours that a colour-blind reader tells apart.
CURVES = {"loss": ("training", "#9ecae1"), "eval/loss": ("held out", "#d95f02")}


def plot_loss(model_dir: str, out: str | None = None) -> Path:
    """Draws the training and held-out loss over steps; returns the file (default: DIR/loss.png).

    Raises:
        UserError: no losses yet, no matplotlib, or a file that can't be written as such a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 't5x_lite[demo]'.") from error

    log = MetricsLog(model_dir)
    rows = log.read()
    if not any(name in row for row in rows for name in CURVES):
        raise UserError(f"{log.path} has no losses; train into {model_dir} first.")
    # No pyplot: it keeps figures in global state and looks for a display.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, color) in CURVES.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, ms=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=Path(model_dir).resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, Path(out) if out else Path(model_dir) / "loss.png")


def _save(figure, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib doesn't know
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    return path
