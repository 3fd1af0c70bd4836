"""Local files of every format, the bundled reviews, the split, and unusable files."""

import concurrent.futures
import csv
import gzip
import json
import os
import re
import time

import filelock
import pyarrow as pa
import pyarrow.parquet
import pytest
from configs import configure
from helpers import run_here, small_flags

from microbert.config.constants import local_data_files
from microbert.data.corpus import Position, clean, split_hash
from microbert.data.sources import lock_cache, open_corpus
from microbert.errors import InputError
from microbert.runtime.files import read_json, write_json

TEXTS = ["the first document", 'größer, "quoted", naïve', "中文 and emoji 🙂", "the last one"]


def write(path):
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("id", "text"), *enumerate(TEXTS)])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    else:
        path.write_text("\n".join(TEXTS) + "\n")
    return path


def open_dataset(dataset, tmp_path, **constants):
    return open_corpus(configure("--dataset", str(dataset), "--cache-dir", str(tmp_path / "cache"), **constants))


def read(dataset, tmp_path, **constants):
    corpus = open_dataset(dataset, tmp_path, **constants)
    return [text for rows, _ in corpus.read() for text in map(clean, rows) if text]


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    (tmp_path / "b.txt").write_text("from b\n")
    (tmp_path / "a.txt").write_text("from a\n")
    assert read(tmp_path / "*.txt", tmp_path) == ["from a", "from b"]


def test_several_paths_folders_and_globs_are_read_in_order(tmp_path):
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "folder/c.txt", "folder/deeper/d.csv", "folder/notes.md"):
        (tmp_path / name).write_text(
            {".jsonl": '{"text": "from a"}\n', ".csv": "text\nfrom d\n"}.get(
                name[name.rindex(".") :], f"from {name[-5]}\n"
            )
        )
    assert read(f"{tmp_path}/b.txt, {tmp_path}/*.jsonl,{tmp_path}/folder", tmp_path) == [
        "from b",
        "from a",
        "from c",
        "from d",
    ]
    assert read(f"{tmp_path}/*.txt,{tmp_path}/b.txt", tmp_path) == ["from b"]
    with pytest.raises(SystemExit):
        open_dataset(f"{tmp_path}/b.txt,{tmp_path}/*.nothing", tmp_path)


def test_a_shell_may_expand_the_glob(tmp_path):
    (tmp_path / "b.txt").write_text("from b\n")
    (tmp_path / "a.txt").write_text("from a\n")
    assert (
        configure("--dataset", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", "--epochs", "2").dataset
        == f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    )


def test_names_may_contain_wildcards_and_commas(tmp_path):
    for name in ("a[1].txt", "b,c.txt"):
        (tmp_path / name).write_text("one\n")
        assert read(tmp_path / name, tmp_path) == ["one"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_reading_resumes_from_any_position(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("microbert.data.file_formats.READ_ROWS", 2)
    for name in "ab":
        write((tmp_path / name).with_suffix(suffix))
    corpus = open_dataset(tmp_path / f"*{suffix}", tmp_path, max_samples=7)
    whole = list(corpus.read())
    assert [row for rows, _ in whole for row in rows] == [*TEXTS, *TEXTS[:3]]
    for number, (_, position) in enumerate(whole, 1):
        assert list(corpus.read(position)) == whole[number:]
    assert whole[-1][1] == Position(part=1, row=3, rows=7)


def test_the_head_contains_a_share_of_every_file(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"from {name}\n" * 2000)
    corpus = open_dataset(tmp_path / "*.txt", tmp_path)
    assert {row for rows in corpus.head(900) for row in rows} == {"from a", "from b", "from c"}
    first_only = open_dataset(tmp_path / "*.txt", tmp_path, max_samples=100)
    assert {row for rows in first_only.head(900) for row in rows} == {"from a"}


def test_long_rows_do_not_enlarge_the_head(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(("x" * 999 + "\n") * 300)
    rows = [row for rows in open_dataset(tmp_path / "*.txt", tmp_path).head(50_000) for row in rows]
    assert 50_000 <= sum(map(len, rows)) <= 50_000 + 20 * 1000


def test_files_without_rows_among_others_are_skipped(tmp_path):
    for name, content in {
        "a.txt": b"",
        "b.jsonl.gz": gzip.compress(b""),
        "c.csv": b"text,id\n",
        "d.txt": b"text\n",
        "e.csv": b"text\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "f.parquet")
    assert read(tmp_path, tmp_path) == ["text"]
    assert "1 of them empty" in open_dataset(tmp_path, tmp_path).description


def test_hidden_files_and_files_of_this_suite_are_ignored_in_a_folder(tmp_path):
    for name in (
        "data/a.txt",
        "data/.hidden/b.txt",
        "data/.c.txt",
        "data/cache/d.json",
        "data/out/metrics.jsonl",
        "data/dataset_infos.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("from a\n")
    config = configure(
        "--dataset",
        str(tmp_path / "data"),
        "--cache-dir",
        str(tmp_path / "data" / "cache"),
        "--output-dir",
        str(tmp_path / "data" / "out"),
    )
    assert local_data_files(config) == [str(tmp_path / "data" / "a.txt")]


def test_empty_names_are_ignored_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("a.txt", "b.txt", "home/c.txt"):
        (tmp_path / name).write_text("x\n")
    assert local_data_files(configure("--dataset", "a.txt,")) == ["a.txt"]
    assert local_data_files(configure("--dataset", "a.txt", "")) == ["a.txt"]
    assert local_data_files(configure("--dataset", "~/*.txt")) == [str(tmp_path / "home" / "c.txt")]
    with pytest.raises(SystemExit):
        configure("--dataset", ",")


def test_hundreds_of_names_may_be_given(tmp_path):
    paths = [
        tmp_path / f"a file with a rather long name, number {number}.txt".replace(",", ";") for number in range(200)
    ]
    for path in paths:
        path.write_text("x\n")
    assert len(local_data_files(configure("--dataset", *map(str, paths)))) == 200


def test_unreadable_files_of_a_folder_are_skipped_and_named(tmp_path):
    for name, content in {
        "data/AA/wiki_00": b"from 00\n",
        "data/AB/wiki_00.gz": gzip.compress(b"from gz\n"),
        "data/a.txt": b"from a\n",
        "data/notes.md": b"x\n",
        "data/program": b"\x7fELF" + bytes(99),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path / "data", tmp_path) == ["from 00", "from gz", "from a"]
    message = open_dataset(tmp_path / "data", tmp_path).summary
    assert "1 of unsupported formats" in message and "notes.md" in message
    assert "1 without an extension" in message and "program" in message
    (tmp_path / "data" / "b.jsonl").write_text('{"text": "from b"}\n')
    assert read(tmp_path / "data", tmp_path) == ["from a", "from b"]
    assert "3 without an extension" in open_dataset(tmp_path / "data", tmp_path).summary


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "contains no files. Supported are"),
        (
            lambda folder: (folder / "a.md").write_text("x"),
            r"contains only files of unsupported formats: .*a\.md. Supported are",
        ),
        (
            lambda folder: (folder / "a.txt").symlink_to("/nowhere/a.txt"),
            r"a\.txt is a broken link: /nowhere/a\.txt does not exist",
        ),
        (lambda folder: (folder / "a").write_bytes(b"\xff" * 99), "line 1 is not UTF-8"),
        (lambda folder: os.mkfifo(folder / "a.txt"), "neither a file nor a folder"),
        (
            lambda folder: (folder / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid"),
            "Git LFS pointer",
        ),
    ],
)
def test_an_existing_path_never_goes_to_the_hub(make, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "org" / "name").mkdir(parents=True)
    make(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("microbert.data.sources.open_hub", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises((InputError, SystemExit)) as caught:
        read("org/name", tmp_path)
    assert re.search(message, f"{caught.value} {capsys.readouterr().err}")


def test_links_to_folders_are_followed_each_folder_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("from b\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("from a\n")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    assert read(tmp_path / "data", tmp_path) == ["from a", "from b"]


def test_names_may_be_very_long_or_not_utf_8(tmp_path):
    for name in (b"caf\xe9.txt", b"x" * 246 + b".txt"):
        (tmp_path / "data").mkdir(exist_ok=True)
        path = os.fsdecode(os.fsencode(tmp_path / "data") + b"/" + name)
        with open(path, "w") as file:
            file.write("from it\n")
        for dataset in (path, tmp_path / "data"):
            corpus = open_dataset(dataset, tmp_path)
            assert [rows for rows, _ in corpus.read()] == [["from it"]] and len(corpus.key) < 30
        write_json(tmp_path / "state.json", {"dataset": path})
        assert read_json(tmp_path / "state.json") == {"dataset": path}
        os.unlink(path)


def test_the_key_depends_on_the_content_not_on_the_name(tmp_path):
    keys = {}
    for name in ("a.jsonl", "b.jsonl", "b.ndjson", "deeper/c.jsonl", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "one text"}\n')
        keys[name] = open_dataset(tmp_path / name, tmp_path).key
    assert keys["a.jsonl"] == keys["b.jsonl"] == keys["b.ndjson"] == keys["deeper/c.jsonl"] != keys["c.txt"]


def test_the_summary_states_the_column_and_an_unusual_separator(tmp_path):
    (tmp_path / "a.csv").write_text("n;review\n1;so so\n2;good one\n")
    assert read(tmp_path / "a.csv", tmp_path) == ["so so", "good one"]
    message = open_dataset(tmp_path / "a.csv", tmp_path).summary
    assert '(text column "review", separated by semicolons), about' in message
    (tmp_path / "a.txt").write_text('{"text": "one text"}\n')
    assert read(tmp_path / "a.txt", tmp_path) == ['{"text": "one text"}']
    message = open_dataset(tmp_path / "a.txt", tmp_path).summary
    assert re.search(r"warning: .*a.txt looks like JSON lines.*\n.*one document per line", message)


def test_a_glob_matches_files_and_folders(tmp_path):
    for name in ("ex/AA/wiki_00", "ex/README", "ex/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"from {name[-2:]}\n")
    (tmp_path / "ex" / "c.txt").symlink_to(tmp_path / "ex" / "b.txt")  # the same file
    for dataset in (tmp_path / "ex" / "*", tmp_path / "ex", f"{tmp_path}/ex/b.txt,{tmp_path}/ex/../ex/*"):
        assert sorted(read(dataset, tmp_path)) == ["from 00", "from ME", "from xt"]


def test_names_with_commas_and_outer_spaces_among_others(tmp_path):
    for name in ("my, folder/a.txt", "b, c.txt", " d.txt", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"from {name[-5]}\n")
    assert read(tmp_path / "my, folder", tmp_path) == ["from a"]
    names = [f"{tmp_path}/{name}" for name in ("e.txt", "my, folder", "b, c.txt", " d.txt")]
    assert local_data_files(configure("--dataset", *names)) == [names[0], f"{names[1]}/a.txt", *names[2:]]


def test_a_loop_of_links_never_goes_to_the_hub(tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        open_dataset("loop/x", tmp_path)
    assert "loop/x cannot be read" in capsys.readouterr().err


def test_a_folder_that_datasets_has_saved_is_refused(tmp_path, capsys):
    (tmp_path / "saved").mkdir()
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(SystemExit):
        open_dataset(tmp_path / "saved", tmp_path)
    assert re.search(r"only files of unsupported formats: .*\.arrow", capsys.readouterr().err)


def test_a_later_file_without_the_column_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\nx,1\n")
    (tmp_path / "b.csv").write_text("body,n\ny,2\n")
    with pytest.raises(InputError, match=r'b\.csv has no column "text"; it has: body, n'):
        read(tmp_path / "*.csv", tmp_path)


def test_max_samples_selects_the_first_rows(tmp_path):
    assert read(write(tmp_path / "data.txt"), tmp_path, max_samples=2) == TEXTS[:2]


def test_byte_order_marks_line_endings_and_empty_rows_are_removed(tmp_path):
    (tmp_path / "data.txt").write_bytes("\ufeffone\r\n\r\n  \t\r\ntwo\r\n".encode())
    assert read(tmp_path / "data.txt", tmp_path) == ["one", "two"]


def test_a_text_file_among_others_needs_no_column(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text('{"id": "1", "body": "two"}\n')
    for names in (f"{tmp_path}/a.txt,{tmp_path}/b.jsonl", f"{tmp_path}/b.jsonl,{tmp_path}/a.txt"):
        assert sorted(read(names, tmp_path, text_column="body")) == ["one", "two"]


def test_the_text_column_may_have_any_name(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"id": 1, "body": "a b"}\n{"id": 2, "body": null}\n{"id": 3, "body": "c"}\n')
    assert read(tmp_path / "data.jsonl", tmp_path) == ["a b", "c"]
    assert read(tmp_path / "data.jsonl", tmp_path, text_column="body") == ["a b", "c"]


HOSTILE = {
    "nulls.jsonl": (b'{"text": null}\n{"text": null}\n', ["--text-column", "text"], "no text found"),
    "unknown.txt": (b"[UNK]\n[UNK] [UNK]\n", [], "a token that the tokenizer knows"),
    "empty.txt": (b"", [], "is empty"),
    "spaces.txt": (b"  \n\n\t\n", [], "no text found"),
    "latin.txt": (b"fine\nbroken \xff\xfe line\n", [], "line 2 is not UTF-8"),
    "columns.csv": (b"title,body\nx,y z\n", ["--text-column", "nope"], "title, body"),
    "which.csv": (b"title,body\nx,y z\n", [], "set text_column"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": oops}\n', [], "line 2 is not valid JSON"),
    "list.jsonl": (b'{"text": "a"}\n[1, 2]\n', [], "line 2 is not a JSON object"),
    "numbers.jsonl": (b'{"text": 5}\n{"text": 6}\n', ["--text-column", "text"], "not text"),
    "same.txt": (b"one document\none document\n", [], "two different documents"),
    "what.xyz": (b"text\n", [], "unsupported file format"),
    "fake.parquet": (b"not parquet at all", [], "cannot be read as parquet"),
    "half.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], [], "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_unusable_file_is_one_plain_error_and_nothing_is_created(name, tmp_path, monkeypatch, capfd):
    content, flags, words = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    small = small_flags(tmp_path, dataset=tmp_path / name, output_dir=tmp_path / "new" / "run")
    assert run_here([*small, *flags], monkeypatch) == 2
    error = capfd.readouterr().err
    assert words in error and name in error and "Traceback" not in error and error.count("\n") <= 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_of_other_files_is_not_written_to(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("precious")
    assert run_here(small_flags(tmp_path, output_dir=tmp_path / "mine"), monkeypatch) == 2
    assert "holds other files" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_the_bundled_reviews_are_all_there(tmp_path):
    texts = read("imdb", tmp_path)
    assert len(texts) == 25_000
    assert not any("<br />" in text for text in texts)
    assert read("imdb", tmp_path, max_samples=100) == texts[:100]


def test_the_split_depends_only_on_seed_and_text():
    assert split_hash("a text", 1) == split_hash("a text", 1)
    assert split_hash("a text", 1) != split_hash("a text", 2)
    share = sum(split_hash(str(n), 3) < 2**64 // 10 for n in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)


def test_a_changed_file_gets_another_key(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("a b\nc d\n")
    before = open_dataset(path, tmp_path).key
    path.write_text("a b\nc e\n")
    assert open_dataset(path, tmp_path).key != before


def test_a_hash_is_reused_while_the_file_is_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("a b\nc d\n")
    monkeypatch.setattr("microbert.data.local_files.SETTLED_SECONDS", -1)
    corpus = open_dataset(path, tmp_path)
    (tmp_path / "cache").mkdir()
    corpus.remember()
    with monkeypatch.context() as patch:
        patch.setattr("microbert.data.local_files.sha256", lambda path: pytest.fail("read through again"))
        assert open_dataset(path, tmp_path).key == corpus.key
        path.rename(tmp_path / "other.txt").rename(path)  # its time of change is another, its content is not
    assert open_dataset(path, tmp_path).key == corpus.key
    status = path.stat()
    path.write_text("a b\nc e\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_dataset(path, tmp_path).key != corpus.key


def test_a_damaged_bundle_is_refused(monkeypatch):
    monkeypatch.setattr("microbert.data.sources.IMDB_SHA256", "0" * 64)
    with pytest.raises(InputError, match="damaged"):
        open_corpus(configure())


@pytest.mark.parametrize("path", ["a_file", "a_file/below", "locked"])
def test_a_cache_that_cannot_be_written_is_a_plain_error(path, tmp_path, monkeypatch, capfd):
    (tmp_path / "a_file").write_text("x")
    if path == "locked":  # as for a user who is not root
        monkeypatch.setattr(
            filelock.FileLock,
            "acquire",
            lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )
    config = configure("--dataset", "imdb", "--cache-dir", str(tmp_path / path))
    with pytest.raises(InputError, match="cache_dir"), lock_cache(open_corpus(config), config):
        pass


def test_a_prepared_read_only_cache_is_used(tmp_path, monkeypatch, capfd):
    flags = small_flags(tmp_path, epochs=1)
    assert run_here([*flags, "--prepare-only", "--output-dir", str(tmp_path / "first")], monkeypatch) == 0
    acquire = filelock.FileLock.acquire

    def read_only(lock, *arguments, **options):
        if "/cache/" in lock.lock_file:
            raise OSError(30, "Read-only file system", lock.lock_file)
        return acquire(lock, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", read_only)
    assert run_here(flags, monkeypatch) == 0


def test_bad_input_leaves_what_another_run_has_prepared(tmp_path):
    """The second run waits for the first, fails for its own settings, and must not delete what the first prepared."""
    config = configure("--dataset", "imdb", "--cache-dir", str(tmp_path))
    corpus = open_corpus(config)
    folder = corpus.cache_folder(config)

    def second():
        with pytest.raises(InputError, match="too little"), lock_cache(corpus, config):
            raise InputError("too little text")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with filelock.FileLock(tmp_path / f".{corpus.key}.lock"):
            waiting = pool.submit(second)
            time.sleep(0.5)
            folder.mkdir()
            (folder / "work").write_text("of the first")
        waiting.result(20)
    assert (folder / "work").exists()
