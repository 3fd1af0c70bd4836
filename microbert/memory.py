"""What a training process will hold in memory, from the constants alone.

Shapes: B sequences of a micro-batch, T = max_seq_len, D = n_embed, M masked slots a sequence, V vocabulary.
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
# hidden states kept for the backward pass, in units of [B, T, D]: a layer's query, key, value, attention and a copy of it (5); sum and
# norm (2); expansion and GELU (8); sum, which is also the norm's input (1)
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
    """The tensors of a training step: weights, gradients, Adam's moments, what the backward pass needs, a chunk of logits."""
    model = ModelConfig(vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len)
    B = min(config.micro_batch_size or config.batch_size, config.batch_size)
    T, D, M = config.max_seq_len, config.n_embed, n_slots(config.max_seq_len, config.mlm_probability)
    state = 4 * BYTES * count_parameters(model)  # weights, gradients and Adam's two moments
    hidden = BYTES * B * D * (T * (KEPT_A_LAYER * config.n_layers + KEPT_BY_EMBEDDINGS) + M * KEPT_BY_HEAD)
    logits = BYTES * CHUNK_ELEMENTS + 2 * BYTES * vocab_size * D  # a chunk of them; the output weights' own gradient, as it is and scaled
    return state + hidden + logits
