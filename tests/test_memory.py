"""The planned memory is what a training step takes."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_config import configure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from microbert.loss import masked_loss
from microbert.masking import n_slots
from microbert.memory import count_parameters, planned_peak_gb, planned_training_bytes
from microbert.model import Bert, ModelConfig
from microbert.optim import build_optimizer

SHAPES = {"v1": (10_000, 2, 2, 4, 128, 32), "v2": (10_000, 4, 4, 8, 128, 32), "v3": (10_000, 6, 8, 16, 128, 32), "wide": (25_000, 4, 8, 128, 128, 32),
          "a 140 GB GPU": (50_000, 4, 8, 128, 128, 16), "an 80 GB GPU": (50_000, 6, 8, 128, 128, 32), "a 24 GB GPU": (50_000, 4, 8, 128, 128, 8),
          "large": (25_000, 8, 8, 256, 256, 96), "one sequence": (25_000, 4, 8, 128, 128, 1), "long": (1_000, 2, 2, 64, 1024, 8)}
AT_LEAST, AT_MOST = 1.0, 1.25  # of what the step takes


def constants(n_layers, n_heads, n_embed, max_seq_len, batch_size, **others):
    return configure(n_layers=n_layers, n_heads=n_heads, n_embed=n_embed, max_seq_len=max_seq_len, batch_size=batch_size, **others)


def taken_by_a_step(model_config, batch_size):
    """Bytes of the tensors that are alive at the peak of a training step. Nothing is computed: the tensors are fake."""
    T, M = model_config.max_seq_len, n_slots(model_config.max_seq_len, 0.15)
    with FakeTensorMode():
        model = Bert(model_config)
        optimizer = build_optimizer(model, configure())
        ids, positions, labels = (torch.zeros(shape, dtype=torch.long) for shape in ((batch_size, T), (batch_size, M), batch_size * M))
        tracker = MemTracker()
        tracker.track_external(model, optimizer, ids, positions, labels)
        with tracker:
            for _ in range(2):  # Adam's moments are there from the second on
                optimizer.zero_grad(set_to_none=True)
                hidden = model(ids, None, positions)
                masked_loss(hidden, model.output_weight, model.output_bias, labels, batch_size * M).backward()
                optimizer.step()
                tracker.reset_mod_stats()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@given(heads=st.integers(1, 4), head_width=st.integers(1, 8), layers=st.integers(1, 4), vocab_size=st.integers(6, 500), max_seq_len=st.integers(3, 64))
def test_the_parameters_are_counted_as_the_model_has_them(heads, head_width, layers, vocab_size, max_seq_len):
    config = ModelConfig(vocab_size, layers, heads, heads * head_width, max_seq_len)
    with torch.device("meta"):
        model = Bert(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def random_shapes(n):
    rng = random.Random(5)
    for _ in range(n):
        heads = rng.choice([1, 2, 4, 8])
        yield (rng.choice([300, 1000, 10_000, 25_000, 50_000]), rng.randint(1, 4), heads, heads * rng.choice([2, 4, 8, 16, 32, 64]),
               rng.choice([16, 32, 64, 128, 256, 512]), rng.choice([1, 2, 4, 8, 16, 32, 64, 96]))


@pytest.mark.parametrize("shape", [*SHAPES.values(), *random_shapes(50)], ids=str)
def test_the_plan_is_what_a_training_step_takes(shape):
    vocab_size, n_layers, n_heads, n_embed, max_seq_len, batch_size = shape
    planned = planned_training_bytes(constants(n_layers, n_heads, n_embed, max_seq_len, batch_size), vocab_size)
    taken = taken_by_a_step(ModelConfig(vocab_size, n_layers, n_heads, n_embed, max_seq_len), batch_size)
    assert AT_LEAST * taken <= planned <= AT_MOST * taken


def test_micro_batches_take_what_a_batch_of_their_size_takes():
    whole, small = constants(4, 8, 128, 128, 32, micro_batch_size=8), constants(4, 8, 128, 128, 8)
    assert planned_training_bytes(whole, 10_000) == planned_training_bytes(small, 10_000)
    gpu, machine = (planned_peak_gb(small, 10_000, torch.device(name)) for name in ("cuda", "cpu"))
    assert min(gpu, machine) > planned_training_bytes(small, 10_000) / 1e9
