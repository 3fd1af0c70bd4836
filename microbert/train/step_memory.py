"""The memory of the tensors of a training step, by a formula, so that it is known for GPUs that are not at hand.

Shapes: B rows of a micro-batch of T tokens each, D = n_embed, L layers, H heads, M masked slots per row, N = B * M,
V vocabulary, C rows of logits at a time.
"""

import dataclasses

from microbert.config.constants import ResolvedConfig
from microbert.data.masking import EVALUATION_PROBABILITY, n_slots
from microbert.data.row_lengths import rows_at_a_time, rows_of_process
from microbert.model.build import count_parameters, shape_of
from microbert.model.layers import ModelConfig
from microbert.model.loss import THIN, chunk_rows
from microbert.train.hardware import Hardware

ANY_CPU = Hardware("cpu", None)
BYTES = 4  # fp32; a number in bf16 counts as half of one
# Saved for the backward pass by a layer, in [B, T, D] and in [B, T, n_inner]; by the last layer in [B, M, ...].
# BERT: query, key, value, attention and a copy of it (5); sum and norm (2); sum, also the input of the next norm (1);
# expansion and GELU (2 of n_inner). Modern: norms (2); query, key, value, two of them rotated, attention and a copy of
# it (7); sums (2); expansion (2), GELU and gated product (2 of n_inner).
# In bf16 all but the sums take half, and BERT saves its norms only as the bf16 copy for the next product.
SAVED_BY_LAYER, SAVED_BY_LAYER_BF16 = {"bert": 8, "modern": 11}, {"bert": 5.5, "modern": 6.5}
SAVED_OF_INNER, SAVED_OF_INNER_BF16 = {"bert": 2, "modern": 4}, {"bert": 1, "modern": 2}
SAVED_OF_ALL_TOKENS = {"bert": 2, "modern": 4}  # by the last layer: keys and values; the norm and the rotated keys
SAVED_BY_EMBEDDINGS = 4  # [B, T, D]
SAVED_BY_HEAD = 4  # [B, M, D]
SAVED_BY_DROPOUT = 0.25  # one byte for each number
DROPOUT_BITS = 8  # [B, T, D], while random 64-bit numbers are drawn
BACKWARD_OF_LAYER = 6  # [B, T, D]: gradients of the expansion and of the residual, minus what is free by then
BACKWARD_OF_FIRST_LAYER = 3  # [B, T, D]: gradients of query, key and value
# evaluation: [B, T, D] and [B, T, n_inner] of one layer; the logits of a chunk, and their logarithms
EVALUATION_OF_LAYER, EVALUATION_OF_INNER, EVALUATION_LOGITS = 6, 3, 2


def planned_training_bytes(config: ResolvedConfig, vocab_size: int, hardware: Hardware = ANY_CPU) -> int:
    """Return the peak memory of the tensors of a training step."""
    return round(sum(planned_tensors(config, vocab_size, hardware).values()))


def is_planned_in_bf16(config: ResolvedConfig, hardware: Hardware) -> bool:
    """Return whether the plan counts bf16 for matrix products."""
    return hardware.kind != "cpu" and (config.dtype == "bfloat16" or (config.dtype == "auto" and hardware.has_bf16))


def planned_tensors(config: ResolvedConfig, vocab_size: int, hardware: Hardware) -> dict[str, float]:
    """Return the bytes of the tensors of a training step by purpose, at the peak, for the row length with the most."""
    micro_batch = min(config.micro_batch_size or config.batch_size, config.batch_size)
    plans = [
        _planned_for(config, vocab_size, hardware, T, rows_at_a_time(n_rows, micro_batch, config), n_rows)
        for T, n_rows in rows_of_process(config).items()
    ]
    return max(plans, key=lambda plan: sum(plan.values()))


def _planned_for(
    config: ResolvedConfig, vocab_size: int, hardware: Hardware, T: int, B: int, n_rows: int
) -> dict[str, float]:
    """Return the bytes as planned_tensors does, for a batch of n_rows rows of one length.

    One of seven phases has the peak:
    - the dropout of the last layer;
    - the last chunk of the loss, when the gradient of the hidden states exists in addition to them;
    - the start of the backward pass, when that gradient exists twice, as it is and scaled;
    - the backward pass of the last layer that has all tokens;
    - its end, when the word embeddings' gradients as output and as input are added up;
    - the reduction over processes, when all gradients exist twice;
    - Muon's iterations for the matrices of one shape.
    """
    model = shape_of(config, vocab_size)
    parameters, V, D = count_parameters(model), vocab_size, config.n_embed
    N = B * n_slots(T, config.mlm_probability)
    C = min(chunk_rows(hardware.kind, V, D), N)
    hidden, iterations = _muon_numbers(model) if config.optimizer == "muon" else (0, 0)
    is_bf16 = is_planned_in_bf16(config, hardware)
    accumulated = parameters if n_rows > B else 0  # gradients of the micro-batches before
    bf16_weights = (parameters - V) / 2 * is_bf16
    whole_layers, all_layers = _saved_by_layers(config, model, B, T, N, is_bf16)
    with_head = all_layers + N * (SAVED_BY_HEAD * D + 2) + bf16_weights
    dropout_bits = DROPOUT_BITS * B * T * D * (config.dropout > 0)
    logits = C * V + 3 * C * D + V + V * D * (D <= THIN) + is_bf16 * (C * V / 2 + V * D)
    phases: list[dict[str, float]] = [
        {"gradients": accumulated, "activations": all_layers + bf16_weights + dropout_bits},
        {
            "gradients": accumulated + V * D + 2 * V + N * D,
            "activations": with_head,
            "logits, one chunk": logits,
        },
        {"gradients": accumulated + 2 * V * D + V + 2 * N * D, "activations": with_head},
        {
            "gradients": accumulated + V * D + V + D * (10 * D + 3 * model.n_inner),
            "activations": whole_layers + bf16_weights + BACKWARD_OF_LAYER * B * T * D,
        },
        {
            "gradients": parameters + 2 * V * D + (V * D if accumulated else 0),
            "activations": (SAVED_BY_EMBEDDINGS + BACKWARD_OF_FIRST_LAYER) * B * T * D,
        },
        {"gradients": parameters, "communication": parameters * (hardware.n_processes > 1)},
        {"gradients": parameters + hidden, "Muon's iterations": iterations},
    ]
    fullest = max(phases, key=lambda phase: sum(phase.values()))
    numbers = {"weights": parameters, "optimizer's moments": 2 * parameters - hidden, "gradients": 0, "activations": 0}
    numbers |= {"logits, one chunk": 0, "communication": 0, "Muon's iterations": 0}
    planned = numbers | fullest
    planned["activations"] += 2 * (B * T + 3 * N)  # token ids, int64
    return {name: BYTES * number for name, number in planned.items()}


def planned_outside_graphs(config: ResolvedConfig, B: int, V: int, hardware: Hardware) -> int:
    """Return the bytes that cannot share the memory of the CUDA graphs of a micro-batch of B sequences.

    They are the gradients, which persist, Muon's iterations, and what evaluation or communication needs. If rows have
    several lengths, the first steps of some come after the graphs of others: they need as much as a graph.
    """
    model = shape_of(config, V)
    T, D, parameters = config.max_seq_len, config.n_embed, count_parameters(model)
    C = min(chunk_rows("cuda", V, D), B * n_slots(T, EVALUATION_PROBABILITY))
    activations = B * T * (EVALUATION_OF_LAYER * D + EVALUATION_OF_INNER * model.n_inner)
    evaluation = activations + EVALUATION_LOGITS * C * V
    muon = sum(_muon_numbers(model)) * (config.optimizer == "muon")
    of_graphs = 0.0
    if config.rows == "documents":
        micro_batches = dataclasses.replace(config, micro_batch_size=B)
        planned = planned_tensors(micro_batches, V, hardware)
        of_graphs = (planned["activations"] + planned["logits, one chunk"]) / BYTES
    return round(BYTES * (parameters + muon + max(evaluation, of_graphs, parameters * (hardware.n_processes > 1))))


def _saved_by_layers(
    config: ResolvedConfig, model: ModelConfig, B: int, T: int, N: int, is_bf16: bool
) -> tuple[float, float]:
    """Return the numbers that the embeddings and layers save for the backward pass, without and with the last layer."""
    L, H, D = config.n_layers, config.n_heads, config.n_embed
    by_layer = (SAVED_BY_LAYER_BF16 if is_bf16 else SAVED_BY_LAYER)[model.arch]
    of_inner = (SAVED_OF_INNER_BF16 if is_bf16 else SAVED_OF_INNER)[model.arch]
    per_token = by_layer * D + of_inner * model.n_inner + H + 4  # with attention's sums, mean and deviation of norms
    dropout = SAVED_BY_DROPOUT * (2 * L + 1) * (config.dropout > 0)
    whole = B * T * (per_token * (L - 1) + SAVED_BY_EMBEDDINGS * D + 2 + dropout * D)
    return whole, whole + B * T * D * SAVED_OF_ALL_TOKENS[model.arch] / (1 + is_bf16) + N * per_token


def _muon_numbers(model: ModelConfig) -> tuple[int, int]:
    """Return the size of all matrices that Muon updates, and the peak of its iterations for those of one shape.

    Both are counts of numbers. The peak is in addition to the matrices and their gradients.
    """
    D, inner = model.n_embed, model.n_inner
    square, oblong = 4 * model.n_layers + 1, model.n_layers * {"bert": 2, "modern": 3}[model.arch]
    iterated = (3 * n * D * columns + 2 * n * D * D for n, columns in ((square, D), (oblong, inner)))
    return square * D * D + oblong * D * inner, max(iterated)
