"""Datasets of the Hub through the real client and a stand-in server: streamed, downloaded, offline, and when the Hub misbehaves."""

import gzip
import io
import json
import random
import shutil
import time

import pyarrow
import pyarrow.parquet
import pytest
from helpers import WORDS, run, small_flags, start
from hub_server import HubServer
from test_config import configure

from microbert.hub import LARGE_CHOICE, SMALL_CHOICE, choose_dataset

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


def parquet(texts, row_group_size=50, **columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts, **columns}), buffer, row_group_size=row_group_size)
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


def launch(hub, tmp_path, name="run", *more, home="home", **constants):
    return run(flags(tmp_path / name, *more, **constants), cwd=tmp_path / name, env=hub.env(tmp_path / home))


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.npy")}


def data_requests(hub):
    return [request for request in hub.log if request.method == "GET" and "/resolve/" in request.path and request.bytes_sent]


@pytest.fixture(scope="module")
def local_shards(tmp_path_factory):
    """What the same documents give as a local file: the tokens must not depend on the way by which the text came."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert run(flags(folder, dataset=folder / "texts.jsonl"), cwd=folder).returncode == 0
    return shards(folder)


def test_a_streamed_dataset_is_transferred_once_and_the_network_is_not_needed_again(hub, tmp_path, local_shards):
    done = launch(hub, tmp_path, epochs=3, prepare_only=False)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "run" / "cache") == local_shards
    for name, content in FILES.items():
        assert hub.bytes_of("org/plain", name) <= len(content)
    assert not list((tmp_path / "run" / "cache").rglob("block-*"))
    n_requests = len(hub.log)
    again = launch(hub, tmp_path, epochs=3, prepare_only=False, output_dir=tmp_path / "run" / "again", seed=42)
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


def test_a_download_gives_the_same_tokens_and_is_found_again_offline(hub, tmp_path, local_shards):
    assert launch(hub, tmp_path, "first", streaming=False).returncode == 0
    assert shards(tmp_path / "first" / "cache") == local_shards
    n_requests = len(hub.log)
    environment = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    offline = run(flags(tmp_path / "offline", streaming=False), cwd=tmp_path / "offline", env=environment)
    assert offline.returncode == 0, offline.stderr
    assert shards(tmp_path / "offline" / "cache") == local_shards
    assert len(hub.log) == n_requests


@pytest.mark.parametrize("streaming", [True, False])
def test_compressed_lines_and_a_named_configuration(streaming, hub, tmp_path, local_shards):
    lines = {f"main/train-{n}.jsonl.gz": gzip.compress("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS[300 * n : 300 * (n + 1)]).encode())
             for n in range(2)}
    hub.add("org/named", {"README.md": README.encode(), **lines, "main/test-0.jsonl.gz": gzip.compress(b'{"text": "of the test split"}\n'),
                          "other/x.jsonl.gz": gzip.compress(b'{"text": "another"}\n')})
    done = launch(hub, tmp_path, dataset="org/named:main", streaming=streaming)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "run" / "cache") == local_shards
    if streaming:
        for name, content in lines.items():
            assert hub.bytes_of("org/named", name) == len(content)
    assert not list((tmp_path / "run" / "cache").rglob("*.gz"))
    without = launch(hub, tmp_path, "without", dataset="org/named", streaming=streaming)
    assert without.returncode == 2 and "org/named:main" in without.stderr
    wrong = launch(hub, tmp_path, "wrong", dataset="org/named:nope", streaming=streaming)
    assert wrong.returncode == 2 and "other" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_new_commit_is_another_corpus_and_a_recorded_one_stays(hub, tmp_path):
    launch(hub, tmp_path)
    hub.add("org/plain", {"data/train-0.parquet": parquet(TEXTS[:100])})
    assert "600 read" in launch(hub, tmp_path).stdout
    for record in (tmp_path / "run" / "cache").glob("hub-*.json"):
        record.unlink()
    assert "100 read" in launch(hub, tmp_path).stdout


@pytest.mark.parametrize("kind", ["500", "429", "cut", "short", "timeout"])
def test_passing_trouble_is_waited_out(kind, hub, tmp_path, local_shards):
    hub.fail("GET .*train-1.parquet", kind, times=1, after_bytes=1000)
    hub.fail("GET /api/datasets/org/plain/revision/main", "500", times=2)
    done = launch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "run" / "cache") == local_shards


def test_trouble_that_the_client_gives_up_on_is_waited_out_too(hub, tmp_path, local_shards):
    hub.add("org/lines", {"data/train-0.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()})
    hub.fail("GET .*train-0.jsonl", "cut", times=2, after_bytes=5000)  # a reset that hf_hub_download raises at once
    done = launch(hub, tmp_path, dataset="org/lines")
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stderr
    assert shards(tmp_path / "run" / "cache") == local_shards


def test_a_stream_that_is_killed_goes_on_behind_what_is_prepared(hub, tmp_path):
    """Files that are done are not asked for again. The last file hangs, so that the kill falls there."""
    long_texts = [text * 400 for text in TEXTS]
    files = {f"data/train-{n}.parquet": parquet(long_texts[200 * n : 200 * (n + 1)]) for n in range(3)}
    hub.add("org/long", files)
    assert launch(hub, tmp_path, "whole", dataset="org/long").returncode == 0
    bytes_before = [hub.bytes_of("org/long", name) for name in files]
    hub.fail("GET .*train-2.parquet", "timeout", times=100)
    process = start(flags(tmp_path / "killed", dataset="org/long"), cwd=tmp_path / "killed", env=hub.env(tmp_path / "home"))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed" / "cache").rglob("block-00000.json")) or not hub.log[-1].path.endswith("train-2.parquet"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    hub.failures.clear()
    assert "going on behind" in launch(hub, tmp_path, "killed", dataset="org/long").stdout
    assert shards(tmp_path / "killed" / "cache") == shards(tmp_path / "whole" / "cache")
    first = list(files)[0]
    assert hub.bytes_of("org/long", first) <= 2 * bytes_before[0]  # once for each of the two folders


@pytest.mark.parametrize("endpoint", ["refuses", "does not resolve", "never answers", "offline"])
def test_without_a_network_the_error_comes_within_ten_seconds_and_says_what_to_do(endpoint, hub, tmp_path):
    environment = hub.env(tmp_path / "home")
    if endpoint == "refuses":
        hub.close()
    elif endpoint == "does not resolve":
        environment["HF_ENDPOINT"] = "http://hub.invalid"
    elif endpoint == "never answers":
        hub.fail(".*", "timeout", times=100)
    else:
        environment["HF_HUB_OFFLINE"] = "1"
    command = flags(tmp_path / "run")
    begin = time.monotonic()
    done = run(command, cwd=tmp_path / "run", env=environment)
    seconds = time.monotonic() - begin
    assert done.returncode == 2, done.stderr
    for words in ("org/plain", "hf download --repo-type dataset org/plain", "--prepare-only", "--dataset imdb"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 3
    assert seconds < 10
    assert not (tmp_path / "run" / "run").exists() and not (tmp_path / "run" / "cache").exists()


def test_a_card_that_does_not_fit_its_files_is_a_plain_line(hub, tmp_path):
    hub.add("org/named", {"README.md": README.encode(), "main/train-0.jsonl": b'{"other": 1}\n', "main/test-0.jsonl": b'{"other": 1}\n'})
    done = launch(hub, tmp_path, dataset="org/named:main", streaming=False)
    assert done.returncode == 2 and "org/named:main" in done.stderr and "Traceback" not in done.stderr


def test_names_that_are_not_there_and_doors_that_are_shut(hub, tmp_path):
    missing = launch(hub, tmp_path, "missing", dataset="org/missing")
    assert missing.returncode == 2 and "no dataset of that name" in missing.stderr
    hub.fail("GET /api/datasets/org/plain.*", "401", times=9)
    gated = launch(hub, tmp_path, "gated")
    assert gated.returncode == 2 and "HF_TOKEN" in gated.stderr
    hub.failures.clear()
    hub.add("org/tests", {"data/test-0.parquet": parquet(TEXTS[:9])})
    for streaming in (True, False):
        split = launch(hub, tmp_path, f"split{streaming}", dataset="org/tests", streaming=streaming)
        assert split.returncode == 2 and "test" in split.stderr and "Traceback" not in split.stderr
    column = launch(hub, tmp_path, "column", text_column="body")
    assert column.returncode == 2 and "id, text" in column.stderr


def test_the_token_of_the_environment_is_sent(hub, tmp_path):
    run(flags(tmp_path / "run"), cwd=tmp_path / "run", env=hub.env(tmp_path / "home") | {"HF_TOKEN": "hf_secret"})
    assert any(request.headers.get("authorization") == "Bearer hf_secret" for request in hub.log)


def test_a_dry_run_asks_once_and_writes_nothing(hub, tmp_path):
    hub.add("org/named", {"README.md": README.encode(), "main/train-0.parquet": FILES["data/train-0.parquet"]})
    done = launch(hub, tmp_path, "run", "--dry-run", dataset="org/named:main")
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "600 documents" in done.stdout and json.loads(done.stdout.splitlines()[-1])["tokens_known"] is False
    assert [request.method for request in hub.log] == ["GET"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


@pytest.mark.parametrize("max_samples, streaming, chosen", [("500K", False, (SMALL_CHOICE, False)), ("1M", True, (SMALL_CHOICE, True)), (None, False, (SMALL_CHOICE, False)),
                                                            ("1000001", False, (LARGE_CHOICE, True)), ("10M", False, (LARGE_CHOICE, True))])
def test_hf_is_the_small_choice_up_to_a_million_samples(max_samples, streaming, chosen):
    repo_id, name, streams = choose_dataset(configure(dataset="hf", max_samples=max_samples, streaming=streaming))
    assert (f"{repo_id}:{name}", streams) == chosen
