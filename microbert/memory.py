"""What a training process will hold in memory, from the constants alone.

Shapes: B sequences of a micro-batch, T = max_seq_len, D = n_embed, M masked slots a sequence, V vocabulary.
"""

import torch

from .config import Config
from .loss import CHUNK_ELEMENTS
from .masking import n_slots
from .model import ModelConfig

BYTES = 4  # fp32
PROCESS_GB = 0.45  # of the machine's memory: Python, torch, the libraries that read and export
GPU_CONTEXT_GB = 0.5
# hidden states kept for the backward pass, in units of [B, T, D]: a layer's query, key, value, attention, its output, sum and norm (7);
# expansion and GELU (8); contraction, sum and norm (3); copies of reshaped ones (2)
KEPT_A_LAYER = 20
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
    """The most that training is expected to hold: of the GPU where there is one, else of the machine for the whole process."""
    model = ModelConfig(vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len)
    B = min(config.micro_batch_size or config.batch_size, config.batch_size)
    T, D, M = config.max_seq_len, config.n_embed, n_slots(config.max_seq_len, config.mlm_probability)
    state = 4 * BYTES * count_parameters(model)  # weights, gradients and Adam's two moments
    hidden = BYTES * B * D * (T * (KEPT_A_LAYER * config.n_layers + KEPT_BY_EMBEDDINGS) + M * KEPT_BY_HEAD)
    logits = BYTES * CHUNK_ELEMENTS + BYTES * vocab_size * D  # a chunk of them, and the output weights' gradient of its own
    return (state + hidden + logits) / 1e9 + (GPU_CONTEXT_GB if device.type == "cuda" else PROCESS_GB)
