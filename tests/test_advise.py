"""The recommended version and command, for other machines and for this one."""

import os
import shlex

import pytest
from helpers import ROOT, run_python, write_corpus

from microbert.advise import Machine, advise
from microbert.config.flags import read_script
from microbert.data.corpus import Estimate

GIB = 2**30


def machine(gpu_gib=None, n_gpus=1, free_gb=1000, has_network=True):
    return Machine(16, gpu_gib and round(gpu_gib * GIB), n_gpus if gpu_gib else 0, round(free_gb * 1e9), has_network)


def dataset_of(documents):
    return Estimate(documents, documents * 1300 / 1e6)


MACHINES = {
    # machine (GPU memory as the driver reports it), documents, use -> version, words of the command, of the warnings
    "no GPU, reviews": (machine(), 25_000, None, 1, ["mlm_pretrain_v1.py"], []),
    "no GPU, a first real model": (
        machine(),
        25_000,
        "production",
        4,
        ["mlm_pretrain_v4.py", "--max-minutes 20", "--vocab-size 10000"],
        ["v1 or v2"],
    ),
    "no GPU, 500K": (machine(), 500_000, None, 2, ["mlm_pretrain_v2.py"], []),
    "6 GB, 50K": (machine(5.8), 50_000, None, 1, ["mlm_pretrain_v1.py"], []),
    "12 GB, 50K": (machine(11.8), 50_000, None, 2, ["mlm_pretrain_v2.py"], []),
    "12 GB, 800K": (machine(11.8), 800_000, None, 2, ["mlm_pretrain_v2.py", "--max-samples"], []),
    "16 GB, 800K": (machine(15.7), 800_000, None, 3, ["mlm_pretrain_v3.py"], []),
    "16 GB, 5M": (machine(15.7), 5_000_000, None, 3, ["mlm_pretrain_v3.py"], []),
    "24 GB, 5M": (machine(23.6), 5_000_000, None, 4, ["mlm_pretrain_v4.py"], []),
    "an A10 is a 24 GB GPU": (machine(22.5), 5_000_000, None, 4, ["mlm_pretrain_v4.py"], []),
    "24 GB, to learn": (machine(23.6), 50_000, "learning", 1, ["mlm_pretrain_v1.py"], []),
    "80 GB, 20M": (machine(79.6), 20_000_000, None, 4, ["mlm_pretrain_v4.py", "--max-samples"], []),
    "141 GB, 5M": (machine(139.8), 5_000_000, None, 4, ["mlm_pretrain_v4.py"], []),
    "eight of 16 GB, 5M": (machine(15.7, 8), 5_000_000, None, 3, ["NUM_GPUS=8", "./train_h200_8gpu_standard.sh"], []),
    "eight of 141 GB, 10M": (
        machine(139.8, 8),
        10_000_000,
        None,
        4,
        ["NUM_GPUS=8 PRESET=auto", "./train_h200_8gpu_v4.sh"],
        [],
    ),
    "eight of 80 GB, 500K": (machine(79.6, 8), 500_000, None, 3, ["NUM_GPUS=8", "./train_h200_8gpu_standard.sh"], []),
    "eight of 80 GB, reviews": (
        machine(79.6, 8),
        25_000,
        None,
        2,
        ["torchrun", "--nproc-per-node=8", "mlm_pretrain_v2.py"],
        [],
    ),
    "6 GB, 20M": (machine(5.8), 20_000_000, None, 4, ["mlm_pretrain_v4.py"], []),
    "a small disk": (
        machine(23.6, free_gb=8),
        5_000_000,
        None,
        4,
        ["mlm_pretrain_v4.py", "--streaming"],
        ["downloads"],
    ),
    "a tiny disk": (
        machine(23.6, free_gb=0.5),
        5_000_000,
        None,
        4,
        ["--max-samples"],
        ["the disk has room for the tokens", "downloads"],
    ),
    "no network": (machine(23.6, has_network=False), 500_000, None, 3, ["mlm_pretrain_v3.py"], ["without a network"]),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_version_its_command_and_its_warnings(name):
    here, documents, use, version, command, warnings = MACHINES[name]
    advice = advise(here, "imdb" if documents <= 25_000 else "org/name", dataset_of(documents), use)
    assert advice.version == version
    assert all(words in advice.command for words in command)
    assert len(advice.warnings) == len(warnings), advice.warnings
    assert all(words in warning for words, warning in zip(warnings, advice.warnings, strict=True)), advice.warnings
    read_script(
        ROOT / f"mlm_pretrain_v{version}.py", list(advice.flags)
    )  # fails on a flag that the script does not have


def test_max_samples_is_what_the_disk_has_room_for():
    advice = advise(machine(23.6, free_gb=0.5), "org/name", dataset_of(5_000_000))
    flags = list(advice.flags)
    documents = int(flags[flags.index("--max-samples") + 1])
    assert 100_000 < documents < 1_000_000


def run_advise(*arguments, cwd=ROOT):
    offline = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return run_python(["-m", "microbert.advise", *arguments], cwd, offline)


def test_on_this_machine_with_files_it_prints_a_valid_command_and_a_plan(tmp_path):
    corpus = write_corpus(tmp_path / "a b.jsonl")
    done = run_advise("--dataset", str(corpus), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = next(line for line in done.stdout.splitlines() if line.startswith("    "))
    program, script, *flags = shlex.split(command)
    assert program == "python" and read_script(ROOT / script, flags).dataset == str(corpus)
    assert "total" in done.stdout and "time: about" in done.stdout and "{" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a b.jsonl"]


@pytest.mark.slow
def test_an_earlier_run_is_not_replaced(tmp_path):
    (tmp_path / "runs" / "v1").mkdir(parents=True)
    (tmp_path / "runs" / "v1-2").mkdir()
    (tmp_path / "runs" / "v1" / "notes.txt").write_text("mine")
    done = run_advise("--dataset", str(write_corpus(tmp_path / "corpus.jsonl")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--output-dir runs/v1-3" in done.stdout and "time: about" in done.stdout


@pytest.mark.slow
def test_another_machine_and_dataset():
    done = run_advise("--samples", "20M", "--gpu-memory-gb", "24", "--num-gpus", "8")
    assert done.returncode == 0, done.stderr
    assert (
        "use v4" in done.stdout
        and "8 GPUs of 24 GB (not at hand)" in done.stdout
        and "about 20,000,000 documents" in done.stdout
    )
    assert "without a network" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--samples", "many"], "--samples"),
        (["--samples", "0"], "--samples"),
        (["--dataset", "no/such/file.txt"], "no/such/file.txt"),
        (["--gpu-memory-gb", "-1"], "--gpu-memory-gb"),
    ],
)
def test_a_mistake_is_one_line(arguments, words):
    done = run_advise(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
