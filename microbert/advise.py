"""Recommend a version: `python -m microbert.advise` looks at this machine and at your dataset.

    python -m microbert.advise                                        this machine, the bundled reviews
    python -m microbert.advise --dataset "texts/*.jsonl.gz"           your files, or a dataset of the Hub
    python -m microbert.advise --samples 20M --gpu-memory-gb 24 --num-gpus 8    another machine or dataset
    python -m microbert.advise --use production                       or learning, standard, many-gpus

It prints the command to run, the reasons, and a plan of memory, disk and time.
"""

import argparse
import dataclasses
import shlex
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch

from microbert.config.constants import Config, local_data_files
from microbert.config.flags import Parser, read_script, whole_number
from microbert.config.terminal import counted
from microbert.data.corpus import Estimate
from microbert.data.hub import choose_dataset
from microbert.data.prepare import estimated_megabytes
from microbert.data.sources import IMDB_DOCUMENTS, open_corpus
from microbert.errors import InputError
from microbert.runtime.device import GIB, memory_bytes, n_cores
from microbert.runtime.distributed import World
from microbert.runtime.outcome import plain_errors
from microbert.train.dry_run import print_plan

ROOT = Path(__file__).resolve().parents[1]
# the largest version for a GPU: v1, and from each of these GiB on the next; drivers report 8, 16 and 24 GB as less
MEMORY_STEPS, VERSIONS = (7, 14, 21.5), (1, 2, 3, 4)
# the versions that suit a dataset of fewer than this many documents; v4 beyond the last
BY_SAMPLES = ((100_000, (1, 2)), (1_000_000, (2, 3)), (10_000_000, (3, 4)))
BY_USE = {"learning": 1, "standard": 2, "many-gpus": 3, "production": 4}
MADE_FOR = {
    1: "the quick start",
    2: "the standard version, for any dataset",
    3: "the version for many GPUs",
    4: "the production version: sized to the device, within 24 GB per GPU",
}
TORCHRUN = ("torchrun", "--standalone")
LAUNCHERS = {3: "./train_h200_8gpu_standard.sh", 4: "./train_h200_8gpu_v4.sh"}
CPU_FLAGS = ("--vocab-size", "10000", "--max-minutes", "20")  # for v4 without a GPU
BYTES_PER_DOCUMENT = 1300  # of IMDB; for a dataset of which only the number of documents is known
DEFAULT_GPU_GB = 24.0
CONNECT_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """gpu_memory: bytes of each GPU, None without a GPU. free_disk: bytes free in the current folder."""

    n_cores: int
    gpu_memory: int | None
    n_gpus: int
    free_disk: int
    has_network: bool

    def __str__(self) -> str:
        gpus = "no GPU"
        if self.gpu_memory is not None:
            gpus = f"{counted(self.n_gpus, 'GPU')} of {self.gpu_memory / GIB:.0f} GiB"
        network = "can be reached" if self.has_network else "cannot be reached"
        return (
            f"{counted(self.n_cores, 'core')}, {gpus}, {self.free_disk / 1e9:,.0f} GB of disk free, "
            f"the Hugging Face Hub {network}"
        )


@dataclasses.dataclass(frozen=True)
class Advice:
    """A version with the flags of its script. reasons, warnings: one line each."""

    version: int
    flags: tuple[str, ...]
    command: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def advise(machine: Machine, dataset: str, estimate: Estimate, use: str | None = None) -> Advice:
    """Return the version for this machine, dataset and use.

    use: a key of BY_USE, which decides alone. Otherwise the size of the dataset decides and, among the versions that
    suit it, the GPU.
    """
    largest = 1
    if machine.gpu_memory is not None:
        largest = VERSIONS[sum(machine.gpu_memory >= gib * GIB for gib in MEMORY_STEPS)]
    lowest, highest = next((versions for limit, versions in BY_SAMPLES if estimate.documents < limit), (4, 4))
    version = min(max(largest, 3) if machine.n_gpus > 1 else largest, highest)
    version = max(version, lowest)
    suited = f"v{lowest}" if lowest == highest else f"v{lowest} or v{highest}"
    reasons = [f"{'' if estimate.is_exact else 'about '}{counted(estimate.documents, 'document')}: {suited}"]
    if machine.gpu_memory is None:
        reasons.append("no GPU: a smaller model trains sooner")
    else:
        reasons.append(f"{machine.gpu_memory / GIB:.0f} GiB per GPU: up to v{largest}")
    if machine.n_gpus > 1:
        reasons.append(f"{machine.n_gpus} GPUs: v3 or v4")
    warnings: list[str] = []
    if use is not None:
        version = BY_USE[use]
        reasons.append(f"for {use.replace('-', ' ')}: v{version}")
        if not lowest <= version <= highest:
            warnings.append(f"for this many documents, {suited} would be the choice")
    flags, obstacles = _flags(version, machine, dataset, estimate)
    if version == 4 and machine.gpu_memory is None:
        reasons.append("v4 without a GPU: 10,000 tokens and 20 minutes make a first model that fills blanks sensibly")
    return Advice(version, flags, _command(version, machine, flags), tuple(reasons), (*warnings, *obstacles))


def _flags(version: int, machine: Machine, dataset: str, estimate: Estimate) -> tuple[tuple[str, ...], list[str]]:
    """Return the flags of the version's script, and warnings about the disk and the network, one line each."""
    warnings: list[str] = []
    flags = [] if dataset == "imdb" else ["--dataset", dataset]
    if version == 4 and machine.gpu_memory is None:
        flags += CPU_FLAGS
    config, documents = _config(version, flags), estimate.documents
    needed = 2e6 * estimated_megabytes(estimate, config)  # writing the tokens takes their size twice
    if needed > machine.free_disk:
        documents = max(2, int(0.9 * documents * machine.free_disk / needed))
        warnings.append(
            f"the disk has room for the tokens of {counted(documents, 'document')} only: "
            "set --cache-dir to a larger disk to use more"
        )
    if dataset == "hf" or documents < estimate.documents:
        flags += ["--max-samples", str(documents)]
    elif config.max_samples is not None and config.max_samples < documents:
        flags += ["--max-samples", "none"]
    config = _config(version, flags)
    if dataset == "hf" or (dataset != "imdb" and not local_data_files(config)):
        hub_flags, hub_warnings = _hub_flags(config, machine, needed, 1e6 * estimate.megabytes)
        flags += hub_flags
        warnings += hub_warnings
    output = _unused_folder(config.output_dir)
    if output != config.output_dir:
        flags += ["--output-dir", output]
    return tuple(flags), warnings


def _hub_flags(config: Config, machine: Machine, needed: float, download: float) -> tuple[list[str], list[str]]:
    """Return flags and warnings for a dataset of the Hub. needed, download: bytes of the tokens and of the dataset."""
    flags, warnings = [], []
    if not choose_dataset(config)[2] and needed + download > machine.free_disk:
        flags.append("--streaming")
        warnings.append(
            f"the disk has no room for {download / 1e9:,.1f} GB of downloads: the dataset is streamed instead"
        )
    if not machine.has_network:
        warnings.append(
            "without a network, a dataset of the Hub cannot be read: prepare it on another machine (--prepare-only) "
            "and copy cache/, or use files"
        )
    return flags, warnings


def _unused_folder(output_dir: str) -> str:
    """Return this folder, or the first of `output_dir-2`, `output_dir-3`, ... if an earlier run is there."""
    folder, number = output_dir, 1
    while Path(folder).exists():
        number += 1
        folder = f"{output_dir}-{number}"
    return folder


def _config(version: int, flags: Sequence[str]) -> Config:
    return read_script(ROOT / f"mlm_pretrain_v{version}.py", flags)


def _command(version: int, machine: Machine, flags: tuple[str, ...]) -> str:
    script = f"mlm_pretrain_v{version}.py"
    if machine.n_gpus < 2:
        return shlex.join(["python", script, *flags])
    if version not in LAUNCHERS:
        return shlex.join([*TORCHRUN, f"--nproc-per-node={machine.n_gpus}", script, *flags])
    preset = " PRESET=auto" if version == 4 else ""  # v4's launcher defaults to the large preset
    dataset = () if "--dataset" in flags else ("--dataset", "imdb")  # both launchers default to "hf"
    return f"NUM_GPUS={machine.n_gpus}{preset} {shlex.join([LAUNCHERS[version], *dataset, *flags])}"


def this_machine(folder: Path) -> Machine:
    """Return the machine that this process runs on. folder: where the run would be saved."""
    gpu_memory, n_gpus = None, 0
    if torch.cuda.is_available():
        gpu_memory, n_gpus = memory_bytes(torch.device("cuda", 0), World.alone()), torch.cuda.device_count()
    elif torch.backends.mps.is_available():
        gpu_memory, n_gpus = memory_bytes(torch.device("mps"), World.alone()), 1
    return Machine(n_cores(), gpu_memory, n_gpus, shutil.disk_usage(folder).free, _is_hub_reachable())


def _is_hub_reachable() -> bool:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE  # slow to import

    url = urlsplit(ENDPOINT)
    if HF_HUB_OFFLINE or not url.hostname:
        return False
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((url.hostname, port), CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _described_machine(here: Machine, gpu_memory_gb: float | None, num_gpus: int | None) -> Machine:
    """Return this machine with other GPUs. Raises InputError for a negative number."""
    gb = DEFAULT_GPU_GB if gpu_memory_gb is None else gpu_memory_gb
    n_gpus = 1 if num_gpus is None else num_gpus
    if gb < 0 or n_gpus < 0:
        raise InputError("--gpu-memory-gb and --num-gpus must be at least 0")
    has_gpus = gb > 0 and n_gpus > 0
    return dataclasses.replace(here, gpu_memory=round(gb * GIB) if has_gpus else None, n_gpus=n_gpus if has_gpus else 0)


def _dataset_and_estimate(names: list[str] | None, samples: str | None) -> tuple[str, Estimate]:
    """Return the value of the constant `dataset`, and the size of the dataset: the given one, or else measured."""
    if samples is None:
        dataset = ",".join(names or ["imdb"])
        return dataset, open_corpus(_config(1, ["--dataset", dataset])).estimate
    documents = whole_number("--samples", samples)
    if documents < 1:
        raise InputError("--samples must be at least 1")
    dataset = ",".join(names or ["imdb" if documents <= IMDB_DOCUMENTS else "hf"])
    return dataset, Estimate(documents, documents * BYTES_PER_DOCUMENT / 1e6)


def _plan_config(advice: Advice, machine: Machine, is_this_machine: bool) -> Config:
    """Return the Config of a dry run of the recommended command."""
    config = dataclasses.replace(_config(advice.version, advice.flags), dry_run=True)
    if machine.gpu_memory is None or (is_this_machine and machine.n_gpus == 1):
        return config
    gpu_memory_gb = None if is_this_machine else machine.gpu_memory / GIB
    return dataclasses.replace(config, num_gpus=machine.n_gpus, gpu_memory_gb=gpu_memory_gb)


def _read_flags() -> argparse.Namespace:
    parser = Parser(
        prog="python -m microbert.advise", description="Recommend a version for this machine and your dataset."
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="TEXT",
        help='"imdb", "hf", a Hub id, or paths and globs, as for the scripts [default: imdb]',
    )
    parser.add_argument("--samples", metavar="N", help="plan for this many documents, such as 500K or 20M")
    parser.add_argument("--use", choices=BY_USE, help="what the model is for; overrides the size of the dataset")
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="X", help="plan for GPUs of this size; 0 plans for a CPU"
    )
    parser.add_argument("--num-gpus", type=int, metavar="N", help="plan for this many GPUs")
    return parser.parse_args()


@plain_errors()
def main() -> None:
    arguments = _read_flags()
    machine = this_machine(Path("."))
    is_this_machine = arguments.gpu_memory_gb is None and arguments.num_gpus is None
    if not is_this_machine:
        machine = _described_machine(machine, arguments.gpu_memory_gb, arguments.num_gpus)
    print(f"{'this machine' if is_this_machine else 'planned machine'}: {machine}")
    dataset, estimate = _dataset_and_estimate(arguments.dataset, arguments.samples)
    advice = advise(machine, dataset, estimate, arguments.use)
    print(f"\nuse v{advice.version}, {MADE_FOR[advice.version]}:\n\n    {advice.command}\n")
    for reason in advice.reasons:
        print(f"  {reason}")
    for warning in advice.warnings:
        print(f"  warning: {warning}")
    print("\nplan of this run (--dry-run):")
    planned_estimate = None if arguments.samples is None else estimate
    print_plan(_plan_config(advice, machine, is_this_machine), planned_estimate, with_json=False)


if __name__ == "__main__":
    main()
