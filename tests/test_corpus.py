"""Local files of every kind, the bundled reviews, the split, and hostile files."""

import bz2
import csv
import gzip
import json
import lzma

import pytest
from helpers import run_here, small_flags

from microbert.corpus import documents, open_corpus, split_hash, survey_corpus
from microbert.config import InputError
from test_config import configure

TEXTS = ["the first document", "größer, \"quoted\", naïve", "中文 and emoji 🙂", "the last one"]


def write(path, compress=None):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path)
        return path
    if path.suffix == ".csv":
        import io

        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerows([("id", "text"), *enumerate(TEXTS)])
        content = buffer.getvalue()
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))
    else:
        content = "\n".join(TEXTS) + "\n"
    data = content.encode("utf-8")
    if compress:
        path = path.with_name(path.name + {gzip: ".gz", bz2: ".bz2", lzma: ".xz"}[compress])
        data = compress.compress(data)
    path.write_bytes(data)
    return path


def read(dataset, tmp_path, **constants):
    config = configure("--dataset", str(dataset), "--cache-dir", str(tmp_path / "cache"), **constants)
    return list(documents(open_corpus(config).rows()))


@pytest.mark.parametrize("compress", [None, gzip, bz2, lzma])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_text_files_are_read_compressed_or_not(suffix, compress, tmp_path):
    assert read(write(tmp_path / f"data{suffix}", compress), tmp_path) == TEXTS


def test_parquet_is_read(tmp_path):
    assert read(write(tmp_path / "data.parquet"), tmp_path) == TEXTS


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    (tmp_path / "b.txt").write_text("from b\n")
    (tmp_path / "a.txt").write_text("from a\n")
    assert read(tmp_path / "*.txt", tmp_path) == ["from a", "from b"]


def test_max_samples_takes_the_first_rows(tmp_path):
    assert read(write(tmp_path / "data.txt"), tmp_path, max_samples=2) == TEXTS[:2]


def test_byte_order_mark_line_ends_and_empty_rows_do_not_reach_the_documents(tmp_path):
    (tmp_path / "data.txt").write_bytes("\ufeffone\r\n\r\n  \t\r\ntwo\r\n".encode())
    assert read(tmp_path / "data.txt", tmp_path) == ["one", "two"]


def test_the_text_column_may_have_any_name(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"id": 1, "body": "a b"}\n{"id": 2, "body": null}\n{"id": 3, "body": "c"}\n')
    assert read(tmp_path / "data.jsonl", tmp_path) == ["a b", "c"]
    assert read(tmp_path / "data.jsonl", tmp_path, text_column="body") == ["a b", "c"]


HOSTILE = {
    "empty.txt": (b"", [], "is empty"),
    "spaces.txt": (b"  \n\n\t\n", [], "no text found"),
    "latin.txt": (b"fine\nbroken \xff\xfe line\n", [], "line 2 is not UTF-8"),
    "columns.csv": (b"title,body\nx,y z\n", ["--text-column", "nope"], "title, body"),
    "which.csv": (b"title,body\nx,y z\n", [], "set text_column"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": oops}\n', [], "line 2 is not JSON"),
    "list.jsonl": (b'{"text": "a"}\n[1, 2]\n', [], "line 2 is not a JSON object"),
    "numbers.jsonl": (b'{"text": 5}\n{"text": 6}\n', ["--text-column", "text"], "not text"),
    "same.txt": (b"one document\none document\n", [], "two different documents"),
    "what.xyz": (b"text\n", [], "unknown kind of file"),
    "fake.parquet": (b"not parquet at all", [], "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_cannot_be_used_is_one_plain_line_and_nothing_is_created(name, tmp_path, monkeypatch, capfd):
    content, flags, words = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    small = small_flags(tmp_path, dataset=tmp_path / name, output_dir=tmp_path / "new" / "run")
    (tmp_path / "corpus.jsonl").unlink()
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
    config = configure("--cache-dir", str(tmp_path / "cache"))
    survey = survey_corpus(open_corpus(config), config, lambda: None)
    assert survey.documents == 25_000 and 2_250 <= survey.held_out <= 2_750
    assert read("imdb", tmp_path, max_samples=100) == texts[:100]


def test_the_split_is_a_function_of_seed_and_text_alone():
    assert split_hash("a text", 1) == split_hash("a text", 1)
    assert split_hash("a text", 1) != split_hash("a text", 2)
    share = sum(split_hash(str(n), 3) < 2**64 // 10 for n in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)


def test_a_tiny_corpus_holds_out_at_least_one_document(tmp_path):
    for n in (2, 3, 5):
        (tmp_path / f"{n}.txt").write_text("\n".join(f"document {i}" for i in range(n)))
        config = configure("--dataset", str(tmp_path / f"{n}.txt"), "--cache-dir", str(tmp_path / "cache"))
        survey = survey_corpus(open_corpus(config), config, lambda: None)
        assert 1 <= survey.held_out < n


def test_a_changed_file_gets_another_key(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("a b\nc d\n")
    config = configure("--dataset", str(path))
    before = open_corpus(config).key
    path.write_text("a b\nc e\n")
    assert open_corpus(config).key != before


def test_a_damaged_bundle_is_refused(monkeypatch):
    monkeypatch.setattr("microbert.corpus.IMDB_SHA256", "0" * 64)
    with pytest.raises(InputError, match="damaged"):
        open_corpus(configure())
