"""What people see of a run's progress: metrics.jsonl, TensorBoard, the progress bar, the training curve."""

import json
import logging
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from microbert.runtime.files import write_atomic, write_text
from microbert.runtime.run_folder import METRICS, TENSORBOARD, TRAINING_CURVE


class Metrics:
    """metrics.jsonl: one JSON object per line. Opening it at a checkpoint removes the lines of later steps.

    step: of the checkpoint. writes: False in the processes that leave it to rank 0. for_tensorboard: write the same
    values to TensorBoard's files in the folder.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True, for_tensorboard: bool = False) -> None:
        self.path, self.writes = folder / METRICS, writes
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= step] if writes else []
        if writes:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._tensorboard = None
        if writes and for_tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: an optional package, and slow to import

            # purge_step hides values written after the checkpoint
            self._tensorboard = SummaryWriter(folder / TENSORBOARD, purge_step=step + 1)

    def write(self, line: dict[str, float]) -> None:
        """Append a line. It is on disk when this returns, so that no line before a checkpoint is lost."""
        if not self.writes:
            return
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            for name, value in line.items():
                if "/" in name:
                    self._tensorboard.add_scalar(name, value, line["step"])
            self._tensorboard.flush()

    def evaluation(self, step: int, n_sequences: int) -> dict[str, float] | None:
        """Return the line of an evaluation at this step on at least so many sequences; None if there is none.

        Lines of earlier versions do not say how many: they read all.
        """
        found = [line for line in self.lines if line["step"] == step and "eval/loss" in line]
        return next((line for line in found if line.get("eval/sequences", n_sequences) >= n_sequences), None)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl, or an empty list if there is no file.

    Damaged lines are skipped. A warning counts them, except a last line that a kill cut short.
    """
    if not path.is_file():
        return []
    *whole, last = path.read_bytes().split(b"\n")
    parsed = [_parse_line(text) for text in whole]
    if n_damaged := sum(line is None and bool(text.strip()) for text, line in zip(whole, parsed, strict=True)):
        print(f"warning: {path}: {n_damaged} of {len(whole)} lines damaged and skipped", file=sys.stderr)
    return [line for line in (*parsed, _parse_line(last)) if line is not None]


def _parse_line(text: bytes) -> dict[str, float] | None:
    """Return a line with a step and finite numbers, or None if it is damaged."""
    try:
        line = json.loads(text)
        is_valid = type(line["step"]) is int and line["step"] >= 0 and all(map(math.isfinite, line.values()))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return line if is_valid else None


def progress_bar(
    total: int | None, done: int, description: str, unit: str, leave: bool = True, shown: bool = True
) -> tqdm:
    """Return a progress bar with an ETA. In a log file, where every update is a new line, it updates twice a minute."""
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        unit_scale=(total or 0) >= 1_000_000,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        smoothing=0.05,
        leave=leave,
        disable=not shown,
    )


def title_of(folder: Path) -> str:
    """Return the folder's name for matplotlib: dollar signs escaped, bytes that are not UTF-8 replaced."""
    return folder.name.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")


def draw_training_curve(
    folder: Path, lines: list[dict[str, float]], masked: dict[str, float], uniform_loss: float, unigram_loss: float
) -> None:
    """Draw training_curve.png: training and held-out loss by step, with the losses of two guesses for comparison.

    masked: the masked share of the tokens in "train" and "eval". More masking makes the same text harder to predict.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its first import reports a font cache
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
        axes.set(xlabel="step", ylabel="MLM loss (nats per masked token)")
        axes.grid(alpha=0.3)
    low, high = min([*losses, unigram_loss]), max([*losses, unigram_loss])
    close.set(ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), title="the same, enlarged")
    whole.set(title=f"{title_of(folder)}: masked language modelling")
    whole.legend()
    write_atomic(folder / TRAINING_CURVE, lambda file: figure.savefig(file, format="png", dpi=120))
