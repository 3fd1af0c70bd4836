"""Is the model of a few minutes worth having? Pretrain, measure by length, fine-tune: one command, JSON out.

    python benchmarks/quality.py                             the large preset for 4 minutes, on the bundled reviews
    python benchmarks/quality.py --epochs 5 --lr 5e-5        with fixed settings for fine-tuning, which takes less time
    python benchmarks/quality.py --minutes 20 --preset auto --vocab-size 10000     other flags go to v4

Prints what the commands print, and at the end what decides: the loss at 8 tokens against that at 256, the blanks of
short held-out sentences, and the accuracy with all labels beside the same model from random weights and tf-idf. The
JSON is written after each part, so a command that is stopped keeps the parts before.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from checkout import ROOT, new_parser
from common import machine

from microbert.errors import Failed, InputError
from microbert.finetune import FROM_RANDOM, check_output, finetune
from microbert.runtime.commands import plain_device_errors
from microbert.runtime.device import choose_device, describe_device
from microbert.runtime.distributed import World
from microbert.runtime.files import read_json, write_json
from microbert.runtime.run_folder import LOSS_TABLE
from microbert.train.finetuning import Settings

SHORT, LONG = 8, 256  # tokens; the losses at these lengths are compared


class Report:
    """What was found, in a JSON file, with the seconds of each part."""

    def __init__(self, path: Path, device: str) -> None:
        """Write the file without any part. path: of the file, whose folder is created."""
        self._path, self.found = path, {"machine": machine(), "device": device, "seconds": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.found)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the time of a part, and write the file after it."""
        start = time.perf_counter()
        yield
        self.found["seconds"][name] = round(time.perf_counter() - start, 1)
        write_json(self._path, self.found)


def run(*command: str) -> None:
    """Run a Python command of the repository in the current folder. Raises Failed if it fails."""
    print(f"\npython {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if code := subprocess.run([sys.executable, *command], env=environment).returncode:
        raise Failed(f"python {command[0]} ended with exit code {code}")


def measure(arguments: argparse.Namespace, flags: list[str]) -> dict[str, object]:
    """Pretrain, evaluate and fine-tune. Return what the file of --json holds. flags: of v4.

    Raises InputError, before anything is computed, and Failed.
    """
    folder, overwrite = arguments.output_dir, ["--overwrite"] if arguments.overwrite else []
    settings = Settings(
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        max_samples=arguments.max_labelled,
        device=arguments.device,
        output_dir=f"{folder}-finetuned",
        overwrite=arguments.overwrite,
    )
    check_output(Path(f"{folder}-finetuned"), arguments.overwrite)
    if folder.exists() and any(folder.iterdir()) and not arguments.overwrite:
        raise InputError(
            f"output_dir = {str(folder)!r} exists: --overwrite replaces it, another --output-dir keeps both"
        )
    device = describe_device(choose_device(arguments.device, World.alone()), World.alone())
    report = Report(arguments.json, device)
    shared = ["--device", arguments.device, "--cache-dir", arguments.cache_dir]
    with report.part("pretraining"):
        limit = ["--preset", arguments.preset, "--max-minutes", str(arguments.minutes)]
        run(str(ROOT / "mlm_pretrain_v4.py"), *limit, "--output-dir", str(folder), *overwrite, *shared, *flags)
    with report.part("evaluation"):
        run("-m", "microbert.evaluate", str(folder), *shared)
        table = read_json(folder / LOSS_TABLE)
        losses = {one["length"]: one["loss"] for one in table["lengths"]}
        report.found["loss"] = {length: round(loss, 4) for length, loss in losses.items()}
        report.found["blanks"] = table["blanks"]
        if SHORT in losses and LONG in losses:
            report.found["short_minus_long"] = round(losses[SHORT] - losses[LONG], 4)
    with report.part("fine-tuning"):
        print(flush=True)
        accuracies = finetune(folder, settings)
        pretrained = next(iter(accuracies.values()))
        report.found["accuracy"] = {name: round(share, 4) for name, share in accuracies.items()}
        report.found["points_of_pretraining"] = round(100 * (pretrained - accuracies[FROM_RANDOM]), 2)
    return report.found


@plain_device_errors("use a smaller preset")
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=4, help="of pretraining [default: 4]")
    parser.add_argument("--preset", default="large", help="of v4 [default: large]")
    parser.add_argument("--epochs", type=int, help="of fine-tuning [default: chosen]")
    parser.add_argument(
        "--learning-rate", "--lr", type=float, help="of fine-tuning, for a 768-wide BERT [default: chosen]"
    )
    parser.add_argument("--max-labelled", type=int, help="reviews for fine-tuning and its test [default: all]")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/quality"), help="of the new run [default: runs/quality]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    parser.add_argument("--cache-dir", default="cache", help="folder of the prepared tokens [default: cache]")
    parser.add_argument(
        "--device", default="auto", help="of all parts: cpu, cuda, mps; auto [default] uses the best one"
    )
    parser.add_argument("--json", type=Path, default=Path("quality.json"), help="[default: quality.json]")
    arguments, flags = parser.parse_known_args()
    print(f"\n{json.dumps(measure(arguments, flags), indent=2)}")


if __name__ == "__main__":
    main()
