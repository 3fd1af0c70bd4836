"""Blocks and tokens on disk: damaged files are reported, and files that the system cannot open are left unchanged."""

import errno
import io
import json
import os

import numpy as np
import pytest
from helpers import listing, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from prepared import all_rows, prepare, prepare_as_in_a_run, small_blocks

from microbert.data.shards import Sequences
from microbert.errors import InputError, Stopped


@given(st.integers(1, 50), st.integers(1, 60))
def test_a_sample_is_spread_evenly(n, at_most):
    rows = np.arange(n, dtype=np.uint16)[:, None]
    sample = Sequences(rows).sample(at_most).rows[:, 0].astype(int)
    assert len(sample) == min(n, at_most) and sample[0] == 0
    distances = np.diff([*sample, n])
    assert distances.min() >= 1 and distances.max() - distances.min() <= 1


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "held_out_documents.bin"])
def test_a_damaged_cache_is_an_error_that_says_which_folder_to_delete(name, tmp_path):
    prepare(tmp_path)
    [path] = (tmp_path / "cache").rglob(name)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="delete"):
        prepare(tmp_path)


def stop_in_the_middle(folder, monkeypatch):
    """Stop a preparation after at least three blocks of 30 rows."""

    def check_stop():
        if len(list(folder.rglob("block-*.json"))) >= 3:
            raise Stopped("test")

    small_blocks(monkeypatch, 30)
    with pytest.raises(Stopped):
        prepare(folder, check_stop=check_stop)


WRONG = {
    "a string instead of a number": {"rows": "100"},
    "a float": {"tokens": 1.5},
    "a boolean": {"unknown": True},
    "a negative number": {"empty": -1},
    "a list instead of an object": {"end": [0, 30, 30]},
    "no position": {"end": None},
    "no object": {"unknown_characters": []},
    "an unknown name": {"more": 1},
    "another position": {"end": {"part": 0, "row": 0, "rows": 0}},
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_counts_of_a_block_are_reported_and_the_block_is_prepared_again(name, tmp_path, monkeypatch, capsys):
    stop_in_the_middle(tmp_path, monkeypatch)
    [record] = tmp_path.rglob("block-00001.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | WRONG[name]))
    capsys.readouterr()
    counts = prepare_as_in_a_run(tmp_path)[-1].corpus_counts
    assert (counts.rows, counts.train + counts.held_out) == (300, 300)
    printed = capsys.readouterr().out
    [warning] = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert f"{record} is damaged" in warning and "resuming after 30 rows" in printed


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays | {"lengths": arrays["lengths"] + 1},
        lambda arrays: arrays | {"hashes": arrays["hashes"][1:]},
        lambda arrays: arrays | {"ids": arrays["ids"].astype(float)},
        lambda arrays: {"ids": arrays["ids"]},
    ],
)
def test_a_damaged_block_is_an_error_that_says_which_folder_to_delete(damage, tmp_path, monkeypatch):
    stop_in_the_middle(tmp_path, monkeypatch)
    [path] = tmp_path.rglob("block-00001.npz")
    with np.load(path) as block:
        arrays = dict(block)
    np.savez(path, **damage(arrays))
    with pytest.raises(InputError, match="block-00001.npz is damaged.*delete"):
        prepare(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_open_files_do_not_grow_with_the_number_of_blocks(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus.jsonl", 80)
    counts = []
    for rows in (80, 2):
        small_blocks(monkeypatch, rows)
        before = len(os.listdir("/proc/self/fd"))
        tokens = prepare(tmp_path, packing=True)[-1]
        all_rows(tokens.train)
        counts.append(len(os.listdir("/proc/self/fd")) - before)
        del tokens
    assert counts[0] == counts[1] <= 3


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("function", ["microbert.data.shards.read_json", "numpy.memmap", "numpy.load"])
def test_tokens_that_the_system_cannot_open_are_not_reported_as_damaged(number, function, tmp_path, monkeypatch):
    prepare(tmp_path)
    before = listing(tmp_path / "cache")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, refuse)
    with pytest.raises(OSError) as caught:
        prepare(tmp_path)
    assert caught.value.errno == number and listing(tmp_path / "cache") == before


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("name", ["block-00001.json", "block-00001.npz"])
def test_a_block_that_the_system_cannot_open_is_not_removed(name, tmp_path, monkeypatch):
    stop_in_the_middle(tmp_path, monkeypatch)
    [path] = tmp_path.rglob(name)
    before, real = path.read_bytes(), io.open

    def refuse(file, *arguments, **options):
        if str(file) == str(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file))
        return real(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(io, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            prepare(tmp_path)
    assert path.read_bytes() == before
