"""Which version is for me? `python -m microbert.advise` looks at this machine and at your dataset, and says which script to start, how, and what it will take.

python -m microbert.advise                                        this machine, the bundled reviews
python -m microbert.advise --dataset "texts/*.jsonl.gz"           your files, or a dataset of the Hub
python -m microbert.advise --samples 20M --gpu-memory-gb 24 --num-gpus 8    what is not at hand
python -m microbert.advise --use production                       or learning, standard, many-gpus
"""

import argparse
import contextlib
import dataclasses
import io
import shlex
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import torch

from microbert.config.constants import Config, dataset_files
from microbert.config.flags import Parser, read_script, whole_number
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
MEMORY_STEPS, VERSIONS = (
    (7, 14, 21.5),
    (1, 2, 3, 4),
)  # GiB of a GPU, as drivers report 8, 16 and 24 GB; the version below the first, from it on, and so forth
BY_SAMPLES = (
    (100_000, (1, 2)),
    (1_000_000, (2, 3)),
    (10_000_000, (3, 4)),
)  # the versions that are made for datasets below so many documents; v4 beyond
BY_USE = {"learning": 1, "standard": 2, "many-gpus": 3, "production": 4}
MADE_FOR = {
    1: "the quick start",
    2: "the standard version, for any dataset",
    3: "made for many GPUs",
    4: "for production: sized to the device, within 24 GB a GPU",
}
TORCHRUN = ("torchrun", "--standalone")
LAUNCHERS = {3: "./train_h200_8gpu_standard.sh", 4: "./train_h200_8gpu_v4.sh"}
BYTES_A_DOCUMENT = 1300  # where only their number is known: IMDB's
CONNECT_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """gpu_memory: bytes of each GPU, None without one. free_disk: bytes where the run and its cache would lie."""

    n_cores: int
    gpu_memory: int | None
    n_gpus: int
    free_disk: int
    has_network: bool

    def __str__(self) -> str:
        gpus = (
            "no GPU"
            if self.gpu_memory is None
            else f"{self.n_gpus} GPU{'s' * (self.n_gpus > 1)} of {self.gpu_memory / GIB:.0f} GiB"
        )
        return f"{self.n_cores} cores, {gpus}, {self.free_disk / 1e9:,.0f} GB of disk free, {'the Hugging Face Hub answers' if self.has_network else 'no way to the Hugging Face Hub'}"


@dataclasses.dataclass(frozen=True)
class Advice:
    """flags: of the version's script. reasons, warnings: a line each."""

    version: int
    flags: tuple[str, ...]
    command: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def advise(machine: Machine, dataset: str, estimate: Estimate, use: str | None = None) -> Advice:
    """The version for this machine, dataset and use. What it is to be used for decides; else the size of the dataset, and within that the GPU."""
    most_by_memory = (
        1 if machine.gpu_memory is None else VERSIONS[sum(machine.gpu_memory >= gib * GIB for gib in MEMORY_STEPS)]
    )
    lowest, highest = next((versions for most, versions in BY_SAMPLES if estimate.documents < most), (4, 4))
    fitting = max(most_by_memory, 3) if machine.n_gpus > 1 else most_by_memory
    version = min(max(fitting, lowest), highest)
    made_for = f"v{lowest}" if lowest == highest else f"v{lowest} and v{highest}"
    reasons = [
        f"{'' if estimate.is_exact else 'about '}{estimate.documents:,} documents: {made_for} {'alone is' if lowest == highest else 'are'} made for that"
    ]
    if machine.gpu_memory is None:
        reasons.append("no GPU: the smaller the model the sooner it is done")
    else:
        reasons.append(f"{machine.gpu_memory / GIB:.0f} GiB a GPU: up to v{most_by_memory}")
    if machine.n_gpus > 1:
        reasons.append(f"{machine.n_gpus} GPUs: v3 and v4 are made for several")
    warnings: tuple[str, ...] = ()
    if use is not None:
        wanted = BY_USE[use]
        reasons.append(f"for {use.replace('-', ' ')}: v{wanted}")
        if not lowest <= wanted <= highest:
            warnings = (f"for so many documents {made_for} would be the choice",)
        version = wanted
    flags, obstacles = _flags(version, machine, dataset, estimate)
    if version == 4 and machine.gpu_memory is None:
        reasons.append("v4 without a GPU: 10,000 words and 20 minutes give a first model that fills blanks sensibly")
    return Advice(version, flags, _command(version, machine, flags), tuple(reasons), (*warnings, *obstacles))


def _flags(version: int, machine: Machine, dataset: str, estimate: Estimate) -> tuple[tuple[str, ...], list[str]]:
    """The flags of the version's script, and what stands in the way of the run, a line each."""
    warnings: list[str] = []
    flags = [] if dataset == "imdb" else ["--dataset", dataset]
    if version == 4 and machine.gpu_memory is None:
        flags += ["--vocab-size", "10000", "--max-minutes", "20"]
    config, documents = _config(version, flags), estimate.documents
    needed = 2e6 * estimated_megabytes(estimate, config)  # the tokens and, while they are written, as much again
    if needed > machine.free_disk:
        documents = max(2, int(0.9 * documents * machine.free_disk / needed))
        warnings.append(
            f"the disk has room for the tokens of {documents:,} documents only: another --cache-dir may have more"
        )
    if dataset == "hf" or documents < estimate.documents:
        flags += ["--max-samples", str(documents)]
    elif config.max_samples is not None and config.max_samples < documents:
        flags += ["--max-samples", "none"]
    config = _config(version, flags)
    is_of_the_hub = dataset != "imdb" and (dataset == "hf" or not dataset_files(config))
    download = 1e6 * estimate.megabytes
    if is_of_the_hub and not choose_dataset(config)[2] and needed + download > machine.free_disk:
        flags.append("--streaming")
        warnings.append(
            f"the disk has no room for {download / 1e9:,.1f} GB of downloads: the dataset is read as it comes"
        )
    if is_of_the_hub and not machine.has_network:
        warnings.append(
            "without a network a dataset of the Hub cannot be read: prepare it elsewhere (--prepare-only) and bring cache/, or give files"
        )
    folder, number = Path(config.output_dir), 2
    while folder.exists():  # a run of another day, which is none of this one's business
        folder, number = Path(f"{config.output_dir}-{number}"), number + 1
    if number > 2:
        flags += ["--output-dir", str(folder)]
    return tuple(flags), warnings


def _config(version: int, flags: list[str]) -> Config:
    return read_script(ROOT / f"mlm_pretrain_v{version}.py", flags)


def _command(version: int, machine: Machine, flags: tuple[str, ...]) -> str:
    script = f"mlm_pretrain_v{version}.py"
    if machine.n_gpus < 2:
        return shlex.join(["python", script, *flags])
    if version not in LAUNCHERS:
        return shlex.join([*TORCHRUN, f"--nproc-per-node={machine.n_gpus}", script, *flags])
    preset = " PRESET=auto" if version == 4 else ""  # its launcher starts from the large one
    given = () if "--dataset" in flags else ("--dataset", "imdb")  # and both from "hf"
    return f"NUM_GPUS={machine.n_gpus}{preset} {shlex.join([LAUNCHERS[version], *given, *flags])}"


def this_machine(folder: Path) -> Machine:
    """folder: where the run would lie."""
    if torch.cuda.is_available():
        gpu_memory, n_gpus = memory_bytes(torch.device("cuda", 0), World.alone()), torch.cuda.device_count()
    elif torch.backends.mps.is_available():
        gpu_memory, n_gpus = memory_bytes(torch.device("mps"), World.alone()), 1
    else:
        gpu_memory, n_gpus = None, 0
    return Machine(n_cores(), gpu_memory, n_gpus, shutil.disk_usage(folder).free, _hub_answers())


def _hub_answers() -> bool:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE  # only here, because it takes a while to load

    where = urlsplit(ENDPOINT)
    if HF_HUB_OFFLINE or not where.hostname:
        return False
    try:
        with socket.create_connection(
            (where.hostname, where.port or (443 if where.scheme == "https" else 80)), CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False


@plain_errors()
def main() -> None:
    parser = Parser(prog="python -m microbert.advise", description="Which version is for me?")
    parser.add_argument(
        "--dataset", nargs="+", help="as for the scripts: imdb (unless you say another), hf, a Hub id, paths and globs"
    )
    parser.add_argument("--samples", help="so many documents, such as 500K or 20M, instead of looking at the dataset")
    parser.add_argument("--use", choices=BY_USE)
    parser.add_argument("--gpu-memory-gb", type=float, help="of each GPU of a machine that is not at hand; 0: none")
    parser.add_argument("--num-gpus", type=int, help="of a machine that is not at hand")
    arguments = parser.parse_args()
    _print_outcome(arguments)


def _print_outcome(arguments: argparse.Namespace) -> None:
    machine = this_machine(Path("."))
    is_at_hand = arguments.gpu_memory_gb is None and arguments.num_gpus is None
    if not is_at_hand:
        gb = 24.0 if arguments.gpu_memory_gb is None else arguments.gpu_memory_gb
        n_gpus = (1 if arguments.num_gpus is None else arguments.num_gpus) if gb else 0
        if gb < 0 or n_gpus < 0:
            raise InputError("--gpu-memory-gb and --num-gpus must be at least 0")
        machine = dataclasses.replace(machine, gpu_memory=round(gb * GIB) if n_gpus else None, n_gpus=n_gpus)
    print(f"this machine: {machine}" if is_at_hand else f"a machine like this: {machine}")
    if arguments.samples is None:
        dataset = ",".join(arguments.dataset or ["imdb"])
        with contextlib.redirect_stdout(io.StringIO()):  # the plan below tells the same
            estimate = open_corpus(_config(1, ["--dataset", dataset]), lambda: None).estimate
    else:
        documents = whole_number("--samples", arguments.samples)
        if documents < 1:
            raise InputError("--samples must be at least 1")
        estimate = Estimate(documents, documents * BYTES_A_DOCUMENT / 1e6)
        dataset = ",".join(arguments.dataset or ["imdb" if documents <= IMDB_DOCUMENTS else "hf"])
    advice = advise(machine, dataset, estimate, arguments.use)
    print(f"\ntake v{advice.version}, {MADE_FOR[advice.version]}:\n\n    {advice.command}\n")
    for reason in advice.reasons:
        print(f"  {reason}")
    for warning in advice.warnings:
        print(f"  but: {warning}")
    print("\nwhat it would take, by --dry-run:")
    plan = dataclasses.replace(_config(advice.version, [*advice.flags]), dry_run=True)
    if machine.n_gpus > 1 or not is_at_hand and machine.n_gpus:
        plan = dataclasses.replace(
            plan, num_gpus=machine.n_gpus, gpu_memory_gb=None if is_at_hand else machine.gpu_memory / GIB
        )
    print_plan(plan, None if arguments.samples is None else estimate)


if __name__ == "__main__":
    main()
