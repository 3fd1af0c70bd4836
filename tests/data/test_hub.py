"""Datasets of the Hub through the real client and a stand-in server: streamed, downloaded, offline, and when the Hub misbehaves."""

import concurrent.futures
import errno
import gzip
import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest
from configs import configure
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from datasets.packaged_modules.text.text import TextConfig
from helpers import ROOT, TIME_LIMIT, WORDS, run, small_flags, start, wait_until
from hub_server import HubServer

from microbert.data.hub import LARGE_CHOICE, PROBE_SECONDS, SMALL_CHOICE, choose_dataset
from microbert.data.hub_reader import HubReader, is_network_trouble, stoppable
from microbert.errors import InputError, Stopped
from microbert.runtime.files import fingerprint

NO_TIME_OUTS = {
    "HF_HUB_ETAG_TIMEOUT": "100000",
    "HF_HUB_DOWNLOAD_TIMEOUT": "100000",
}  # of the libraries: what waits for them hangs
rng = random.Random(5)
TEXTS = [f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for number in range(600)]
README = """---
dataset_info:
- config_name: main
  features:
  - name: text
    dtype: string
  - name: id
    dtype: int64
  splits:
  - name: train
    num_bytes: 100000
    num_examples: 600
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: other
  data_files:
  - split: train
    path: other/*
---
"""


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts, row_group_size=50, **columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"id": list(range(len(texts))), "text": texts, **columns}), buffer, row_group_size=row_group_size
    )
    return buffer.getvalue()


FILES = {f"data/train-{n}.parquet": parquet(TEXTS[200 * n : 200 * (n + 1)]) for n in range(3)}


@pytest.fixture
def hub():
    with HubServer() as server:
        server.add("org/plain", FILES)
        yield server


def flags(folder, *more, **constants):
    """A run that stops when the tokens are prepared, unless asked for more."""
    folder.mkdir(exist_ok=True)
    constants = {"dataset": "org/plain", "epochs": 1, "streaming": True, "prepare_only": True, **constants}
    return [*small_flags(folder, **constants), *more]


def launch(hub, tmp_path, name="run", *more, home="home", environment=None, **constants):
    return run(
        flags(tmp_path / name, *more, **constants),
        cwd=tmp_path / name,
        env=hub.env(tmp_path / home) | (environment or {}),
    )


def launch_all(hub, tmp_path, runs):
    """Several at once, each in a folder and with a home of its own: {name: constants} -> {name: what became of it}."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(launch, hub, tmp_path, name, home=f"home of {name}", **constants)
            for name, constants in runs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def is_plain(done, *words):
    """Bad input, told in a line or two with these words in it."""
    return (
        done.returncode == 2
        and all(word in done.stderr for word in words)
        and "Traceback" not in done.stderr
        and done.stderr.count("\n") <= 3
    )


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".bin", ".npy")}


def report(done):
    return [line for line in done.stdout.splitlines() if line.startswith("documents: ")]


@pytest.fixture(scope="module")
def local_shards(tmp_path_factory):
    """What the same documents give as a local file: the tokens must not depend on the way by which the text came."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "texts.jsonl").write_bytes(lines(TEXTS))
    assert run(flags(folder, dataset=folder / "texts.jsonl"), cwd=folder).returncode == 0
    return shards(folder)


@pytest.mark.slow
def test_v2_trains_on_a_streamed_dataset_which_is_transferred_once_and_the_network_is_not_needed_again(
    hub, tmp_path, local_shards
):
    def launch_v2(name, prepare_only):
        constants = {
            "n_heads": 1,
            "n_embed": 4,
            "batch_size": 64,
            "epochs": 2,
            "eval_every": 1000,
            "save_every": 1000,
            "packing": False,
        }
        command = flags(tmp_path / "run", prepare_only=prepare_only, output_dir=tmp_path / "run" / name, **constants)
        return run(command, ROOT / "mlm_pretrain_v2.py", cwd=tmp_path / "run", env=hub.env(tmp_path / "home"))

    done = launch_v2("first", prepare_only=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "first" / "metrics.jsonl").read_text().splitlines()[-1])["eval/loss"] > 0
    assert shards(tmp_path / "run" / "cache") == local_shards
    for name, content in FILES.items():
        assert hub.bytes_of("org/plain", name) <= len(content)
    assert not list((tmp_path / "run" / "cache").rglob("block-*"))
    n_requests = len(hub.log)
    again = launch_v2("again", prepare_only=True)
    assert again.returncode == 0, again.stderr
    assert len(hub.log) == n_requests
    assert "as recorded" in again.stdout


def test_a_large_parquet_file_is_read_by_its_text_column_alone(hub, tmp_path, local_shards):
    other = [random.Random(n).randbytes(20_000) for n in range(600)]
    content = parquet(TEXTS, row_group_size=200, image=other)
    hub.add("org/large", {"data/train-0.parquet": content})
    done = launch(hub, tmp_path, dataset="org/large")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "run" / "cache") == local_shards
    assert len(content) > 12_000_000 and hub.bytes_of("org/large", "data/train-0.parquet") < 300_000


@pytest.mark.slow
def test_a_download_gives_the_same_tokens_and_is_found_again_offline(hub, tmp_path, local_shards):
    first = launch(hub, tmp_path, "first", streaming=False)
    assert first.returncode == 0 and "downloading all of org/plain" in first.stdout
    assert shards(tmp_path / "first" / "cache") == local_shards
    n_requests = len(hub.log)
    offline = launch(hub, tmp_path, "offline", streaming=False, environment={"HF_DATASETS_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert shards(tmp_path / "offline" / "cache") == local_shards
    smaller = launch(hub, tmp_path, "first", streaming=False, max_samples=20, environment={"HF_HUB_OFFLINE": "1"})
    assert smaller.returncode == 0 and "as recorded" in smaller.stdout and "20 read" in smaller.stdout
    assert "--streaming would" in smaller.stdout and "--streaming would" not in first.stdout
    assert len(hub.log) == n_requests


def test_compressed_lines_and_a_named_configuration(hub, tmp_path, local_shards):
    files = {f"main/train-@{n}.jsonl.gz": gzip.compress(lines(TEXTS[300 * n : 300 * (n + 1)])) for n in range(2)}
    hub.add(
        "org/named",
        {
            "README.md": README.replace("  - name: id\n    dtype: int64\n", "").encode(),
            **files,
            "main/test-0.jsonl.gz": gzip.compress(lines(["of the test split"])),
            "other/x.jsonl.gz": gzip.compress(lines(["another"])),
        },
    )
    for streaming in (True, False):
        done = launch(hub, tmp_path, str(streaming), dataset="org/named:main", streaming=streaming)
        assert done.returncode == 0, done.stderr
        assert shards(tmp_path / str(streaming) / "cache") == local_shards
        assert not list((tmp_path / str(streaming) / "cache").rglob("*.gz"))
        if streaming:
            for name, content in files.items():
                assert hub.bytes_of("org/named", name) == len(content)


@pytest.mark.slow
def test_a_new_commit_is_another_corpus_and_a_recorded_one_stays(hub, tmp_path):
    launch(hub, tmp_path)
    hub.add("org/plain", {"data/train-0.parquet": parquet(TEXTS[:100])})
    assert "600 read" in launch(hub, tmp_path).stdout
    for record in (tmp_path / "run" / "cache").glob("hub-*.json"):
        record.unlink()
    assert "100 read" in launch(hub, tmp_path).stdout


@pytest.mark.slow
def test_passing_trouble_is_waited_out(hub, tmp_path, local_shards):
    hub.add("org/five", {f"data/train-{n}.parquet": parquet(TEXTS[120 * n : 120 * (n + 1)]) for n in range(5)})
    hub.add("org/lines", {"data/train-0.jsonl": lines(TEXTS)})
    hub.fail("GET /api/datasets/org/five/revision/main", "500")
    for number, kind in enumerate(("cut", "short", "timeout", "500", "429")):
        hub.fail(f"GET .*five.*train-{number}.parquet", kind, after_bytes=1000)
    hub.fail(
        "GET .*lines.*train-0.jsonl", "cut", times=2, after_bytes=5000
    )  # a reset that hf_hub_download raises at once
    done = launch_all(
        hub,
        tmp_path,
        {
            name: {"dataset": f"org/{name}", "environment": {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}}
            for name in ("five", "lines")
        },
    )
    for name, one in done.items():
        assert one.returncode == 0, (name, one.stderr)
        assert shards(tmp_path / name / "cache") == local_shards
    assert "trying again" in done["lines"].stderr
    assert not any(failure.times for failure in hub.failures)


@pytest.mark.slow
def test_a_stream_that_is_killed_goes_on_behind_what_is_prepared_or_starts_anew_as_a_download(hub, tmp_path):
    """Files that are done are not asked for again. The last file hangs, so that the kill falls there."""
    long_texts = [text * 135 for text in TEXTS]
    files = {f"data/train-{n}.parquet": parquet(long_texts[200 * n : 200 * (n + 1)]) for n in range(3)}
    hub.add("org/long", files)
    whole = launch(hub, tmp_path, "whole", dataset="org/long")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "killed").mkdir()
    hub.fail("GET .*train-2.parquet", "timeout", times=100)
    shutil.copytree(
        tmp_path / "whole" / "cache", tmp_path / "killed" / "cache"
    )  # the tokenizer: it was made from files that are not to hang
    for tokens in (tmp_path / "killed" / "cache").rglob("tokens-*"):
        shutil.rmtree(tokens)
    process = start(
        flags(tmp_path / "killed", dataset="org/long"), cwd=tmp_path / "killed", env=hub.env(tmp_path / "home")
    )
    wait_until(
        lambda: (
            list((tmp_path / "killed" / "cache").rglob("block-00000.json"))
            and hub.log[-1].path.endswith("train-2.parquet")
        ),
        process,
    )
    process.kill()
    process.communicate()
    hub.answer_again()
    as_download = launch(hub, tmp_path, "killed", dataset="org/long", streaming=False)
    assert "600 read" in as_download.stdout and "resuming after" not in as_download.stdout
    assert report(as_download) == report(whole)
    shutil.rmtree(
        next(path.parent for path in (tmp_path / "killed" / "cache").glob("*/tokens-*") if list(path.glob("*.npy")))
    )
    bytes_before = hub.bytes_of("org/long", "data/train-0.parquet")
    assert "resuming after" in launch(hub, tmp_path, "killed", dataset="org/long").stdout
    assert hub.bytes_of("org/long", "data/train-0.parquet") == bytes_before
    assert shards(tmp_path / "killed" / "cache") == shards(tmp_path / "whole" / "cache")


def test_the_column_that_a_stream_has_chosen_is_kept(tmp_path):
    first, second = (HubReader("org/name", None, "0" * 40, None, tmp_path / "corpus", lambda: None) for _ in range(2))
    assert first.chosen_column() is None
    first._remember_column("body")
    assert second.chosen_column() == "body"
    assert HubReader("org/name", None, "0" * 40, None, tmp_path / "other", lambda: None).chosen_column() is None


@pytest.mark.parametrize("kind", ["downloaded", "jsonl", "parquet"])
@pytest.mark.slow
def test_a_signal_ends_a_transfer_that_hangs(kind, hub, tmp_path):
    n_files = 20 if kind == "downloaded" else 1  # so many go through a pool of threads
    name = "jsonl" if kind == "jsonl" else "parquet"
    per_file = len(TEXTS) // n_files
    parts = [TEXTS[n * per_file : (n + 1) * per_file] for n in range(n_files)]
    hub.add(
        "org/slow",
        {
            f"data/train-{n:02d}.{name}": lines(part) if kind == "jsonl" else parquet(part)
            for n, part in enumerate(parts)
        },
    )
    hub.fail("GET .*/resolve/.*train-", "timeout", times=100)
    command = flags(tmp_path / "run", dataset="org/slow", streaming=kind != "downloaded")
    options = {"cwd": tmp_path / "run", "env": hub.env(tmp_path / "home") | NO_TIME_OUTS}
    process = start(command, **options)
    wait_until(lambda: any(request.method == "GET" and "train-" in request.path for request in hub.log), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 75 and "Traceback" not in errors, errors
    if kind == "downloaded":
        hub.answer_again()
        again = run(command, **options)
        assert again.returncode == 0 and "600 read" in again.stdout, again.stderr


@pytest.mark.slow
def test_without_a_network_the_error_comes_after_one_wait_of_seconds_and_says_what_to_do(hub, tmp_path):
    """Within ten seconds on an idle machine: five of them wait, and about as many load the libraries."""
    record = {
        "dataset": "org/plain",
        "configuration": None,
        "revision": "0" * 40,
        "documents": 600,
        "megabytes": 0.1,
        "is_exact": True,
    }
    for name in ("recorded", "recorded, offline"):
        path = tmp_path / name / "cache" / f"hub-{fingerprint('org/plain', None)}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    hub.fail(".*", "timeout", times=100)
    runs = {
        "never answers": {},
        "refuses": {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "does not resolve": {"HF_ENDPOINT": "http://hub.invalid"},
        "recorded": {},
        "recorded, offline": {"HF_HUB_OFFLINE": "1"},
        "offline": {"HF_DATASETS_OFFLINE": "1"},
    }
    assert PROBE_SECONDS == 5
    for name, done in launch_all(
        hub, tmp_path, {name: {"environment": environment | NO_TIME_OUTS} for name, environment in runs.items()}
    ).items():
        words = (
            "org/plain",
            "hf download --repo-type dataset org/plain",
            '"plain/**/*train*"',
            "--prepare-only",
            "--dataset imdb",
        )
        assert is_plain(done, *words), (name, done.stderr)
        assert not (tmp_path / name / "run").exists()
        if "recorded" in name:
            assert "as recorded" in done.stdout
        else:
            assert not (tmp_path / name / "cache").exists()
    assert sum(request.method == "GET" for request in hub.log) == 2  # of the two that are not set to be offline
    done = launch(hub, tmp_path, "offline", environment={"HF_DATASETS_OFFLINE": "1", "PYTHONPROFILEIMPORTTIME": "1"})
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert (
        "datasets" in loaded and not {"transformers", "matplotlib", "torch._dynamo"} & loaded
    )  # they would take seconds more


def test_a_bad_card_costs_only_what_it_would_have_said(hub, tmp_path):
    files = {"main/train-0.parquet": parquet(TEXTS[:99]), "main/test-0.parquet": parquet(TEXTS[:9])}
    hub.add("org/many", {"README.md": README.replace("600", "many").encode(), **files})
    hub.add("org/type", {"README.md": README.replace("int64", "unheard_of").encode(), **files})
    done = launch_all(hub, tmp_path, {"many": {"dataset": "org/many:main"}, "type": {"dataset": "org/type:main"}})
    assert done["many"].returncode == 0 and "99 read" in done["many"].stdout, done["many"].stderr
    assert is_plain(done["type"], "org/type:main", "UnheardOf"), done["type"].stderr  # by datasets
    for one in done.values():
        assert "Hub: org/" in one.stdout and "trouble" not in one.stdout + one.stderr


def test_a_card_that_says_how_to_read_its_files_is_followed_or_refused(hub, tmp_path, local_shards):
    """Streaming would read these lines as one column of text and numbers."""
    table = "id;text\n" + "".join(f"{number};{text}\n" for number, text in enumerate(TEXTS))
    hub.add(
        "org/table",
        {
            "README.md": b'---\nconfigs:\n- config_name: default\n  data_files: "*.csv"\n  sep: ";"\n---\n',
            "train.csv": table.encode(),
        },
    )
    done = launch_all(
        hub,
        tmp_path,
        {"streamed": {"dataset": "org/table"}, "downloaded": {"dataset": "org/table", "streaming": False}},
    )
    assert is_plain(done["streamed"], "sep = ';'", "without --streaming"), done["streamed"].stderr
    assert done["downloaded"].returncode == 0, done["downloaded"].stderr
    assert shards(tmp_path / "downloaded" / "cache") == local_shards


def test_what_is_not_streamed():
    reader = HubReader("org/name", None, "0" * 40, None, ROOT, lambda: None)
    commit = "hf://datasets/org/name@" + "0" * 40
    assert reader._path(f"{commit}/data/a@b.txt") == "data/a@b.txt"
    for file in (
        "https://example.org/train.txt",
        commit.replace("name", "other") + "/train.txt",
        f"zip://train.txt::{commit}/all.zip",
    ):
        with pytest.raises(InputError, match="without --streaming"):
            reader._path(file)
    reader._check_settings(CsvConfig(name="x", chunksize=5), ["a.csv", "b.csv.gz"])
    reader._check_settings(CsvConfig(sep="\t"), ["a.tsv", "b.tsv.zst"])
    for settings, paths in (
        (CsvConfig(sep="\t"), ["a.csv"]),
        (CsvConfig(), ["a.csv", "a.tsv"]),
        (CsvConfig(column_names=["text"]), ["a.csv"]),
        (TextConfig(sample_by="paragraph"), ["a.txt"]),
        (JsonConfig(field="data"), ["a.json"]),
    ):
        with pytest.raises(InputError, match="without --streaming"):
            reader._check_settings(settings, paths)


@pytest.mark.slow
def test_files_that_cannot_be_read_are_plain_lines(hub, tmp_path):
    content = bytearray(parquet(TEXTS))
    content[100:2000] = bytes(1900)
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    bad_text = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), bad_text)
    hub.add("org/page", {"train.parquet": bytes(content)})
    hub.add("org/bytes", {"train.parquet": bad_text.getvalue()})
    hub.add("org/frame", {"train.jsonl.zst": b"\0\0" + lines(TEXTS)})
    hub.add(
        "org/named",
        {"README.md": README.encode(), "main/train-0.jsonl": b'{"other": 1}\n', "main/test-0.jsonl": b'{"other": 1}\n'},
    )
    done = launch_all(
        hub,
        tmp_path,
        {
            "page": {"dataset": "org/page"},
            "bytes": {"dataset": "org/bytes"},
            "frame": {"dataset": "org/frame"},
            "downloaded": {"dataset": "org/bytes", "streaming": False},
            "card": {"dataset": "org/named:main", "streaming": False},
        },
    )
    for name, words in {
        "page": "org/page/train.parquet",
        "bytes": "org/bytes/train.parquet",
        "frame": "org/frame/train.jsonl.zst",
        "downloaded": "org/bytes",
        "card": "org/named:main",
    }.items():
        assert is_plain(done[name], words), (name, done[name].stderr)


def test_a_full_disk_is_told_as_such(hub, tmp_path):
    hub.add("org/big", {"train.parquet": parquet(TEXTS, noise=[random.Random(n).randbytes(2000) for n in range(600)])})
    done = run(
        flags(tmp_path / "run", dataset="org/big", streaming=False),
        cwd=tmp_path / "run",
        env=hub.env(tmp_path / "home"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 1 and "ulimit -f" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_names_that_are_not_there_and_doors_that_are_shut(hub, tmp_path):
    hub.add("org/tests", {"data/test-0.parquet": parquet(TEXTS[:9])})
    hub.add(
        "org/named",
        {
            "README.md": README.encode(),
            "main/train-0.jsonl": lines(TEXTS),
            "main/test-0.jsonl": lines(TEXTS),
            "other/x.jsonl": lines(TEXTS),
        },
    )
    hub.add("org/shut", {"data/train-0.parquet": FILES["data/train-0.parquet"]})
    hub.fail("GET /api/datasets/org/shut.*", "401", times=9)
    done = launch_all(
        hub,
        tmp_path,
        {
            "missing": {"dataset": "org/missing"},
            "gated": {"dataset": "org/shut"},
            "column": {"text_column": "body"},
            "split": {"dataset": "org/tests"},
            "downloaded split": {"dataset": "org/tests", "streaming": False},
            "without": {"dataset": "org/named"},
            "wrong": {"dataset": "org/named:nope"},
            "endpoint": {"environment": {"HF_ENDPOINT": "127.0.0.1"}},
            "token": {"environment": {"HF_TOKEN": "hf_gehe\u00efm"}},
        },
    )
    for name, words in {
        "missing": ["no dataset of that name"],
        "gated": ["HF_TOKEN"],
        "column": ["id, text"],
        "split": ["test"],
        "downloaded split": ["test"],
        "without": ["org/named:main"],
        "wrong": ["other"],
        "endpoint": ["HF_ENDPOINT"],
        "token": ["HF_TOKEN"],
    }.items():
        assert is_plain(done[name], *words), (name, done[name].stderr)
        assert not (tmp_path / name / "cache").exists(), name


def test_files_that_are_shut_while_the_rest_is_open(hub, tmp_path):
    hub.add("org/lines", {"data/train-0.jsonl": lines(TEXTS)})
    hub.fail("/resolve/.*train", "401", times=1000)
    runs = {"streamed": {}, "copied": {"dataset": "org/lines"}, "downloaded": {"streaming": False}}
    for name, done in launch_all(hub, tmp_path, runs).items():
        assert is_plain(done, "HF_TOKEN"), (name, done.stderr)
    hub.answer_again()
    hub.fail("/resolve/", "401", times=1000)
    assert is_plain(launch(hub, tmp_path), "HF_TOKEN")


def test_the_token_of_the_environment_is_sent(hub, tmp_path):
    assert launch(hub, tmp_path, environment={"HF_TOKEN": "hf_secret"}).returncode == 0
    assert all(
        request.headers.get("authorization") == "Bearer hf_secret"
        for request in hub.log
        if request.path.startswith("/api/datasets/org")
    )


def test_a_dry_run_asks_once_and_writes_nothing(hub, tmp_path):
    hub.add("org/named", {"README.md": README.encode(), "main/train-0.parquet": FILES["data/train-0.parquet"]})
    done = launch(hub, tmp_path, "run", "--dry-run", dataset="org/named:main")
    assert done.returncode == 0, done.stderr
    assert "600 documents" in done.stdout and json.loads(done.stdout.splitlines()[-1])["tokens_known"] is False
    assert [request.method for request in hub.log] == ["GET"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_only_what_may_pass_is_trouble():
    def raised(error, context):
        try:
            try:
                raise context
            except Exception:
                raise error
        except Exception as caught:
            return caught

    assert is_network_trouble(ConnectionResetError()) and is_network_trouble(
        raised(FileNotFoundError("no file"), TimeoutError())
    )
    assert not is_network_trouble(raised(ValueError("bad card"), FileNotFoundError(errno.ENOENT, "no record")))
    assert not is_network_trouble(raised(ValueError("bad card"), ConnectionResetError()))


def test_a_call_is_left_behind_when_the_run_stops():
    def check_stop():
        raise Stopped("now")

    let_go, ended = threading.Event(), []
    with pytest.raises(Stopped):
        stoppable(lambda: ended.append(let_go.wait(TIME_LIMIT)), check_stop)
    assert not ended
    let_go.set()
    assert stoppable(lambda: 5, lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        stoppable(lambda: 1 / 0, lambda: None)


def test_threads_that_a_call_starts_after_it_was_left_behind_keep_no_process_from_ending():
    program = """import concurrent.futures, threading
from microbert.data.hub_reader import stoppable
stopped, working = threading.Event(), threading.Event()
def work():
    working.set()
    threading.Event().wait()
def call():
    stopped.wait()
    concurrent.futures.ThreadPoolExecutor(1).submit(work).result()
def check_stop():
    raise InterruptedError
try:
    stoppable(call, check_stop)
except InterruptedError:
    stopped.set()
    working.wait()
    print("left")"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.parametrize(
    "max_samples, streaming, chosen",
    [
        ("500K", False, (SMALL_CHOICE, False)),
        ("1M", True, (SMALL_CHOICE, True)),
        (None, False, (SMALL_CHOICE, False)),
        ("1000001", False, (LARGE_CHOICE, True)),
        ("10M", False, (LARGE_CHOICE, True)),
    ],
)
def test_hf_is_the_small_choice_up_to_a_million_samples(max_samples, streaming, chosen):
    repo_id, name, streams = choose_dataset(configure(dataset="hf", max_samples=max_samples, streaming=streaming))
    assert (f"{repo_id}:{name}", streams) == chosen


LABEL_CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': bad
          '1': good
---
"""


def read_labels(hub, tmp_path, dataset, environment=None):
    """What read_labelled makes of a dataset of the Hub, in a process of its own: names and labels, or the error."""
    program = (
        "import sys, json\nfrom microbert.config.constants import InputError\nfrom microbert.data.labelled import read_labelled\n"
        "try:\n    found = read_labelled(sys.argv[1], None, None, None, 1)\n"
        "    print(json.dumps([found.names, found.labels.tolist(), str(found.source)]))\n"
        "except InputError as error:\n    print(json.dumps(str(error)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, dataset],
        cwd=ROOT,
        env=hub.env(tmp_path / "home") | (environment or {}),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_labels_of_the_hub_are_those_of_its_files(hub, tmp_path):
    hub.add(
        "org/written",
        {
            "train.csv": b"text,label\n"
            + b"".join(b"text %d,%s\n" % (n, label) for n, label in enumerate((b"01", b"1", b"NA", b"10")))
        },
    )
    hub.add(
        "org/classes",
        {
            "README.md": LABEL_CARD.encode(),
            "data/train.jsonl": b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n{"text": "c", "label": -1}\n',
        },
    )
    hub.add(
        "org/parquet",
        {"README.md": LABEL_CARD.encode(), "data/train.parquet": parquet(["a", "b", "c"], label=[1, 0, 1])},
    )
    names, labels, source = read_labels(hub, tmp_path, "org/written")
    assert (names, labels) == (["01", "1", "10", "NA"], [0, 1, 3, 2]) and "4 rows, 4 used; skipped: none" in source
    assert read_labels(hub, tmp_path, "org/classes")[:2] == [["bad", "good"], [1, 0]]
    assert read_labels(hub, tmp_path, "org/parquet")[:2] == [["bad", "good"], [1, 0, 1]]
    assert "cannot be read" in read_labels(hub, tmp_path, "org/nothing")


@pytest.mark.slow
def test_labels_that_datasets_has_in_its_cache_are_read_offline_and_others_are_a_plain_line(hub, tmp_path):
    hub.add(
        "org/classes",
        {
            "README.md": LABEL_CARD.encode(),
            "data/train.jsonl": b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n{"text": "c", "label": -1}\n',
        },
    )
    subprocess.run(
        [sys.executable, "-c", "import datasets; datasets.load_dataset('org/classes')"],
        env=hub.env(tmp_path / "home"),
        check=True,
        timeout=TIME_LIMIT,
    )
    assert read_labels(hub, tmp_path, "org/classes", {"HF_HUB_OFFLINE": "1"})[:2] == [["bad", "good"], [1, 0]]
    error = read_labels(hub, tmp_path, "org/plain", {"HF_HUB_OFFLINE": "1"})
    assert "org/plain cannot be read" in error and "hf download --repo-type dataset org/plain" in error
