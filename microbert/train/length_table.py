"""The loss by the length of the input, for people: a table on the terminal, in the model card, and as a picture."""

import dataclasses
import functools
import logging
from pathlib import Path

from microbert.config.terminal import counted
from microbert.runtime.files import write_atomic
from microbert.runtime.metrics import title_of
from microbert.runtime.run_folder import LOSS_PICTURE
from microbert.train.by_length import LengthScore, LossByLength

TITLE = "held-out loss by input length (nats per masked token, 15 % of the tokens masked, all as [MASK])"
COLUMNS = ("tokens", "loss", "unigram", "accuracy", "bits/byte", "change", "documents", "masked")
LEGEND = (
    "unigram: the loss of a guess by word frequency",
    "change: of the loss against the length before, on the same documents; below 0 if more context helps",
)


def table_lines(result: LossByLength) -> list[str]:
    """Return the table in aligned columns, with its title and a line about lengths that are left out."""
    rows = [COLUMNS, *map(_cells, result.scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [f"{TITLE}:", *(f"  {line}" for line in lines if result.scores), *_left_out(result)]


def table_markdown(result: LossByLength) -> str:
    """Return the table as Markdown, "" without any length."""
    if not result.scores:
        return ""
    rows = [COLUMNS, ("---:",) * len(COLUMNS), *map(_cells, result.scores)]
    return "\n".join(
        [f"{TITLE[0].upper()}{TITLE[1:]}; {'; '.join(LEGEND)}.", "", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def as_json(result: LossByLength) -> dict[str, object]:
    """Return what a program reads: the scores, and the lengths that are left out."""
    return {"lengths": [dataclasses.asdict(one) for one in result.scores], "lengths_left_out": result.missing}


def as_metrics(result: LossByLength) -> dict[str, float]:
    """Return the losses and accuracies by the names of their metrics."""
    values: dict[str, float] = {}
    for one in result.scores:
        values |= {f"by_length/loss_{one.length}": one.loss, f"by_length/accuracy_{one.length}": one.accuracy}
    return values


def draw_losses(folder: Path, title: Path, result: LossByLength) -> Path:
    """Draw the losses of the model and of a guess by frequency, and return the picture's path.

    title: the folder of the run.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # its first import reports a font cache
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lengths = [one.length for one in result.scores]
    axes.plot(lengths, [one.loss for one in result.scores], color="tab:red", marker="o", label="model")
    unigram = [one.unigram_loss for one in result.scores]
    axes.plot(lengths, unigram, color="gray", linestyle="--", marker=".", label="guess by word frequency")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="tokens of the input", ylabel="held-out loss (nats per masked token)", title=title_of(title))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(folder / LOSS_PICTURE, functools.partial(figure.savefig, format="png", dpi=120))
    return folder / LOSS_PICTURE


def _cells(one: LengthScore) -> tuple[str, ...]:
    return (
        str(one.length),
        f"{one.loss:.3f}",
        f"{one.unigram_loss:.3f}",
        f"{one.accuracy:.1%}",
        f"{one.bits_per_byte:.3f}",
        "" if one.change is None else f"{one.change:+.3f}",
        f"{one.documents:,}",
        f"{one.masked_tokens:,}",
    )


def _left_out(result: LossByLength) -> list[str]:
    if not result.missing:
        return [] if result.scores else ["  no length can be measured: the model reads fewer than 8 tokens"]
    shown = ", ".join(map(str, result.missing))
    return [f"  left out, because no document has so many tokens: {shown} ({counted(len(result.missing), 'length')})"]
