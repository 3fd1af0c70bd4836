"""Mistakes in the block or in a flag are answered in under a second, in plain words, with nothing created."""

import dataclasses
import re
import subprocess
import sys

import pytest
from configs import V4, configure, configure_v4, constants, resolve
from helpers import ROOT, SCRIPT

from microbert.config.constants import resolve_batch_size
from microbert.config.flags import read_config, read_script
from microbert.config.learning_rate import explain_learning_rate
from microbert.errors import InputError


@pytest.mark.parametrize(
    "script, shape, training, data",
    [
        ("mlm_pretrain_v1.py", (2, 2, 4), (3, 5e-5), (False, None)),
        ("mlm_pretrain_v2.py", (4, 4, 8), (5, 3e-5), (True, 500_000)),
        ("mlm_pretrain_v3.py", (6, 8, 16), (5, 3e-5), (True, 5_000_000)),
    ],
)
def test_each_version_has_the_reference_configuration(script, shape, training, data):
    config = read_config(str(ROOT / script), constants(ROOT / script), [])
    assert (config.n_layers, config.n_heads, config.n_embed) == shape
    assert (config.epochs, config.learning_rate) == training
    assert (config.packing, config.max_samples) == data
    assert (config.dataset, config.max_seq_len, config.vocab_size, config.batch_size) == ("imdb", 128, 10000, 32)


@pytest.mark.parametrize(
    "script, flags, times",
    [
        (
            "mlm_pretrain_v4.py",
            ["--lr", "1e-3", "--batch-size", "32"],
            "17 times the highest peak[^\\n]*\n  At this batch size, sweeps went up to 0.012: learning_rate = 6e-05",
        ),
        ("mlm_pretrain_v3.py", ["--lr", "1e-2"], "167 times"),
        ("mlm_pretrain_v1.py", ["--lr", "1e-3"], "5 times .*\n.* went up to 0.095"),
        ("mlm_pretrain_v1.py", ["--lr", "1", "--lr-scaling", "none"], "10 times"),
    ],
)
def test_a_peak_far_above_the_sweeps_is_a_warning(script, flags, times):
    explained = explain_learning_rate(resolve(read_script(ROOT / script, flags), n_layers=4))
    assert re.search(f"\nwarning: that is {times}", explained)


@pytest.mark.parametrize(
    "flags", [[], ["--preset", "large"], ["--preset", "large", "--global-batch-size", "768"], ["--lr", "1e-4"]]
)
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_usual_peaks_are_no_warning(version, flags):
    if version == 4 or "--preset" not in flags:
        config = read_script(ROOT / f"mlm_pretrain_v{version}.py", flags)
        assert "warning" not in explain_learning_rate(resolve(config, n_layers=4, batch_size=32))


def test_the_weight_decay_is_explained_by_what_it_does_to_a_weight():
    config = resolve(read_script(ROOT / "mlm_pretrain_v1.py", ["--lr", "0.01", "--lr-scaling", "none"]), n_layers=4)
    explained = explain_learning_rate(dataclasses.replace(config, weight_decay=0.1))
    steps = int(re.search(r"\nweight decay: 0.1 x the learning rate a step;.* in (\d+) steps$", explained)[1])
    assert (1 - 0.01 * 0.1) ** steps == pytest.approx(0.5, abs=1e-3)
    assert "weight decay" not in explain_learning_rate(dataclasses.replace(config, weight_decay=0.0))


BAD = [
    (["--n-embed", "5"], ["n_embed = 5", "divisible by n_heads = 2"]),
    (["--vocab-size", "5"], ["vocab_size = 5", "too small"]),
    (["--lr", "-1"], ["learning_rate", "above 0"]),
    (["--lr", "0"], ["learning_rate", "above 0"]),
    (["--max-seq-len", "2"], ["max_seq_len = 2", "at least 3"]),
    (["--mlm-probability", "0"], ["mlm_probability"]),
    (["--mlm-probability", "1.01"], ["mlm_probability"]),
    (["--batch-size", "0"], ["batch_size"]),
    (["--grad-clip", "0"], ["grad_clip"]),
    (["--dataset", "no/such/file.txt"], ["no/such/file.txt"]),
    (["--device", "tpu"], ["device"]),
    (["--lr-scaling", "often"], ["lr_scaling"]),
    (["--optimizer", "sgd"], ["optimizer", '"adamw" or "muon"']),
    (["--schedule", "cosine"], ["schedule", '"linear" or "wsd"']),
    (["--decay-ratio", "0"], ["decay_ratio"]),
    (["--decay-ratio", "0.95"], ["decay_ratio", "warmup_ratio"]),
    (["--warmup-ratio", "0.8", "--decay-ratio", "0.2001"], ["decay_ratio", "warmup_ratio"]),
    (["--max-minutes", "0"], ["max_minutes"]),
    (["--seed", "-1"], ["seed"]),
    (["--output-dir", ""], ["output_dir"]),
]


@pytest.mark.parametrize("flags, words", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_exit_with_2_and_one_line_that_names_them(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(*flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


def test_two_ratios_whose_rounded_sum_is_1_are_accepted():
    config = configure()
    for hundredths in range(1, 100):
        warmup, decay = hundredths / 100, (100 - hundredths) / 100
        assert dataclasses.replace(config, warmup_ratio=warmup, decay_ratio=decay).decay_ratio == decay


def test_a_ratio_that_the_schedule_does_not_use_is_ignored():
    assert configure("--schedule", "linear", "--warmup-ratio", "0.9").warmup_ratio == 0.9


@pytest.mark.parametrize(
    "preset, shape, batch_size", [("auto", (None, 8, 128, 128, 50_000), None), ("large", (8, 8, 256, 256, 25_000), 96)]
)
def test_a_preset_sets_only_what_is_none(preset, shape, batch_size):
    config = configure_v4("--preset", preset)
    assert (config.n_layers, config.n_heads, config.n_embed, config.max_seq_len, config.vocab_size) == shape
    assert config.batch_size == batch_size
    config = configure_v4("--preset", preset, "--n-layers", "3", "--vocab-size", "9000", n_embed=64, batch_size=5)
    assert (config.n_layers, config.vocab_size, config.n_embed, config.batch_size, config.n_heads) == (
        3,
        9000,
        64,
        5,
        8,
    )
    assert (config.memory_budget_gb, config.epochs, config.learning_rate, config.max_samples, config.packing) == (
        24,
        5,
        3e-5,
        10_000_000,
        True,
    )


def test_version_4_has_the_constants_of_version_3_and_more():
    v3, v4 = set(constants(ROOT / "mlm_pretrain_v3.py")), set(constants(V4))
    assert (
        v4 - v3
        == {
            *("arch", "rows", "embedding_init", "preset", "memory_budget_gb", "dtype"),
            *("torch_compile", "gpu_memory_gb", "num_gpus"),
        }
        and v3 < v4
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "huge"], 'preset = \'huge\' must be "auto" or "large"'),
        (["--preset", "none"], "must not be None without a preset"),
        (["--memory-budget-gb", "0"], "memory_budget_gb"),
        (["--dtype", "float16"], "dtype"),
        (["--gpu-memory-gb", "24"], "requires --dry-run"),
        (["--num-gpus", "8"], "requires --dry-run"),
        (["--rows", "lines"], 'rows = \'lines\' must be "packed" or "documents"'),
        (["--packing", "false"], 'packing = False has no effect on rows = "documents": set rows = "packed" too'),
        (["--max-seq-len", "8193"], 'max_seq_len = 8193 must be at most 8,192 with rows = "documents"'),
        (["--arch", "gpt"], 'arch = \'gpt\' must be "bert" or "modern"'),
        (["--n-heads", "128"], "n_embed / n_heads = 128 / 128 must be even"),
        (["--dry-run", "--num-gpus", "0"], "num_gpus"),
        (["--batch-size", "auto"], "batch_size"),
    ],
)
def test_mistakes_in_the_constants_of_version_4(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        configure_v4(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.fault(row=28)
def test_a_misspelt_constant_in_the_script_itself_is_found(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.read_text().replace("n_layers = 2", "n_layer = 2"))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "did you mean n_layers?" in done.stderr


TRAINED = {"batch_size": 16, "global_batch_size": 32}


@pytest.mark.parametrize(
    "constants, world_size, trained, resolved",
    [
        ({"batch_size": 16}, 4, None, (16, 64)),
        ({"batch_size": 16, "global_batch_size": 32}, 4, None, (8, 32)),
        ({"batch_size": 16}, 1, TRAINED, (32, 32)),
        ({"batch_size": 16}, 8, TRAINED, (4, 32)),
        ({"batch_size": 8}, 4, TRAINED, (8, 32)),
        ({"batch_size": 16, "global_batch_size": 32}, 2, TRAINED, (16, 32)),
    ],
)
def test_the_global_batch_is_kept_on_any_number_of_processes(constants, world_size, trained, resolved):
    config = resolve_batch_size(configure(**constants), world_size, trained)
    assert (config.batch_size, config.global_batch_size) == resolved


@pytest.mark.parametrize(
    "constants, world_size, trained, message",
    [
        ({"batch_size": 8}, 1, TRAINED, "batch_size = 8 (was 16)"),
        ({"global_batch_size": 64}, 2, TRAINED, "global_batch_size = 64 (was 32)"),
        ({"batch_size": 16}, 5, TRAINED, "5 processes"),
        ({"global_batch_size": 10}, 4, None, "4 processes"),
    ],
)
def test_another_batch_is_rejected(constants, world_size, trained, message):
    with pytest.raises(InputError) as caught:
        resolve_batch_size(configure(**constants), world_size, trained)
    assert message in str(caught.value)
