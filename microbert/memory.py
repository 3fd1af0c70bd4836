"""What a training process will hold in memory, from the constants alone.

Shapes: B sequences of a micro-batch, T = max_seq_len, D = n_embed, L layers, H heads, M masked slots a sequence, N = B * M, V vocabulary.
"""

import torch

from .config import Config
from .loss import CHUNK_ELEMENTS
from .masking import n_slots
from .model import ModelConfig

BYTES = 4  # fp32
# of the machine's memory: Python, torch, the libraries that read and those that export. Most are loaded last, by the export, so a whole
# run takes about 0.3 GB more than train/peak_memory_gb says of its training
PROCESS_GB = 0.7
GPU_CONTEXT_GB = 0.5
# kept for the backward pass, in units of [B, T, D]: a layer's query, key, value, attention and a copy of it (5); sum and norm (2);
# expansion and GELU (8); sum, which is also the norm's input (1)
KEPT_A_LAYER = 16
KEPT_BY_EMBEDDINGS = 4
KEPT_BY_HEAD = 4  # [B, M, D]


def count_parameters(config: ModelConfig) -> int:
    """Of the model with its tied output weights, without building it."""
    D, V = config.n_embed, config.vocab_size
    embeddings = (V + config.max_seq_len + 2) * D + 2 * D
    layer = 4 * (D * D + D) + 2 * D * config.n_inner + config.n_inner + D + 4 * D
    head = D * D + D + 2 * D + V
    return embeddings + config.n_layers * layer + head


def planned_peak_gb(config: Config, vocab_size: int, device: torch.device) -> float:
    """The most that a run is expected to hold: of the GPU where there is one, else of the machine for the whole process."""
    return planned_training_bytes(config, vocab_size) / 1e9 + (GPU_CONTEXT_GB if device.type == "cuda" else PROCESS_GB)


def planned_training_bytes(config: Config, vocab_size: int) -> int:
    """The most that the tensors of a training step take at once: weights, gradients, Adam's moments, what the backward pass needs, a chunk of logits.

    One of three moments is the fullest: the last chunk of the loss, whose gradient grows beside the hidden states; the begin of the backward pass,
    when that gradient is there twice, as it is and scaled; its end, when the word embeddings' gradient as output and as input are added up.
    """
    model = ModelConfig(vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len)
    parameters = count_parameters(model)
    B = min(config.micro_batch_size or config.batch_size, config.batch_size)
    L, H, T, D, V = config.n_layers, config.n_heads, config.max_seq_len, config.n_embed, vocab_size
    N = B * n_slots(T, config.mlm_probability)
    layers = B * T * (D * (KEPT_A_LAYER * L + KEPT_BY_EMBEDDINGS) + L * (H + 4) + 2)  # with attention's sums, and each norm's mean and deviation
    hidden = layers + N * (KEPT_BY_HEAD * D + 2)
    chunk = max(1, CHUNK_ELEMENTS // V)
    before_gradients = 3 * parameters + hidden  # weights and Adam's two moments
    in_loss = before_gradients + V * D + 2 * V + N * D + chunk * V + 3 * min(chunk, N) * D
    in_backward = before_gradients + 2 * V * D + V + 2 * N * D
    at_the_end = 4 * parameters + 2 * V * D + KEPT_BY_EMBEDDINGS * B * T * D
    ids = 2 * (B * T + 3 * N)  # int64
    return BYTES * (max(in_loss, in_backward, at_the_end) + ids)
