"""A picture of how training went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat.files import atomic_path
from qat.train.log import read_log

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw_curves(log: Path, picture: Path) -> bool:
    """Draw loss, accuracy and learning rate over the epochs of all trainings in a log, one after the other.

    Args:
        log: What `TrainingLog` wrote.
        picture: PNG file to write.

    Returns:
        Whether there was anything to draw.

    Raises:
        OutputError: The picture cannot be written.
    """
    records = read_log(log)
    stages = list(dict.fromkeys(record["stage"] for record in records if record["kind"] == "epoch"))
    if not stages:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not through pyplot, which would keep the figure and may want a display
    figure = Figure(figsize=(9, 8))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.07, top=0.98, hspace=0.07)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True)
    offset = 0
    for number, stage in enumerate(stages):
        own = [record for record in records if record["stage"] == stage]
        epochs = [r for r in own if r["kind"] == "epoch"]
        colour, name = _COLOURS[number % len(_COLOURS)], f"{epochs[0]['label']} (stage {stage})"
        steps = [r for r in own if r["kind"] == "step"]
        per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]
        x_steps = [offset + r["step"] / per_epoch for r in steps]
        x_epochs = [offset + r["epoch"] for r in epochs]
        loss.plot(x_steps, [r["loss"] for r in steps], color=colour, alpha=0.35, linewidth=1)
        loss.plot(x_epochs, [r["loss"] for r in epochs], color=colour, marker=".", label=name)
        accuracy.plot(x_epochs, [100 * r["top1"] for r in epochs], color=colour, marker=".", label=f"{name}: training")
        _validation(loss, accuracy, epochs, offset, colour, name)
        rates = steps or epochs
        rate.plot(x_steps or x_epochs, [r["lr"] for r in rates], color=colour, linewidth=1.5)
        for back in (r for r in own if r["kind"] == "return"):
            loss.axvline(offset + back["step"] / per_epoch, color=colour, linestyle=":")
        offset += max(r["epoch"] for r in epochs)
    loss.set_ylabel("loss")
    accuracy.set_ylabel("top-1, %")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch (dotted: back to the last good state)" if _returned(records) else "epoch")
    for axes in (loss, rate):
        low, high = _bounds(axes)
        if low > 0 and high / low > 20:
            axes.set_yscale("log")
    for axes in (loss, accuracy):
        axes.legend(fontsize="small")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _validation(loss: Any, accuracy: Any, epochs: list[dict[str, Any]], offset: int, colour: str, name: str) -> None:
    measured = [r for r in epochs if "validation_top1" in r]
    if not measured:
        return
    x = [offset + r["epoch"] for r in measured]
    loss.plot(x, [r["validation_loss"] for r in measured], color=colour, linestyle="--", label=f"{name}: validation")
    top1 = [100 * r["validation_top1"] for r in measured]
    accuracy.plot(x, top1, color=colour, linestyle="--", label=f"{name}: validation")


def _returned(records: list[dict[str, Any]]) -> bool:
    return any(record["kind"] == "return" for record in records)


def _bounds(axes: Any) -> tuple[float, float]:
    values = [float(y) for line in axes.get_lines() if line.get_linestyle() != ":" for y in line.get_ydata()]
    return min(values, default=0.0), max(values, default=0.0)
