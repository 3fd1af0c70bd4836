"""The value of each part of v4's recipe: v4, and v4 with one thing changed at a time, at equal steps and at equal time.

    python benchmarks/recipe.py                               every variant, two seeds: hours on two cores
    python benchmarks/recipe.py --variants "masked 15 %" "not gated" --seeds 42 43 44
    python benchmarks/recipe.py --max-steps 200               shorter runs, each with its whole schedule

4 layers, 8 heads, 128-dim, 10K tokens, IMDB. Losses are those of 1,024 held-out sequences, masked at 15 %
whatever the training masks. "In v4's time": if a variant's step takes more or less time than v4's, a second run takes
as many steps as fit in v4's time. Times are processor time of the training steps, summed over all threads, so other
work on the machine does not count. Prints a table.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from checkout import new_parser
from common import SMALL_V4, held_out_loss, new_learner, prepared, scored_batches, script_config, take_step
from torch import Tensor, nn

from microbert.config.constants import Config
from microbert.config.learning_rate import peak_learning_rate
from microbert.data.shards import Tokens
from microbert.data.training_rows import training_rows
from microbert.kernels.gelu import gelu
from microbert.model import build as models
from microbert.model import modern
from microbert.model.layers import MaskedLanguageModel, ModelConfig, Rotary, at_positions
from microbert.runtime.outcome import plain_errors
from microbert.train.schedule import learning_rate_share
from microbert.train.step import Learner

BASE = "v4 as it stands"
SCORED_BATCHES = 32
SAME_TIME = 0.1  # no second run if the times of a step differ by less than this share


class LearnedPositions(modern.Embeddings):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.position = nn.Embedding(config.max_seq_len, config.n_embed)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return self.dropout(self.norm(self.word(input_ids) + self.position.weight), dropout_keys)


class PostNormLayer(modern.Layer):
    """Norms after the residual sums, as in BERT."""

    def __init__(self, config: ModelConfig, number: int, rotary: Rotary) -> None:
        super().__init__(config, number, rotary)
        self.attention_norm = modern.new_norm(config)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        x = self.attention_norm(at_positions(x, positions) + self.attention(x, attention_mask, dropout_keys, positions))
        return self.feed_forward_norm(x + self.feed_forward(x, dropout_keys, positions))


class UngatedFeedForward(nn.Module):
    """Two matrices with as many numbers as the gated one's three."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embed, 4 * config.n_embed, bias=False)
        self.contract = nn.Linear(4 * config.n_embed, config.n_embed, bias=False)

    def forward(self, x: Tensor, dropout_keys: Tensor | None, positions: Tensor | None = None) -> Tensor:
        return self.contract(gelu(self.expand(x)))


class UngatedLayer(modern.Layer):
    def __init__(self, config: ModelConfig, number: int, rotary: Rotary) -> None:
        super().__init__(config, number, rotary)
        self.feed_forward = UngatedFeedForward(config)


def with_layers(layer: type[modern.Layer], rotates: bool = True) -> Callable[[ModelConfig], MaskedLanguageModel]:
    """Return a function that builds ModernBert with these layers."""

    def build(config: ModelConfig) -> MaskedLanguageModel:
        model = modern.ModernBert(config)
        rotary = Rotary(config) if rotates else None
        model.layers = nn.ModuleList(layer(config, number, rotary) for number in range(config.n_layers))
        return model

    return build


def with_learned_positions(config: ModelConfig) -> MaskedLanguageModel:
    model = with_layers(modern.Layer, rotates=False)(config)
    model.embeddings = LearnedPositions(config)
    return model


def with_post_norm(config: ModelConfig) -> MaskedLanguageModel:
    model = with_layers(PostNormLayer)(config)
    model.head.input_norm = nn.Identity()  # the last layer already ends with a norm
    return model


@torch.no_grad()
def start_wider(model: MaskedLanguageModel) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight *= 0.1 / models.INIT_STD


@torch.no_grad()
def start_without_frequencies(model: MaskedLanguageModel) -> None:
    model.output_bias.zero_()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of v4.

    constants: values that differ from v4's. rate: factor on the rule's peak. modern: builds the model if arch is
    "modern". start: changes the new model. last_mask: masked share at the end of the run, if it decays linearly.
    """

    constants: dict = dataclasses.field(default_factory=dict)
    rate: float = 1.0
    modern: Callable[[ModelConfig], MaskedLanguageModel] = modern.ModernBert
    start: Callable[[MaskedLanguageModel], None] = lambda model: None
    last_mask: float | None = None


VARIANTS = {
    BASE: Variant(),
    "masked 15 %": Variant({"mlm_probability": 0.15}),
    "masked 25 %": Variant({"mlm_probability": 0.25}),
    "masked 40 % falling to 15 %": Variant(last_mask=0.15),
    "AdamW": Variant({"optimizer": "adamw"}),
    "AdamW, half the peak": Variant({"optimizer": "adamw"}, rate=0.5),
    "linear schedule": Variant({"schedule": "linear"}),
    "post-norm": Variant(modern=with_post_norm),
    "learned positions": Variant(modern=with_learned_positions),
    "not gated": Variant(modern=with_layers(UngatedLayer)),
    "BERT (post-norm, learned positions, not gated)": Variant({"arch": "bert"}),
    "packed rows": Variant({"rows": "packed"}),
    "not packed": Variant({"rows": "packed", "packing": False}),
    "embeddings from a normal": Variant({"embedding_init": "random"}),
    "weights from a normal of 0.1": Variant({"embedding_init": "random"}, start=start_wider),
    "weight decay 0.01": Variant({"weight_decay": 0.01}),
    "output bias from 0": Variant(start=start_without_frequencies),
    "dropout 0.1": Variant({"dropout": 0.1}),
    "16 sequences a step": Variant({"batch_size": 16, "global_batch_size": 16}),
    "64 sequences a step": Variant({"batch_size": 64, "global_batch_size": 64}),
}


def train(variant: Variant, config: Config, tokens: Tokens, steps: int) -> tuple[Learner, float]:
    """Return the learner after this many steps, and their processor time in seconds."""
    models.ARCHITECTURES["modern"] = variant.modern
    learner, rows, seconds = new_learner(config, tokens), training_rows(tokens, config), 0.0
    variant.start(learner.model)
    for number in range(steps):
        if variant.last_mask is not None:
            masked = config.mlm_probability + (variant.last_mask - config.mlm_probability) * number / steps
            learner.config = dataclasses.replace(config, mlm_probability=masked)
        start = time.process_time()
        rate = config.learning_rate * learning_rate_share(number, steps, config)
        take_step(learner, rows, number, rate)
        seconds += time.process_time() - start
    return learner, seconds


@dataclasses.dataclass
class Results:
    """The losses of one variant, by seed. times: of training on the same number of tokens, divided by v4's."""

    equal_tokens: list[float] = dataclasses.field(default_factory=list)
    equal_time: list[float] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)

    def row(self, name: str) -> str:
        losses = (
            f"{statistics.mean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)})"
            for losses in (self.equal_tokens, self.equal_time)
        )
        return f"| {name} | {' | '.join(losses)} | {statistics.mean(self.times):.2f} |"


def run_seed(seed: int, base: Config, results: dict[str, Results], max_steps: int) -> None:
    """Train v4 and each variant with this seed, and append to the results."""
    base = dataclasses.replace(base, seed=seed)
    seconds_of_base = None
    scored = scored_batches(base, prepared(base)[1], SCORED_BATCHES)
    for name, of_variant in results.items():
        variant = VARIANTS[name]
        config = dataclasses.replace(base, **variant.constants)
        config = dataclasses.replace(config, learning_rate=peak_learning_rate(config) * variant.rate, lr_scaling="none")
        tokens = prepared(config)[1]
        steps = min(max_steps * base.batch_size // config.batch_size, training_rows(tokens, config).steps)
        learner, seconds = train(variant, config, tokens, steps)
        seconds_of_base = seconds_of_base or seconds
        of_variant.times.append(seconds / seconds_of_base)
        of_variant.equal_tokens.append(held_out_loss(learner, scored))
        if abs(seconds / seconds_of_base - 1) > SAME_TIME:
            learner, _ = train(variant, config, tokens, round(steps * seconds_of_base / seconds))
        of_variant.equal_time.append(held_out_loss(learner, scored))
        print(
            f"seed {seed}, {name}: {of_variant.equal_tokens[-1]:.4f} after {steps} steps, "
            f"{of_variant.equal_time[-1]:.4f} in v4's time ({seconds:.0f} s)",
            flush=True,
        )


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=f"{BASE!r} is always run, too"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43])
    parser.add_argument(
        "--max-steps",
        type=int,
        default=600,
        help="steps of 32 sequences; variants with another batch size train on as many tokens [default: 600]",
    )
    parser.add_argument("--cache-dir", default="cache")
    arguments = parser.parse_args()
    base = script_config("v4", [*SMALL_V4, "--cache-dir", arguments.cache_dir])
    results = {name: Results() for name in dict.fromkeys([BASE, *arguments.variants])}
    for seed in arguments.seeds:
        run_seed(seed, base, results, arguments.max_steps)
    print(
        "\n| | held-out loss at equal tokens, mean (each seed) | in v4's time | time per token, v4 = 1 |"
        "\n|---|---|---|---|"
    )
    for name, of_variant in results.items():
        print(of_variant.row(name))


if __name__ == "__main__":
    main()
