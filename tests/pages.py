"""The commands in README.md, CONTRIBUTING.md and docs/, run in a fresh clone, and the pictures that they draw.

Each command runs as written, followed by flags that shorten it, with the tests' stand-in for the Hub.
"""

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
from helpers import ROOT, TIME_LIMIT, run_python, write_corpus
from hub_server import HubServer
from launches import finish
from test_readme import commands

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# the start of a command in running text
BEGINS = r"(?:[A-Z_]+=\S+ )*(?:python|pytest|(?:\.venv/bin/|scripts/|\./)\S+|torchrun|sbatch) "
SMALL = "--max-samples 300 --vocab-size 300 --epochs 1"
RUN = f"{SMALL} --overwrite"  # the commands of a page share folders
ONE_LAYER = f"{RUN} --n-layers 1 --n-embed 16 --batch-size 8"

# what is appended to a command: the value of the first pattern that matches it. None for commands that do not run here:
# installations (the continuous integration installs), Slurm (tests/test_launchers.py has a stand-in), and several
# machines (tests/test_commands.py starts them)
SHORT = {
    r"install |-m venv|sbatch|train_multinode|microbert\.torchrun$": None,
    r"pytest -m (gpu|pages)": "--collect-only -q -n 0 tests/test_gpu.py tests/test_commands.py",
    r"pytest": "--collect-only -q -n 0 tests/faults/test_crash_and_resume.py",
    r"DRY_RUN=1|advise|fill_mask|microbert\.plot": "",
    r"pretrain_v4.*--dry-run": ONE_LAYER,
    r"--dry-run": "--overwrite",
    r"--prepare-only": f"{SMALL} --output-dir runs/prepared",
    r"microbert\.evaluate": "--documents 20",
    r"microbert\.finetune": "--max-samples 200 --epochs 1 --lr 5e-5 --overwrite",
    r"/train_(h200_8gpu_v4|24gb)": ONE_LAYER,
    r"/train_": RUN,
    r"pretrain_v4.*--max-minutes": f"{ONE_LAYER} --max-minutes 0.5",
    r"pretrain_v4": ONE_LAYER,
    r"pretrain_": RUN,
    r"attention\.py": "--rounds 1",
    r"compare_hf\.py": "--shapes v1 --rounds 1",
    r"gpu\.py": f"--steps 2 --shapes large --device cpu {ONE_LAYER}",
    r"benchmarks/worth\.py": "--labels 100 --seeds 1 --epochs 1 --lr 5e-5 --max-seq-len 64",
    r"head\.py": "--rows 64 --vocab-size 1000 --rounds 2",
    r"learning_rate\.py": "--scripts v1 --factors 1 --max-steps 5",
    r"recipe\.py": "--max-steps 2 --seeds 42 --variants 'dropout 0.1'",
    r"scaling\.py": "--rounds 1 --steps 2",
    r"soak\.py": "--minutes 0.01 --scripts v1",
    r"time_to_loss\.py": f"--minutes 0.05 --search-minutes 0.02 {SMALL} --n-layers 1 --max-seq-len 32",
}
FOR_THIS_MACHINE = {"--nproc-per-node=8": "--nproc-per-node=2", "--nproc_per_node=8": "--nproc_per_node=2"}
# by picture of docs/: the command that draws it, and the file that the command writes
MADE_BY = {
    "v1_training_curve.png": ("mlm_pretrain_v1.py", "runs/v1/training_curve.png"),
    "v1_attention.png": ("microbert.plot runs/v1", "plots/attention-v1.png"),
    "v1_embeddings.png": ("microbert.plot runs/v1", "plots/embeddings-v1.png"),
    "v4_training_curve.png": (
        "mlm_pretrain_v4.py --vocab-size 10000 --max-minutes 20 --output-dir runs/first",
        "runs/first/training_curve.png",
    ),
    "v4_loss_by_length.png": ("microbert.evaluate runs/first", "runs/first/loss_by_length.png"),
    "learning_rate.png": ("benchmarks/learning_rate.py", "learning_rate.png"),
    "time_to_loss.png": ("benchmarks/time_to_loss.py", "time_to_loss.png"),
}


def shown(page):
    """Return the page's commands: those in its code blocks, then those in the text. `&&` separates commands."""
    text = page.read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```bash\n.*?^```$\n", text, re.MULTILINE | re.DOTALL))
    in_the_text = re.findall(rf"`({BEGINS}[^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return list(
        dict.fromkeys(
            one.strip() for line in [*commands(blocks), *in_the_text] for one in line.split("&&") if one.strip()
        )
    )


def shortened(command):
    """Return the command as it runs here; None if it does not run here."""
    flags = next(flags for pattern, flags in SHORT.items() if re.search(pattern, command))  # raises if none matches
    if flags is None:
        return None
    for there, here in FOR_THIS_MACHINE.items():
        command = command.replace(there, here)
    return f"{command} {flags}"


def with_commands(pages):
    """Return the pages with at least one command that runs here."""
    return [page for page in pages if any(map(shortened, shown(page)))]


def make_clone(folder):
    """Create a clone of the repository with an environment and the data files that the pages assume."""
    ignored = [line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored, *MADE_BY))
    (folder / ".venv").symlink_to(sys.prefix)
    lines = write_corpus(folder / "corpus.jsonl").read_text()
    (folder / "texts").mkdir()
    (folder / "texts" / "1.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "more.txt").write_text("one document more\nand another\n")
    (folder / "labels.csv").write_text(
        "review,stars\n"
        + "".join(f"film {number} was {('bad', 'good')[number % 2]},{number % 2}\n" for number in range(100))
    )


@contextlib.contextmanager
def small_hub(clone):
    """Yield environment variables that point to a stand-in for the Hub, with small versions of the pages' datasets."""
    lines, table = (clone / "corpus.jsonl").read_bytes(), io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [json.loads(line)["text"] for line in lines.splitlines()]}), table
    )
    card = "---\nconfigs:\n- config_name: {}\n  data_files:\n  - split: train\n    path: {}/*\n---\n"
    with HubServer() as hub:
        hub.add(
            "Salesforce/wikitext",
            {"README.md": card.format("wikitext-103-raw-v1", "wiki").encode(), "wiki/train.parquet": table.getvalue()},
        )
        hub.add(
            "allenai/c4",
            {"README.md": card.format("en", "en").encode(), "en/c4-train.00000-of-00001.json.gz": gzip.compress(lines)},
        )
        yield hub.env(clone.parent / "hub") | {
            "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}",
            "DEVICE": "cpu",
            "NUM_GPUS": "2",
            "CUDA_VISIBLE_DEVICES": "",
        }


def start(command, clone, environment):
    return subprocess.Popen(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pictures(page):
    return re.findall(r"!\[[^\]]*\]\((?:docs/)?(\w+\.png)\)", page.read_text(encoding="utf-8"))


def run_command(command, clone, environment):
    """Return exit code and output. Python starts in a forked process, which saves seconds, and the rest in a shell."""
    if re.match(r"python (-m microbert|\S+\.py)", command):
        done = run_python(shlex.split(command)[1:], clone, environment, 4 * TIME_LIMIT)
        return done.returncode, done.stdout + done.stderr
    code, out, _ = finish(start(command, clone, environment), 4 * TIME_LIMIT)
    return code, out


def run_page(page, clone, environment, ran):
    """Run the page's commands. ran: commands of earlier pages, which are skipped; this page's are added."""
    for command in [found for command in shown(page) if (found := shortened(command))]:
        if (as_python := command.replace(".venv/bin/", "")) in ran:
            continue
        code, out = run_command(as_python, clone, environment)
        assert code == 0 and "Traceback" not in out, f"{command}\n{out}"
        ran.add(as_python)
    for picture in pictures(page):
        assert (clone / MADE_BY[picture][1]).stat().st_size > 1000, picture
