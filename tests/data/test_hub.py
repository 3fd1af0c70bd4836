"""Datasets of the Hub, with the real client and a local server: streamed, downloaded, offline, and with errors."""

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
from helpers import ROOT, TIME_LIMIT, WORDS, run, run_as_user, small_flags, start, wait_until
from hub_server import HubServer

from microbert.data.hub import LARGE_CHOICE, PROBE_SECONDS, SMALL_CHOICE, choose_dataset
from microbert.data.hub_dataset import HubDataset, TextColumn
from microbert.data.hub_errors import is_network_error
from microbert.errors import InputError, Stopped
from microbert.runtime.files import fingerprint
from microbert.runtime.waiting import in_background

# the libraries wait without limit
NO_TIME_OUTS = {"HF_HUB_ETAG_TIMEOUT": "100000", "HF_HUB_DOWNLOAD_TIMEOUT": "100000"}
rng = random.Random(5)
TEXTS = [f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for number in range(600)]
README_OF_A_PATTERN = (
    b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '**/*.parquet'\n---\n"
)
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
    """Return the flags of a run that stops after preparing the tokens, by default."""
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
    """Launch runs in parallel, each with its own folder and home: {name: constants} -> {name: finished process}."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(launch, hub, tmp_path, name, home=f"home of {name}", **constants)
            for name, constants in runs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def is_plain(done, *words):
    """Return whether the run ended with exit code 2 and a short error that contains these words."""
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
    """The shards of the same documents in a local file: tokens must not depend on the source of the text."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "texts.jsonl").write_bytes(lines(TEXTS))
    assert run(flags(folder, dataset=folder / "texts.jsonl"), cwd=folder).returncode == 0
    return shards(folder)


@pytest.mark.slow
def test_v2_trains_on_a_streamed_dataset_that_is_transferred_once(hub, tmp_path, local_shards):
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


def test_only_the_text_column_of_a_large_parquet_file_is_transferred(hub, tmp_path, local_shards):
    other = [random.Random(n).randbytes(20_000) for n in range(600)]
    content = parquet(TEXTS, row_group_size=200, image=other)
    hub.add("org/large", {"data/train-0.parquet": content})
    done = launch(hub, tmp_path, dataset="org/large")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "run" / "cache") == local_shards
    assert len(content) > 12_000_000 and hub.bytes_of("org/large", "data/train-0.parquet") < 300_000


@pytest.mark.slow
def test_a_download_yields_the_same_tokens_and_is_reused_offline(hub, tmp_path, local_shards):
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
def test_a_recorded_commit_is_used_until_its_record_is_deleted(hub, tmp_path):
    launch(hub, tmp_path)
    hub.add("org/plain", {"data/train-0.parquet": parquet(TEXTS[:100])})
    assert "600 read" in launch(hub, tmp_path).stdout
    for record in (tmp_path / "run" / "cache").glob("hub-*.json"):
        record.unlink()
    assert "100 read" in launch(hub, tmp_path).stdout


@pytest.mark.slow
def test_temporary_network_errors_are_retried(hub, tmp_path, local_shards):
    hub.add("org/five", {f"data/train-{n}.parquet": parquet(TEXTS[120 * n : 120 * (n + 1)]) for n in range(5)})
    hub.add("org/lines", {"data/train-0.jsonl": lines(TEXTS)})
    hub.fail("GET /api/datasets/org/five/revision/main", "500")
    for number, kind in enumerate(("cut", "short", "timeout", "500", "429")):
        hub.fail(f"GET .*five.*train-{number}.parquet", kind, after_bytes=1000)
    hub.fail("GET .*lines.*train-0.jsonl", "cut", times=2, after_bytes=5000)  # hf_hub_download raises a reset at once
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
def test_a_killed_stream_resumes_after_the_prepared_rows_and_a_download_starts_over(hub, tmp_path):
    """Finished files are not requested again. The last file hangs, so the process is killed there."""
    long_texts = [text * 135 for text in TEXTS]
    files = {f"data/train-{n}.parquet": parquet(long_texts[200 * n : 200 * (n + 1)]) for n in range(3)}
    hub.add("org/long", files)
    whole = launch(hub, tmp_path, "whole", dataset="org/long")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "killed").mkdir()
    hub.fail("GET .*train-2.parquet", "timeout", times=100)
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "killed" / "cache")  # with the tokenizer of the whole text
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


def test_a_chosen_text_column_is_recorded(tmp_path):
    first, second = (TextColumn(None, tmp_path / "corpus", "org/name") for _ in range(2))
    assert first.known() is None
    first.choose("body")
    assert second.known() == "body"
    assert TextColumn(None, tmp_path / "other", "org/name").known() is None
    assert TextColumn("text", tmp_path / "corpus", "org/name").known() == "text"


@pytest.mark.parametrize("kind", ["downloaded", "jsonl", "parquet", "listing"])
@pytest.mark.slow
def test_a_signal_ends_a_hanging_transfer(kind, hub, tmp_path):
    n_files = 20 if kind == "downloaded" else 1  # `datasets` downloads so many with a pool of threads
    name = "jsonl" if kind == "jsonl" else "parquet"
    per_file = len(TEXTS) // n_files
    parts = [TEXTS[n * per_file : (n + 1) * per_file] for n in range(n_files)]
    hub.add(
        "org/slow",
        {
            f"data/train-{n:02d}.{name}": lines(part) if kind == "jsonl" else parquet(part)
            for n, part in enumerate(parts)
        }
        # a recursive pattern is listed by a pool of threads, which Python joins at exit
        | ({"README.md": README_OF_A_PATTERN} if kind == "listing" else {}),
    )
    hanging = "/tree/" if kind == "listing" else "train-"
    hub.fail("GET .*/tree/" if kind == "listing" else "GET .*/resolve/.*train-", "timeout", times=100)
    command = flags(tmp_path / "run", dataset="org/slow", streaming=kind != "downloaded")
    options = {"cwd": tmp_path / "run", "env": hub.env(tmp_path / "home") | NO_TIME_OUTS}
    process = start(command, **options)
    wait_until(lambda: any(request.method == "GET" and hanging in request.path for request in hub.log), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 75 and "Traceback" not in errors and "resource_tracker" not in errors, errors
    if kind == "downloaded":
        hub.answer_again()
        again = run(command, **options)
        assert again.returncode == 0 and "600 read" in again.stdout, again.stderr


@pytest.mark.slow
def test_without_a_network_the_error_comes_within_seconds_and_says_what_to_do(hub, tmp_path):
    """Within 10 seconds on an idle machine: 5 seconds of waiting, and about as many of imports."""
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
    assert (
        sum(request.method == "GET" for request in hub.log) == 2
    )  # by the two runs that are not offline and reach the server
    environment = hub.env(tmp_path / "home") | {"HF_DATASETS_OFFLINE": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    done = run_as_user(flags(tmp_path / "offline"), cwd=tmp_path / "offline", env=environment)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "datasets" in loaded
    assert not {"transformers", "matplotlib", "torch._dynamo"} & loaded  # their imports would take more seconds


@pytest.mark.slow
def test_an_invalid_card_is_ignored(hub, tmp_path):
    files = {"main/train-0.parquet": parquet(TEXTS[:99]), "main/test-0.parquet": parquet(TEXTS[:9])}
    hub.add("org/many", {"README.md": README.replace("600", "many").encode(), **files})
    hub.add("org/type", {"README.md": README.replace("int64", "unheard_of").encode(), **files})
    done = launch_all(hub, tmp_path, {"many": {"dataset": "org/many:main"}, "type": {"dataset": "org/type:main"}})
    assert done["many"].returncode == 0 and "99 read" in done["many"].stdout, done["many"].stderr
    assert is_plain(done["type"], "org/type:main", "UnheardOf"), done["type"].stderr  # by datasets
    for one in done.values():
        assert "Hub: org/" in one.stdout and "trouble" not in one.stdout + one.stderr


@pytest.mark.slow
def test_reading_settings_of_a_card_are_followed_or_refused(hub, tmp_path, local_shards):
    """Streaming would read each line as a single column."""
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


def test_files_and_settings_that_cannot_be_streamed():
    dataset = HubDataset("org/name", None, "0" * 40)
    commit = "hf://datasets/org/name@" + "0" * 40
    assert dataset.path_in_repository(f"{commit}/data/a@b.txt") == "data/a@b.txt"
    for file in (
        "https://example.org/train.txt",
        commit.replace("name", "other") + "/train.txt",
        f"zip://train.txt::{commit}/all.zip",
    ):
        with pytest.raises(InputError, match="without --streaming"):
            dataset.path_in_repository(file)
    dataset.check_settings(CsvConfig(name="x", chunksize=5), ["a.csv", "b.csv.gz"])
    dataset.check_settings(CsvConfig(sep="\t"), ["a.tsv", "b.tsv.zst"])
    for settings, paths in (
        (CsvConfig(sep="\t"), ["a.csv"]),
        (CsvConfig(), ["a.csv", "a.tsv"]),
        (CsvConfig(column_names=["text"]), ["a.csv"]),
        (TextConfig(sample_by="paragraph"), ["a.txt"]),
        (JsonConfig(field="data"), ["a.json"]),
    ):
        with pytest.raises(InputError, match="without --streaming"):
            dataset.check_settings(settings, paths)


@pytest.mark.slow
def test_unreadable_files_are_plain_errors(hub, tmp_path):
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


@pytest.mark.slow
def test_a_full_disk_is_reported(hub, tmp_path):
    hub.add("org/big", {"train.parquet": parquet(TEXTS, noise=[random.Random(n).randbytes(2000) for n in range(600)])})
    done = run_as_user(
        flags(tmp_path / "run", dataset="org/big", streaming=False),
        cwd=tmp_path / "run",
        env=hub.env(tmp_path / "home"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 1 and "ulimit -f" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_missing_names_and_restricted_datasets_are_plain_errors(hub, tmp_path):
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
        "column": ["id (numbers), text"],
        "split": ["test"],
        "downloaded split": ["test"],
        "without": ["org/named:main"],
        "wrong": ["other"],
        "endpoint": ["HF_ENDPOINT"],
        "token": ["HF_TOKEN"],
    }.items():
        assert is_plain(done[name], *words), (name, done[name].stderr)
        assert not (tmp_path / name / "cache").exists(), name


@pytest.mark.slow
def test_restricted_files_of_an_open_dataset_are_plain_errors(hub, tmp_path):
    hub.add("org/lines", {"data/train-0.jsonl": lines(TEXTS)})
    hub.fail("/resolve/.*train", "401", times=1000)
    runs = {"streamed": {}, "copied": {"dataset": "org/lines"}, "downloaded": {"streaming": False}}
    for name, done in launch_all(hub, tmp_path, runs).items():
        assert is_plain(done, "HF_TOKEN"), (name, done.stderr)
    hub.answer_again()
    hub.fail("/resolve/", "401", times=1000)
    assert is_plain(launch(hub, tmp_path), "HF_TOKEN")


@pytest.mark.slow
def test_the_token_of_the_environment_is_sent(hub, tmp_path):
    assert launch(hub, tmp_path, environment={"HF_TOKEN": "hf_secret"}).returncode == 0
    assert all(
        request.headers.get("authorization") == "Bearer hf_secret"
        for request in hub.log
        if request.path.startswith("/api/datasets/org")
    )


def test_a_dry_run_sends_one_request_and_writes_nothing(hub, tmp_path):
    hub.add("org/named", {"README.md": README.encode(), "main/train-0.parquet": FILES["data/train-0.parquet"]})
    done = launch(hub, tmp_path, "run", "--dry-run", dataset="org/named:main")
    assert done.returncode == 0, done.stderr
    assert "600 documents" in done.stdout and json.loads(done.stdout.splitlines()[-1])["tokens_known"] is False
    assert [request.method for request in hub.log] == ["GET"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_only_errors_that_may_pass_are_network_errors():
    def raised(error, context):
        error.__context__ = context
        return error

    assert is_network_error(ConnectionResetError())
    assert is_network_error(raised(FileNotFoundError("no file"), TimeoutError()))
    assert not is_network_error(raised(ValueError("bad card"), FileNotFoundError(errno.ENOENT, "no record")))
    assert not is_network_error(raised(ValueError("bad card"), ConnectionResetError()))


def test_a_stop_abandons_a_call_in_the_background():
    def check_stop():
        raise Stopped("now")

    let_go, ended = threading.Event(), []
    with pytest.raises(Stopped):
        in_background(lambda: ended.append(let_go.wait(TIME_LIMIT)), check_stop)
    assert not ended
    let_go.set()
    assert in_background(lambda: 5, lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0, lambda: None)


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
    """Run `read_labelled` in its own process; return names, labels and source, or the error."""
    program = (
        "import sys, json\nfrom microbert.errors import InputError\nfrom microbert.data.labelled import read_labelled\n"
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
def test_labels_of_the_hub_are_read_from_its_files(hub, tmp_path):
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
def test_cached_labels_are_read_offline_and_others_are_a_plain_error(hub, tmp_path):
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
