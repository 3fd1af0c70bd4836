"""The memory plan of a training step, and the tiers, micro-batches and budget that follow from it."""

import dataclasses
import random
import re
import types

import pytest
import torch
from configs import configure, configure_v4, resolve
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from models import few_examples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import microbert.train.memory
from microbert.config.constants import fill_in
from microbert.data.masking import n_slots
from microbert.data.row_lengths import rows_of_process
from microbert.errors import InputError
from microbert.model.build import count_parameters, new_model
from microbert.model.layers import ModelConfig
from microbert.model.loss import CHUNK_ELEMENTS, masked_loss
from microbert.runtime.device import GIB, autocast
from microbert.runtime.run import Run
from microbert.train.hardware import CPU_TIER, GB, TIERS, Hardware
from microbert.train.memory import OUTSIDE_GRAPHS, apply_memory_budget, plan_memory
from microbert.train.optim import Optimizer
from microbert.train.step_memory import planned_training_bytes

SHAPES = {
    "v1": (10_000, 2, 2, 4, 128, 32),
    "v2": (10_000, 4, 4, 8, 128, 32),
    "v3": (10_000, 6, 8, 16, 128, 32),
    "wide": (25_000, 4, 8, 128, 128, 32),
    "a 140 GB GPU": (50_000, 4, 8, 128, 128, 16),
    "an 80 GB GPU": (50_000, 6, 8, 128, 128, 32),
    "a 24 GB GPU": (50_000, 4, 8, 128, 128, 8),
    "large": (25_000, 8, 8, 256, 256, 96),
    "one sequence": (25_000, 4, 8, 128, 128, 1),
    "long": (1_000, 2, 2, 64, 1024, 8),
}
PRODUCTION = ("a 140 GB GPU", "an 80 GB GPU", "a 24 GB GPU", "large")
AT_LEAST, AT_MOST = 1.0, 1.25  # of the tracked peak
CPU = Hardware("cpu", None)
NARROW = Hardware("mps", None)  # bf16 as on a GPU, but logits in the chunks of a CPU, on which this is computed
# by row of docs/memory.md
VERSION_4 = {
    f"auto, {tier.name.removeprefix('GPUs of ').removeprefix('the ')}": resolve(configure_v4(), **tier.values())
    for tier in (*TIERS, CPU_TIER)
}
VERSION_4["large"] = resolve(configure_v4("--preset", "large"))
RECIPES = {
    "v4": {name: getattr(VERSION_4["large"], name) for name in ("arch", "optimizer", "mlm_probability")},
    "modern with AdamW": {"arch": "modern"},
    "BERT with Muon": {"optimizer": "muon"},
}


def constants(shape, **others):
    _, n_layers, n_heads, n_embed, max_seq_len, batch_size = shape
    config = configure(
        **{
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_embed": n_embed,
            "max_seq_len": max_seq_len,
            "batch_size": batch_size,
            "optimizer": "adamw",
            **others,
        }
    )
    return resolve(config)


def tracked_peak(shape, n_parts=1, dropout=0.0, dtype=None, mlm_probability=0.15, **recipe):
    """Return the peak memory of the tensors of a training step of micro-batches, in bytes.

    Nothing is computed: the tensors are fake.
    """
    vocab_size, n_layers, n_heads, n_embed, T, batch_size = shape
    M = n_slots(T, mlm_probability)
    with FakeTensorMode():
        model = new_model(ModelConfig(vocab_size, n_layers, n_heads, n_embed, T, dropout, recipe.get("arch", "bert")))
        optimizer = Optimizer(model, configure(optimizer=recipe.get("optimizer", "adamw")))
        optimizer.begin_after(1)  # so that the moments exist, as from the second step on
        ids, positions, labels, keys = (
            torch.zeros(size, dtype=torch.long)
            for size in ((batch_size, T), (batch_size, M), batch_size * M, batch_size)
        )
        tracker = MemTracker()
        tracker.track_external(model, *optimizer.members, ids, positions, labels)
        with tracker:
            for _ in range(n_parts):
                with autocast(dtype or torch.float32, torch.device("cpu")):
                    hidden = model(ids, None, positions, keys if dropout else None)
                masked_loss(
                    hidden.float(), model.output_weight, model.output_bias, labels, batch_size * M, dtype
                ).backward()
                del hidden
                tracker.reset_mod_stats()
            optimizer.step(1e-3, torch.zeros(()))
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def random_shapes(n):
    rng = random.Random(5)
    for _ in range(n):
        heads = rng.choice([1, 2, 4, 8])
        yield (
            rng.choice([300, 1000, 10_000, 25_000, 50_000]),
            rng.randint(1, 4),
            heads,
            heads * rng.choice([2, 4, 8, 16, 32, 64]),
            rng.choice([16, 32, 64, 128, 256, 512]),
            rng.choice([1, 2, 4, 8, 16, 32, 64, 96]),
        )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES.values(), *random_shapes(50)], ids=str)
def test_the_plan_matches_the_tracked_peak_of_a_training_step(shape):
    planned = planned_training_bytes(constants(shape), shape[0])
    assert AT_LEAST <= planned / tracked_peak(shape) <= AT_MOST


@pytest.mark.slow
@pytest.mark.parametrize("n_parts, dropout", [(2, 0.0), (1, 0.1), (2, 0.1)])
@pytest.mark.parametrize(
    "shape", [SHAPES["v2"], SHAPES["a 24 GB GPU"], SHAPES["one sequence"], SHAPES["long"], *random_shapes(2)], ids=str
)
def test_the_plan_matches_with_micro_batches_and_dropout(shape, n_parts, dropout):
    config = constants(shape, batch_size=n_parts * shape[-1], micro_batch_size=shape[-1], dropout=dropout)
    assert AT_LEAST <= planned_training_bytes(config, shape[0]) / tracked_peak(shape, n_parts, dropout) <= AT_MOST


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES.values(), *random_shapes(4)], ids=str)
def test_the_plan_matches_in_bf16(shape):
    planned = planned_training_bytes(constants(shape, dtype="bfloat16"), shape[0], NARROW)
    assert AT_LEAST <= planned / tracked_peak(shape, dtype=torch.bfloat16) <= AT_MOST


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *random_shapes(10)], ids=str)
def test_the_plan_matches_with_each_architecture_and_optimizer(shape, recipe):
    planned = planned_training_bytes(constants(shape, **recipe), shape[0])
    assert AT_LEAST <= planned / tracked_peak(shape, **recipe) <= AT_MOST


@pytest.mark.parametrize(
    "n_parts, dropout, dtype", [(2, 0.1, None), (1, 0.0, torch.bfloat16), (2, 0.1, torch.bfloat16)]
)
@pytest.mark.parametrize(
    "shape", [SHAPES["v2"], SHAPES["a 24 GB GPU"], SHAPES["large"], SHAPES["one sequence"], SHAPES["long"]], ids=str
)
@pytest.mark.slow
def test_the_plan_matches_with_all_of_these_together(shape, n_parts, dropout, dtype):
    config = constants(
        shape,
        batch_size=n_parts * shape[-1],
        micro_batch_size=shape[-1],
        dropout=dropout,
        dtype="bfloat16" if dtype else "float32",
        **RECIPES["v4"],
    )
    assert (
        AT_LEAST
        <= planned_training_bytes(config, shape[0], NARROW if dtype else CPU)
        / tracked_peak(shape, n_parts, dropout, dtype, **RECIPES["v4"])
        <= AT_MOST
    )


@pytest.mark.parametrize("chunks_of", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", VERSION_4.values(), ids=VERSION_4)
def test_the_plan_matches_for_each_size_of_version_4(config, dtype, chunks_of, monkeypatch):
    """At the row length that needs most."""
    assert (config.arch, config.optimizer, config.mlm_probability) == ("modern", "muon", 0.4)
    assert config.rows == "documents"
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", CHUNK_ELEMENTS[chunks_of])  # of the tracked step, which runs on a CPU
    hardware = Hardware("cuda", None) if chunks_of == "cuda" else NARROW if dtype else CPU
    planned = planned_training_bytes(
        dataclasses.replace(config, dtype="bfloat16" if dtype else "float32"), config.vocab_size, hardware
    )
    size = config.vocab_size, config.n_layers, config.n_heads, config.n_embed
    tracked = [
        tracked_peak((*size, length, n_rows), dtype=dtype, **RECIPES["v4"])
        for length, n_rows in rows_of_process(config).items()
        if length in (config.max_seq_len, 512)
    ]
    assert len(tracked) == 2 and AT_LEAST <= planned / max(tracked) <= AT_MOST


@pytest.mark.parametrize("micro_batch_size, n_rows", [(8, 2), (2, 1), (1, 1)])
def test_a_long_row_is_planned_whole(micro_batch_size, n_rows):
    """A micro-batch of fewer tokens than the longest row has one such row."""
    config = resolve(configure_v4("--vocab-size", "1000"), n_layers=4, batch_size=8)
    config = dataclasses.replace(config, micro_batch_size=micro_batch_size)
    tracked = tracked_peak((1000, 4, 8, 128, 512, n_rows), 1 + (n_rows == 1), **RECIPES["v4"])
    assert AT_LEAST <= planned_training_bytes(config, 1000) / tracked <= AT_MOST


def test_graphs_of_several_row_lengths_leave_room_for_steps_without_one():
    def outside(rows):
        config = resolve(configure_v4("--preset", "large", "--rows", rows))
        return plan_memory(config, 25_000, Hardware("cuda", 80 * GIB, has_bf16=True))

    documents, packed = outside("documents"), outside("packed")
    step = sum(documents.parts[name] for name in ("activations", "logits, one chunk"))
    assert documents.parts[OUTSIDE_GRAPHS] > step > documents.parts[OUTSIDE_GRAPHS] - packed.parts[OUTSIDE_GRAPHS]
    assert documents.fits


def test_the_table_in_the_docs_has_the_tiers_and_the_plan():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", page, re.MULTILINE)
    ]
    documented = {name: figures for name, _, *figures in (row for row in rows if row[0] in VERSION_4)}
    assert documented.keys() == VERSION_4.keys()
    for name, config in VERSION_4.items():
        kind = "cpu" if name == "auto, CPU" else "cuda"
        planned = [
            f"{planned_training_bytes(config, config.vocab_size, Hardware(kind, None, has_bf16=has_bf16)) / GB:.2f} GB"
            for has_bf16 in (False, True)
        ]
        sizes = (
            config.n_layers,
            config.n_heads,
            config.n_embed,
            config.max_seq_len,
            config.vocab_size,
            config.batch_size,
        )
        assert documented[name] == [*(f"{size:,}" for size in sizes), planned[0], planned[1] if kind == "cuda" else ""]


@pytest.mark.parametrize(
    "gib, n_layers, batch_size",
    [
        (139.8, 4, 16),
        (94, 4, 16),
        (93.5, 6, 32),
        (79.6, 6, 32),
        (39.4, 6, 32),
        (37, 4, 8),
        (23.6, 4, 8),
        (22.0, 4, 8),
        (15.8, 4, 8),
    ],
)
def test_the_tier_depends_on_the_memory_of_the_gpu(gib, n_layers, batch_size):
    hardware = Hardware("cuda", round(gib * GIB))
    assert hardware.tier().values() == {"n_layers": n_layers, "batch_size": batch_size}
    assert hardware.is_below_tiers() == (gib < 21.5)


def test_the_cpu_has_a_tier_of_its_own():
    for kind in ("cpu", "mps"):
        assert (
            Hardware(kind, 8 * GIB).tier().values() == {"n_layers": 4, "batch_size": 32}
            and not Hardware(kind, GIB).is_below_tiers()
        )


@pytest.mark.parametrize("name", PRODUCTION)
@pytest.mark.parametrize("gib", [24, 80, 141])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_every_tier_and_the_large_preset_fit_into_24_gb_without_micro_batches(name, gib, has_bf16):
    vocab_size, batch_size = SHAPES[name][0], SHAPES[name][-1]
    plan = plan_memory(
        constants(SHAPES[name], memory_budget_gb=24.0, dtype="auto"),
        vocab_size,
        Hardware("cuda", gib * GIB, 8, has_bf16),
    )
    assert plan.fits and plan.total < 24 * GB == plan.budget and plan.micro_batch_size == batch_size


@few_examples
@given(budget=st.floats(1.2, 3.0), batch_size=st.integers(1, 500), kind=st.sampled_from(["cpu", "cuda"]))
def test_the_micro_batches_are_the_fewest_that_fit(budget, batch_size, kind):
    shape = (10_000, 2, 2, 64, 128, batch_size)

    def plan(**others):
        return plan_memory(
            constants(shape, memory_budget_gb=budget + (kind == "cuda"), **others), 10_000, Hardware(kind, 100 * GIB)
        )

    chosen = plan()
    n_parts = -(-batch_size // chosen.micro_batch_size)
    assert chosen.fits and chosen.micro_batch_size == -(-batch_size // n_parts)
    if n_parts > 1:
        assert not plan(micro_batch_size=-(-batch_size // (n_parts - 1))).fits


@pytest.mark.parametrize("batch_size, between", [(32, 16), (8, None)])
def test_a_whole_batch_is_chosen_even_if_a_smaller_micro_batch_does_not_fit(batch_size, between):
    """Micro-batches need memory for the gradients of earlier ones, a whole batch does not."""
    shape = (50_000, 4, 8, 128, 128, batch_size)

    def total(size):
        return plan_memory(constants(shape, micro_batch_size=size), 50_000, CPU).total

    whole, one_less = total(batch_size), total(batch_size - 1)
    assert whole < one_less
    assert (
        plan_memory(constants(shape, memory_budget_gb=(whole + one_less) / 2 / GB), 50_000, CPU).micro_batch_size
        == batch_size
    )
    if between:
        assert plan_memory(constants(shape, memory_budget_gb=(whole - 1) / GB), 50_000, CPU).micro_batch_size == between
    else:
        with pytest.raises(InputError, match="one sequence"):
            plan_memory(constants(shape, memory_budget_gb=(whole - 1) / GB), 50_000, CPU)


def test_without_bf16_a_gpu_is_planned_in_fp32():
    shape = SHAPES["large"]
    old, new = (
        plan_memory(constants(shape, dtype="auto"), shape[0], Hardware("cuda", 80 * GIB, 1, has_bf16)).total
        for has_bf16 in (False, True)
    )
    assert old > new + GB
    assert old == plan_memory(constants(shape), shape[0], Hardware("cuda", 80 * GIB, 1, True)).total


def test_the_budget_is_the_smaller_of_constant_and_device():
    for budget, gib, expected in (
        (24, 141, 24 * GB),
        (24, 16, 16 * GIB),
        (None, 16, 16 * GIB),
        (24, None, 24 * GB),
        (None, None, None),
    ):
        assert (
            plan_memory(
                constants(SHAPES["v1"], memory_budget_gb=budget), 10_000, Hardware("cpu", gib and gib * GIB)
            ).budget
            == expected
        )


def test_a_model_that_does_not_fit_is_rejected():
    with pytest.raises(InputError, match="one sequence of 128 tokens needs .* GB with its model, and 1.3 GB are"):
        plan_memory(constants((50_000, 4, 8, 512, 128, 8), memory_budget_gb=1.3), 50_000, CPU)


@pytest.mark.parametrize("kind, budget", [("cuda", 1.0), ("cpu", 0.5)])
def test_a_budget_that_leaves_nothing_for_tensors_is_rejected(kind, budget):
    with pytest.raises(InputError, match=f"memory_budget_gb = {budget:g}"):
        plan_memory(
            constants(SHAPES["v1"], memory_budget_gb=budget, micro_batch_size=1), 10_000, Hardware(kind, 24 * GIB)
        )


def test_memory_outside_cuda_graphs_is_planned_on_gpus_only():
    def plan(kind, cuda_graphs):
        return plan_memory(constants(SHAPES["large"], cuda_graphs=cuda_graphs), 25_000, Hardware(kind, 80 * GIB))

    graphs, without = plan("cuda", True), plan("cuda", False)
    beside = graphs.parts.pop(OUTSIDE_GRAPHS)
    assert graphs == without and plan("cpu", True) == plan("cpu", False)
    parameters = count_parameters(ModelConfig(*SHAPES["large"][:5]))
    assert 4 * (parameters + 2 * 25_000 * 2684) < beside < 1.5e9  # gradients, and twice the logits of a chunk


def test_a_micro_batch_that_is_set_is_planned_unchanged():
    plan = plan_memory(constants(SHAPES["large"], memory_budget_gb=2.0, micro_batch_size=96), 25_000, CPU)
    assert plan.micro_batch_size == 96 and not plan.fits
    assert plan_memory(constants(SHAPES["v1"], micro_batch_size=100), 10_000, CPU).micro_batch_size == 32


def test_several_processes_need_twice_the_gradients():
    shape = (300, 4, 8, 512, 16, 1)  # hardly anything but weights
    one, two = (planned_training_bytes(constants(shape), 300, Hardware("cpu", None, n)) for n in (1, 2))
    parameters = count_parameters(ModelConfig(300, 4, 8, 512, 16))
    assert 5 * 4 * parameters <= two <= 1.05 * 5 * 4 * parameters and two > one


def test_a_tier_sets_only_what_is_none():
    config = fill_in(configure(preset="auto", n_layers=None, batch_size=7), TIERS[1].values())
    assert (config.n_layers, config.batch_size) == (6, 7)


@pytest.fixture
def budgeted(monkeypatch, tmp_path, capsys):
    """Call apply_memory_budget for a GPU of 80 GiB. Return the resolved Config, the caps and the output."""

    def apply(given, kept=None):
        run = Run(given, tmp_path)
        run.config = resolve(given)
        if kept is not None:
            run.config = dataclasses.replace(run.config, micro_batch_size=kept)
        caps = []
        monkeypatch.setattr(microbert.train.memory, "hardware_of", lambda device, world: Hardware("cuda", 80 * GIB))
        monkeypatch.setattr(microbert.train.memory, "limit_memory", lambda device, n_bytes: caps.append(n_bytes))
        tokens = types.SimpleNamespace(token_counts=[1] * 25_000)
        apply_memory_budget(run, tokens, torch.device("cuda"))
        return run.config, caps, capsys.readouterr().out

    return apply


def test_the_budget_sets_micro_batch_and_cap(budgeted):
    config, caps, out = budgeted(constants(SHAPES["large"], preset="large", memory_budget_gb=4.5))
    assert config.micro_batch_size == 48 and caps == [3.5 * GB]
    assert (
        'preset "large": 8 layers, batch 96' in out
        and "48 sequences of 256 tokens at a time, 2 times per step" in out
        and "of 4.5" in out
    )


def test_without_a_budget_there_is_no_cap(budgeted):
    config, caps, _ = budgeted(constants(SHAPES["large"]))
    assert config.micro_batch_size == 96 and not caps


@pytest.mark.parametrize("asked, kept, resolved", [(None, 12, 12), (None, None, 48), (96, 12, 12), (96, None, 96)])
def test_a_smaller_micro_batch_of_the_checkpoint_is_kept(asked, kept, resolved, budgeted):
    config, _, out = budgeted(constants(SHAPES["large"], memory_budget_gb=4.5, micro_batch_size=asked), kept or asked)
    assert config.micro_batch_size == resolved
    assert ("warning: that is more than available" in out) == (resolved == 96)
