"""Plot the attention, the word embeddings and the loss curves of runs.

    python -m microbert.plot runs/v1                              plots/: attention-v1, embeddings-v1 and curves (.png)
    python -m microbert.plot runs/v1 runs/v2 runs/v4              the same for each run, with all curves in one figure
    python -m microbert.plot runs/v4 --text "the plot was great"  attention on another sentence

Shapes: L layers, H heads, T tokens, W words, D = n_embed.
"""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from microbert.config.flags import Parser
from microbert.data.tokenizer import N_SPECIAL, token_names
from microbert.errors import Failed, InputError
from microbert.fill_mask import encode, load_run
from microbert.model.hugging_face import RUNS_NOTHING, errors_of_loading
from microbert.runtime.files import write_atomic
from microbert.runtime.metrics import read_metrics, title_of
from microbert.runtime.outcome import plain_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT = "i have never seen such a bad film ."
MOST_TOKENS = 24  # of a sentence, so that the labels stay readable
WORDS = 80  # the most frequent words
# horizontal axes of the curves: key in metrics.jsonl, label, unit
X_AXES = (("step", "step", 1.0), ("tokens", "tokens read (millions)", 1e6), ("seconds", "minutes", 60.0))


@torch.no_grad()
def draw_attention(folder: Path, text: str) -> Figure:
    """Plot how much each token of the text (rows) attends to each other token (columns), for every head.

    Raises InputError if the run cannot be loaded or the text cannot be shown.
    """
    model, tokenizer = _load(folder)
    ids = encode(tokenizer, text)
    names, most = token_names(tokenizer), min(MOST_TOKENS, model.config.max_position_embeddings)
    if len(ids) > most:
        raise InputError(f"the text has {len(ids)} tokens with [CLS] and [SEP]; at most {most} can be shown")
    tokens = [names[token_id] for token_id in ids]
    attentions = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).numpy()  # [L, H, T, T]
    n_layers, n_heads = attentions.shape[:2]
    size = 0.9 + 0.11 * len(tokens)  # inches for one head
    figure = Figure(figsize=(1.2 + size * n_heads, 1.2 + size * n_layers), layout="constrained")
    grid = figure.subplots(n_layers, n_heads, squeeze=False)
    for layer in range(n_layers):
        for head in range(n_heads):
            axes = grid[layer][head]
            image = axes.imshow(attentions[layer, head], vmin=0, vmax=attentions.max(), cmap="viridis")
            axes.set_xticks(range(len(tokens)), tokens if layer == n_layers - 1 else [], rotation=90, fontsize=7)
            axes.set_yticks(range(len(tokens)), tokens if head == 0 else [], fontsize=7)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.6, label="share of attention")
    figure.suptitle(f"{title_of(folder)}: what each token (row) attends to", fontsize=10)
    return figure


@torch.no_grad()
def draw_embeddings(folder: Path) -> Figure:
    """Plot the embeddings of the most frequent words.

    Up to four dimensions are shown in pairs; more are projected on the plane of largest variance.
    """
    model, tokenizer = _load(folder)
    names = token_names(tokenizer)
    frequency = model.get_output_embeddings().bias  # [V], starts at the log-frequency and stays near it
    by_frequency = torch.argsort(frequency, descending=True).tolist()
    ids = [token_id for token_id in by_frequency if token_id >= N_SPECIAL and not names[token_id].startswith("##")]
    ids = ids[:WORDS]
    vectors = model.get_input_embeddings()(torch.tensor(ids)).double().numpy()  # [W, D]
    planes = _planes(vectors)
    figure = Figure(figsize=(7.5 * len(planes), 7), layout="constrained")
    for axes, (points, labels) in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
        axes.scatter(points[:, 0], points[:, 1], s=4, color="tab:red")
        for point, token_id in zip(points, ids, strict=True):
            word = names[token_id].replace("$", r"\$")
            axes.annotate(word, point, fontsize=8, xytext=(2, 2), textcoords="offset points")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(alpha=0.3)
    title = f"{title_of(folder)}: the {len(ids)} most frequent words, {vectors.shape[1]} dimensions"
    figure.suptitle(title, fontsize=11)
    return figure


def _planes(vectors: np.ndarray) -> list[tuple[np.ndarray, list[str]]]:
    """Return planes to plot: coordinates [W, 2] with the labels of both axes. vectors: [W, D]."""
    n_embed = vectors.shape[1]
    if n_embed <= 4:
        padded = np.pad(vectors, ((0, 0), (0, n_embed % 2)))
        return [
            (padded[:, first : first + 2], [f"dimension {first + 1}", f"dimension {first + 2}"])
            for first in range(0, n_embed, 2)
        ]
    centred = vectors - vectors.mean(axis=0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    shares = lengths**2 / (lengths**2).sum()
    labels = [f"principal component {number + 1} ({shares[number]:.0%} of the variance)" for number in range(2)]
    return [(centred @ directions[:2].T, labels)]


def draw_curves(folders: list[Path]) -> Figure:
    """Plot the held-out losses of runs against steps, tokens and minutes. Raises InputError for a run without any."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    columns = figure.subplots(1, len(X_AXES), sharey=True)
    for folder in folders:
        evaluations = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/loss" in line]
        lines = [line for line in evaluations if all(key in line for key, _, _ in X_AXES)]
        if not lines:
            raise InputError(f"{folder} holds no metrics.jsonl with evaluations: pass a run's folder, such as runs/v1")
        if n_missing := len(evaluations) - len(lines):
            print(
                f"warning: {folder / 'metrics.jsonl'}: skipped {n_missing} of {len(evaluations)} evaluations without "
                "step, tokens or seconds",
                file=sys.stderr,
            )
        for axes, (key, _, unit) in zip(columns, X_AXES, strict=True):
            losses = [line["eval/loss"] for line in lines]
            axes.plot([line[key] / unit for line in lines], losses, marker="o", markersize=3, label=title_of(folder))
    for axes, (_, label, _) in zip(columns, X_AXES, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    columns[0].set_ylabel("held-out MLM loss (nats per masked token)")
    columns[0].legend()
    return figure


def _load(folder: Path) -> tuple["PreTrainedModel", Tokenizer]:
    """Return the run's model, as the class of transformers that returns its attention, and its tokenizer.

    Raises InputError as `load_run` does.
    """
    _, tokenizer = load_run(folder)  # checks the folder before transformers builds what config.json describes
    import transformers  # here, because it takes seconds to load

    transformers.utils.logging.disable_progress_bar()
    with errors_of_loading(folder):
        model = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, attn_implementation="eager", **RUNS_NOTHING, use_safetensors=True
        )
        return model.eval(), tokenizer


@plain_errors()
def main() -> None:
    parser = Parser(prog="python -m microbert.plot", description="Plot attention, embeddings and loss curves of runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, such as runs/v1")
    parser.add_argument("--text", default=TEXT, help=f'sentence for the attention plot (default: "{TEXT}")')
    parser.add_argument("--output-dir", type=Path, default=Path("plots"), help="folder of the images (default: plots)")
    arguments = parser.parse_args()
    figures = {"curves.png": draw_curves(arguments.folders)}
    for folder in arguments.folders:
        figures[f"attention-{folder.name}.png"] = draw_attention(folder, arguments.text)
        figures[f"embeddings-{folder.name}.png"] = draw_embeddings(folder)
    for name, figure in figures.items():
        path = arguments.output_dir / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, functools.partial(figure.savefig, format="png", dpi=110))
        except OSError as error:
            raise Failed(f"{path.parent} cannot be written: {error.strerror}") from error
        print(path)


if __name__ == "__main__":
    main()
