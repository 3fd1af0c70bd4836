"""benchmarks/quality.py: one command pretrains, evaluates, fine-tunes and writes what it found."""

import json

import pytest
from helpers import ROOT, run_python

OF_V4 = "--preset auto --max-samples 300 --vocab-size 300 --n-layers 1 --n-embed 16 --batch-size 8 --device cpu"


@pytest.mark.slow
def test_it_writes_what_each_part_found(tmp_path):
    fine_tuning = ["--epochs", "1", "--lr", "5e-5", "--max-labelled", "200"]
    done = run_python([str(ROOT / "benchmarks" / "quality.py"), *fine_tuning, *OF_V4.split()], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "quality.json").read_text())
    assert set(found["seconds"]) == {"pretraining", "evaluation", "fine-tuning"}
    assert found["short_minus_long"] == pytest.approx(found["loss"]["8"] - found["loss"]["256"], abs=2e-4)
    assert found["blanks"] and all(0 <= share <= 1 for share in found["accuracy"].values())
    assert len(found["accuracy"]) >= 3 and abs(found["points_of_pretraining"]) <= 100
    assert done.stdout.rstrip().endswith(json.dumps(found, indent=2))
