"""What people see of a run: the progress bar, metrics.jsonl, the training curve."""

import json
import logging
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from microbert.runtime.files import write_atomic, write_text
from microbert.runtime.run import TENSORBOARD


class Metrics:
    """metrics.jsonl: one JSON object a line. Opening it for a run that goes on drops the lines after its checkpoint.

    writes: False in a process that leaves it to another. for_tensorboard: the same goes to TensorBoard's files in the folder.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True, for_tensorboard: bool = False) -> None:
        self.path, self.writes = folder / "metrics.jsonl", writes
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= step] if writes else []
        if writes:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._tensorboard = None
        if writes and for_tensorboard:
            from torch.utils.tensorboard import (
                SummaryWriter,  # only here, because it takes a while to load, and a package of its own
            )

            self._tensorboard = SummaryWriter(
                folder / TENSORBOARD, purge_step=step + 1
            )  # hides what was written after the checkpoint

    def write(self, line: dict[str, float]) -> None:
        if not self.writes:
            return
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # so that no line is lost that a checkpoint's step stands behind
        if self._tensorboard is not None:
            for name, value in line.items():
                if "/" in name:
                    self._tensorboard.add_scalar(name, value, line["step"])
            self._tensorboard.flush()

    def has_evaluation(self, step: int) -> bool:
        return any(line["step"] == step and "eval/loss" in line for line in self.lines)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl, an empty list where there is no file.

    What is no line of metrics is left out. A warning says how many those are, except a last one that a kill cut short.
    """
    if not path.is_file():
        return []
    texts = path.read_bytes().split(b"\n")
    read = [_metrics_line(text) for text in texts]
    lines = [line for line in read if line is not None]
    if n_damaged := sum(line is None and bool(text.strip()) for text, line in zip(texts[:-1], read)):
        print(f"warning: {path}: {n_damaged} of {len(texts) - 1} lines are damaged and left out", file=sys.stderr)
    return lines


def _metrics_line(text: bytes) -> dict[str, float] | None:
    """Return a line with a step and finite numbers, None where it is something else."""
    try:
        line = json.loads(text)
        is_one = type(line["step"]) is int and line["step"] >= 0 and all(map(math.isfinite, line.values()))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return line if is_one else None


def progress_bar(
    total: int | None, done: int, description: str, unit: str, leave: bool = True, shown: bool = True
) -> tqdm:
    """Shows progress, ETA and what `set_postfix_str` is given; in a log file, where each update stays, twice a minute."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        unit_scale=(total or 0) >= 1_000_000,
        dynamic_ncols=True,
        mininterval=interval,
        smoothing=0.05,
        leave=leave,
        disable=not shown,
    )


def title_of(folder: Path) -> str:
    """The folder's name as matplotlib can draw it: no formula between dollar signs, no bytes that are not UTF-8."""
    return folder.name.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")


def draw_training_curve(
    folder: Path, lines: list[dict[str, float]], masked: dict[str, float], uniform_loss: float, unigram_loss: float
) -> None:
    """training_curve.png: training and held-out loss against steps, with the two guesses to read them against.

    masked: the shares of masked tokens, by "train" and "eval". What stands under more of them is harder to guess.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its first import announces a font cache
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    whole, close = figure.subplots(1, 2)
    losses = []
    for key, label, style in (
        ("train/loss", f"training, {masked['train']:.0%} masked", {"color": "tab:blue", "alpha": 0.7}),
        ("eval/loss", f"held out, {masked['eval']:.0%} masked", {"color": "tab:red", "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        losses += [loss for _, loss in points]
        for axes in (whole, close):
            axes.plot([step for step, _ in points], [loss for _, loss in points], label=label, **style)
    for axes in (whole, close):
        axes.axhline(
            uniform_loss, color="gray", linestyle=":", label=f"uniform guess, ln(vocabulary) = {uniform_loss:.2f}"
        )
        axes.axhline(unigram_loss, color="gray", linestyle="--", label=f"guess by word frequency = {unigram_loss:.2f}")
        axes.set(xlabel="step", ylabel="MLM loss (nats a masked token)")
        axes.grid(alpha=0.3)
    low, high = min([*losses, unigram_loss]), max([*losses, unigram_loss])
    close.set(ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), title="the same, closer")
    whole.set(title=f"{title_of(folder)}: masked language modelling")
    whole.legend()
    write_atomic(folder / "training_curve.png", lambda file: figure.savefig(file, format="png", dpi=120))
