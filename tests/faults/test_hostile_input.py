"""Broken or malicious input: a plain error with exit code 2, or a skip with a warning; and nothing in it ever runs."""

import gzip
import json
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, TIME_LIMIT, interrupted_copy, listing, result, run, run_module, small_flags

from microbert.runtime.files import sha256, write_json
from microbert.train.checkpoint import verify

FINE = b'{"text": "a good film"}\n{"text": "a bad film"}\n{"text": "the end"}\n'

# row 27: file, content, flags, exit code, expected message
TEXTS = {
    "invalid UTF-8": ("corpus.txt", b"fine\nbroken \xff\xfe line\n", [], 2, "line 2 is not UTF-8"),
    "NUL": ("corpus.jsonl", FINE + b'{"text": "a\\u0000b film"}\n', [], 0, "documents: 4 read"),
    "byte order mark": ("corpus.jsonl", b"\xef\xbb\xbf" + FINE, [], 0, "documents: 3 read"),
    "CRLF": ("corpus.txt", b"a good film\r\na bad film\r\nthe end\r\n", [], 0, "documents: 3 read"),
    "a line of 5 MB": (
        "corpus.txt",
        b"a good film\n" + b"bad film " * 600_000 + b"\nthe end\n",
        [],
        0,
        "documents: 3 read",
    ),
    "empty": ("corpus.jsonl", b"", [], 2, "is empty"),
    "white space only": ("corpus.txt", b"  \n\t\n \n", [], 2, "no text found"),
    "column of nulls": (
        "corpus.jsonl",
        b'{"text": null}\n{"text": null}\n',
        ["--text-column", "text"],
        2,
        "no text found",
    ),
    "some nulls": ("corpus.jsonl", FINE + b'{"text": null}\n', [], 0, "skipped: 1 empty"),
    "wrong column": ("corpus.csv", b"title,body\nx,y z\n", ["--text-column", "nope"], 2, "title, body"),
    "broken JSON": ("corpus.jsonl", FINE + b'{"text": oops}\n', [], 2, "line 4 is not valid JSON"),
    "JSON nested deeply": (
        "corpus.jsonl",
        FINE + b'{"text": "a", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        [],
        2,
        "line 4",
    ),
    "a number with more digits than Python converts": (
        "corpus.jsonl",
        FINE + b'{"text": "a", "more": ' + b"9" * 10_000 + b"}\n",
        [],
        2,
        "line 4",
    ),
    "everything filtered out": ("corpus.txt", b"[UNK]\n[UNK] [UNK]\n", [], 2, "a token that the tokenizer knows"),
    "half a compressed file": ("corpus.jsonl.gz", gzip.compress(FINE * 99)[:-9], [], 2, "cannot be read"),
}


@pytest.mark.fault(row=27)
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.slow
def test_text_is_read_or_is_a_plain_error(name, tmp_path):
    file, content, flags, code, message = TEXTS[name]
    (tmp_path / file).write_bytes(content)
    done = run([*small_flags(tmp_path, dataset=tmp_path / file, prepare_only=True), *flags])
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr and "Traceback" not in done.stderr
    if code:
        assert (
            done.stderr.splitlines()[-1].startswith("error: ")
            and done.stderr.count("error: ") == 1
            and file in done.stderr
        )
        assert [path.name for path in tmp_path.iterdir()] == [file]


# row 28
CONSTANTS = {
    "learning rate NaN": (["--lr", "nan"], "learning_rate"),
    "learning rate 0": (["--lr", "0"], "learning_rate"),
    "learning rate below 0": (["--lr=-1e-3"], "learning_rate"),
    "width that the heads do not divide": (["--n-embed", "5"], "n_embed = 5"),
    "vocabulary smaller than the special tokens": (["--vocab-size", "4"], "vocab_size = 4"),
    "two tokens a sequence": (["--max-seq-len", "2"], "max_seq_len = 2"),
    "nothing masked": (["--mlm-probability", "0"], "mlm_probability"),
    "more than all masked": (["--mlm-probability", "1.5"], "mlm_probability"),
    "unknown flag": (["--n-layer", "2"], "did you mean --n-layers?"),
    "a number that is none": (["--epochs", "1e999"], "epochs"),
}


@pytest.mark.fault(row=28)
@pytest.mark.parametrize("version", [1, 4])
@pytest.mark.parametrize("name", CONSTANTS)
def test_an_invalid_constant_is_an_error_within_a_second_and_nothing_is_created(name, version, tmp_path):
    flags, message = CONSTANTS[name]
    if version == 4 and name == "width that the heads do not divide":
        flags = [*flags, "--n-heads", "2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / f"mlm_pretrain_v{version}.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_seconds < 1  # not elapsed time, which is longer on a busy machine
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interrupted(finished_run, tmp_path):
    """The finished run as if killed before its end, with two checkpoints: its folder, and its newest checkpoint."""
    run_folder = interrupted_copy(finished_run, tmp_path) / "run"
    newest = max(run_folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    return run_folder, newest


def resume(run_folder, *flags):
    return run([*small_flags(run_folder.parent), *flags])


def seal(checkpoint):
    """Write a manifest that matches the files, as an attacker would."""
    names = json.loads((checkpoint / "manifest.json").read_text())
    write_json(
        checkpoint / "manifest.json",
        {name: {"size": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)} for name in names},
    )


@pytest.mark.fault(row=29)
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n-embed", "8", "--dropout", "0.5"], ["n_embed = 8 (was 4)", "dropout = 0.5 (was 0.0)"]),
        (["--vocab-size", "200"], ["vocab_size = 200 (was 300)"]),
        (["--no-lowercase"], ["lowercase = False (was True)"]),
        (["--max-samples", "200"], ["max_samples = 200 (was None)"]),
    ],
)
def test_a_checkpoint_of_other_constants_is_an_error_that_names_them(flags, message, interrupted):
    before = listing(interrupted[0])
    done = resume(interrupted[0], *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(text in done.stderr for text in message)
    after = listing(interrupted[0])
    before.pop("status.json"), after.pop("status.json")
    assert after == before


@pytest.mark.fault(row=29)
def test_a_checkpoint_of_another_dataset_is_an_error_that_names_it(interrupted):
    run_folder, _ = interrupted
    corpus = run_folder.parent / "corpus.jsonl"
    corpus.rename(run_folder.parent / "other.jsonl")
    corpus.write_bytes(FINE)
    before = listing(run_folder)
    done = resume(run_folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    after = listing(run_folder)
    before.pop("status.json"), after.pop("status.json")
    assert after == before
    assert "was trained on other tokens, of dataset = " in done.stderr and "corpus.jsonl" in done.stderr


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.fault(row=30)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.slow
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(name, is_sealed, interrupted, tmp_path, reference):
    """A resumed run does not read the checkpoint's tokenizer and configuration, which are for transformers."""
    run_folder, newest = interrupted
    (newest / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    if is_sealed:
        seal(newest)
    done = resume(run_folder)
    assert not (tmp_path / "canary").exists() and "Traceback" not in done.stderr
    if is_sealed and name.endswith(".safetensors"):
        assert done.returncode == 2 and f"{newest} does not fit this run" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert (f"{newest} is damaged" in done.stderr) == (not is_sealed or name == "state.json")


@pytest.mark.fault(row=30)
@pytest.mark.parametrize("header", [2**63 - 1, 2**40, 200_000_000], ids=["2^63", "2^40", "200 MB"])
@pytest.mark.slow
def test_a_safetensors_header_that_claims_to_be_huge_is_refused(header, interrupted):
    run_folder, newest = interrupted
    (newest / "model.safetensors").write_bytes(header.to_bytes(8, "little") + b"{}" * 100)
    seal(newest)
    done = resume(run_folder)
    assert done.returncode == 2 and "does not fit this run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.fault(row=30)
@pytest.mark.parametrize(
    "pattern", ["*/tokenizer*.json", "*/tokens-*/token_counts.npy", "*/tokens-*/train.bin", "*/tokens-*/manifest.json"]
)
@pytest.mark.slow
def test_a_pickle_in_the_cache_is_refused_and_not_run(pattern, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "copy")
    [file] = (tmp_path / "copy" / "cache").glob(pattern)
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    done = run(small_flags(tmp_path / "copy", output_dir=tmp_path / "new"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(file.parent) in done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "new").exists()


@pytest.mark.fault(row=30)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.slow
def test_a_pickle_in_a_shared_folder_is_refused_and_not_run(name, finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    for command in (
        ["fill_mask", "{run}", "a [MASK]"],
        ["plot", "{run}", "--output-dir", "{out}"],
        ["finetune", "{run}", "--max-samples", "50", "--output-dir", "{out}"],
    ):
        command = [part.format(run=tmp_path / "run", out=tmp_path / "out") for part in command]
        done = run_module(*command)
        assert done.returncode == 2 and "\nerror: " in "\n" + done.stderr and "Traceback" not in done.stderr, (
            command,
            done.stderr,
        )
        assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()


@pytest.mark.fault(row=30)
@pytest.mark.parametrize("module", ["plot", "finetune"])
@pytest.mark.slow
def test_pickled_weights_are_ignored(module, finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    flags = ["--output-dir", str(tmp_path / "out"), *(["--max-samples", "50"] if module == "finetune" else [])]
    done = run_module(module, str(tmp_path / "run"), *flags)
    assert done.returncode == 2 and "cannot be loaded" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def victim(tmp_path):
    """Another user's folder, which must not change."""
    folder = tmp_path / "victim"
    (folder / "sub").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / "sub" / "more.txt").write_text("more")
    before = listing(folder)
    yield folder
    assert listing(folder) == before


@pytest.mark.fault(row=31)
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.slow
def test_a_link_in_a_checkpoint_is_refused(name, interrupted, victim, reference):
    run_folder, newest = interrupted
    target = victim / "precious.txt"
    inside = (newest / name).read_bytes()
    target.write_bytes(inside)  # the right content in the wrong place
    (newest / name).unlink()
    (newest / name).symlink_to(target)
    done = resume(run_folder)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged ({name} is missing or a link)" in done.stderr
    assert result(run_folder) == reference
    assert target.read_bytes() == inside
    target.write_text("precious")


@pytest.mark.fault(row=31)
@pytest.mark.parametrize("name", ["../../victim/precious.txt", "/etc/passwd", "extra.txt"])
@pytest.mark.slow
def test_a_manifest_that_names_other_files_is_refused(name, interrupted, victim, reference):
    run_folder, newest = interrupted
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {name: {"size": 8, "sha256": "0" * 64}}))
    done = resume(run_folder)
    assert done.returncode == 0, done.stderr
    assert "the manifest does not list the files of a checkpoint" in done.stderr
    assert result(run_folder) == reference


@pytest.mark.fault(row=31)
@pytest.mark.slow
def test_links_in_place_of_output_files_are_replaced_and_not_followed(interrupted, victim, reference):
    run_folder, newest = interrupted
    shutil.rmtree(newest)
    for name in (newest.name, "checkpoint-9999", ".checkpoint.tmp"):
        (run_folder / name).symlink_to(victim)
    for name in ("metrics.jsonl", "model.safetensors", "README.md", "status.json", "training_curve.png"):
        (run_folder / name).unlink(missing_ok=True)
    for name in ("model.safetensors", "status.json", "training_curve.png"):
        (run_folder / name).symlink_to(victim / "precious.txt")
    done = resume(run_folder)
    assert done.returncode == 0, done.stderr
    assert not newest.is_symlink()
    verify(newest)
    (run_folder / "checkpoint-9999").unlink()
    assert result(run_folder)["hashes"] == reference["hashes"]


@pytest.mark.fault(row=31)
@pytest.mark.slow
def test_overwriting_a_run_follows_no_link(interrupted, victim, reference):
    run_folder, newest = interrupted
    (newest / "link").symlink_to(victim)
    (newest / "file").symlink_to(victim / "precious.txt")
    (run_folder / "checkpoint-9999").symlink_to(victim)
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / "metrics.jsonl").symlink_to(victim / "precious.txt")
    done = resume(run_folder, "--overwrite")
    assert done.returncode == 0, done.stderr
    (run_folder / "checkpoint-9999").unlink()
    assert result(run_folder) == reference


@pytest.mark.fault(row=31)
def test_a_link_in_place_of_the_lock_is_not_followed(interrupted, victim):
    run_folder, _ = interrupted
    (run_folder / ".lock").unlink(missing_ok=True)
    (run_folder / ".lock").symlink_to(victim / "precious.txt")
    done = resume(run_folder)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.fault(row=31)
@pytest.mark.parametrize("pattern", ["files-*", "*/tokens-*"])
def test_a_link_in_place_of_a_cache_folder_is_refused(pattern, finished_run, victim, tmp_path):
    """This includes a link to a folder with temporary files that a run would delete from its cache."""
    shutil.copytree(finished_run, tmp_path / "copy")
    [folder] = (tmp_path / "copy" / "cache").glob(pattern)
    shutil.rmtree(folder)
    folder.symlink_to(victim)
    for name in (".mine.tmp", "block-of-mine"):
        (victim / name).write_text("mine")
    before = listing(victim)
    done = run(small_flags(tmp_path / "copy", output_dir=tmp_path / "new"))
    assert done.returncode == 2 and f"{folder} is a link" in done.stderr and "Traceback" not in done.stderr
    assert listing(victim) == before
    for name in (".mine.tmp", "block-of-mine"):
        (victim / name).unlink()
