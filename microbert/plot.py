"""Pictures of runs: what their heads attend to, how their words lie, how their losses fell. `python -m microbert.plot runs/v1`

    python -m microbert.plot runs/v1                              attention-v1.png, embeddings-v1.png and curves.png, in plots/
    python -m microbert.plot runs/v1 runs/v2 runs/v4              the same for each, and all curves in one picture
    python -m microbert.plot runs/v4 --text "the plot was great"  another sentence to attend to

Shapes: L layers, H heads, T tokens, W words, D = n_embed.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from microbert.config.flags import Parser
from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import Failed, InputError
from microbert.fill_mask import encode, load_run
from microbert.model.hugging_face import RUNS_NOTHING, errors_of_loading
from microbert.runtime.files import write_atomic
from microbert.runtime.metrics import read_metrics, title_of
from microbert.runtime.outcome import plain_errors

TEXT = "i have never seen such a bad film ."
MOST_TOKENS = 24  # of a sentence, so that its words can be read
WORDS = 80  # the most frequent ones
AGAINST = (
    ("step", "step", 1.0),
    ("tokens", "tokens read (millions)", 1e6),
    ("seconds", "minutes", 60.0),
)  # in metrics.jsonl, told as, in units of


@torch.no_grad()
def draw_attention(folder: Path, text: str) -> Figure:
    """How much each token of the text (rows) takes from each other (columns), for every head. Raises InputError for what cannot be loaded or shown."""
    model, tokenizer = _load(folder)
    ids = encode(tokenizer, text)
    tokens, most = (
        [tokenizer.id_to_token(token_id) for token_id in ids],
        min(MOST_TOKENS, model.config.max_position_embeddings),
    )
    if len(tokens) > most:
        raise InputError(f"the text has {len(tokens)} tokens, [CLS] and [SEP] included; {most} can be shown")
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
    """The most frequent words where their embeddings lie: dimensions in pairs where there are four or fewer, else the plane in which they differ most."""
    model, tokenizer = _load(folder)
    frequency = model.get_output_embeddings().bias  # [V], which starts at the log-frequency and stays near it
    by_frequency = torch.argsort(frequency, descending=True).tolist()
    words = [(number, tokenizer.id_to_token(number)) for number in by_frequency if number >= N_SPECIAL]
    words = [(number, word) for number, word in words if not word.startswith("##")][:WORDS]
    vectors = model.get_input_embeddings().weight[[number for number, _ in words]].double().numpy()  # [W, D]
    planes = _planes(vectors)
    figure = Figure(figsize=(7.5 * len(planes), 7), layout="constrained")
    for axes, (points, names) in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes):
        axes.scatter(points[:, 0], points[:, 1], s=4, color="tab:red")
        for (x, y), (_, word) in zip(points, words):
            axes.annotate(word.replace("$", r"\$"), (x, y), fontsize=8, xytext=(2, 2), textcoords="offset points")
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.grid(alpha=0.3)
    title = f"{title_of(folder)}: the {len(words)} most frequent words, {vectors.shape[1]} dimensions"
    figure.suptitle(title, fontsize=11)
    return figure


def _planes(vectors: np.ndarray) -> list[tuple[np.ndarray, tuple[str, str]]]:
    """Pairs of coordinates [W, 2] with their names. vectors: [W, D]."""
    n_embed = vectors.shape[1]
    if n_embed <= 4:
        padded = np.pad(vectors, ((0, 0), (0, n_embed % 2)))
        return [
            (padded[:, first : first + 2], (f"dimension {first + 1}", f"dimension {first + 2}"))
            for first in range(0, n_embed, 2)
        ]
    centred = vectors - vectors.mean(axis=0)
    scaled, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    shares = lengths**2 / (lengths**2).sum()
    return [
        (
            centred @ directions[:2].T,
            tuple(f"principal component {number + 1} ({shares[number]:.0%} of the variance)" for number in range(2)),
        )
    ]


def draw_curves(folders: list[Path]) -> Figure:
    """Held-out loss of several runs against steps, tokens and minutes."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    columns = figure.subplots(1, len(AGAINST), sharey=True)
    for folder in folders:
        evaluations = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/loss" in line]
        lines = [line for line in evaluations if all(key in line for key, _, _ in AGAINST)]
        if not lines:
            raise InputError(f"{folder} holds no metrics.jsonl with evaluations: give a run's folder, such as runs/v1")
        if n_missing := len(evaluations) - len(lines):
            print(
                f"warning: {folder / 'metrics.jsonl'}: {n_missing} of {len(evaluations)} evaluations are left out, because "
                "they lack step, tokens or seconds",
                file=sys.stderr,
            )
        for axes, (key, _, unit) in zip(columns, AGAINST):
            losses = [line["eval/loss"] for line in lines]
            axes.plot([line[key] / unit for line in lines], losses, marker="o", markersize=3, label=title_of(folder))
    for axes, (_, told, _) in zip(columns, AGAINST):
        axes.set_xlabel(told)
        axes.grid(alpha=0.3)
    columns[0].set_ylabel("held-out MLM loss (nats a masked token)")
    columns[0].legend()
    return figure


def _load(folder: Path) -> tuple[torch.nn.Module, Tokenizer]:
    """Return the run's model as transformers has it, which returns its attention, and its tokenizer.

    Raises InputError as `load_run` does.
    """
    _, tokenizer = load_run(folder)  # which checks it before transformers builds what config.json describes
    import transformers  # only here, because it takes seconds to load

    transformers.utils.logging.disable_progress_bar()
    with errors_of_loading(folder):
        model = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, attn_implementation="eager", **RUNS_NOTHING, use_safetensors=True
        )
        return model.eval(), tokenizer


@plain_errors()
def main() -> None:
    parser = Parser(prog="python -m microbert.plot", description="Draws attention, embeddings and curves of runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, such as runs/v1")
    parser.add_argument("--text", default=TEXT, help=f'whose attention is drawn, "{TEXT}" unless you say another')
    parser.add_argument(
        "--output-dir", type=Path, default=Path("plots"), help="where the pictures go, plots unless you say another"
    )
    arguments = parser.parse_args()
    figures = {"curves.png": draw_curves(arguments.folders)}
    for folder in arguments.folders:
        figures[f"attention-{folder.name}.png"] = draw_attention(folder, arguments.text)
        figures[f"embeddings-{folder.name}.png"] = draw_embeddings(folder)
    for name, figure in figures.items():
        path = arguments.output_dir / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=110))
        except OSError as error:
            raise Failed(f"{path.parent} cannot be written: {error.strerror}") from error
        print(path)


if __name__ == "__main__":
    main()
