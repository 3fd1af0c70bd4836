"""What finished runs and checkpoints record."""

import json
import shutil

import pytest

from microbert.errors import InputError
from microbert.train.recorded import read_record


def newest_checkpoint(run):
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_a_finished_run_records_its_corpus_and_a_checkpoint_its_tokens(finished_run):
    of_run, of_checkpoint = read_record(finished_run / "run"), read_record(newest_checkpoint(finished_run / "run"))
    assert of_run.corpus_key.startswith("files-") and of_run.tokens_key is None
    assert of_checkpoint.tokens_key and of_checkpoint.corpus_key is None
    for record in (of_run, of_checkpoint):
        config = record.config(str(finished_run / "cache"))
        assert (config.max_seq_len, config.vocab_size, config.cache_dir) == (32, 300, str(finished_run / "cache"))
        assert record.config("c", seed=7).seed == 7


def test_a_folder_without_a_record_has_none(tmp_path):
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"format": 99, "config": {}}', '{"format": 1, "config": 3, "corpus": "x"}']
)
def test_a_damaged_record_is_an_error(content, tmp_path):
    (tmp_path / "constants.json").write_text(content)
    with pytest.raises(InputError, match=r"constants.json is damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("change", [{"unknown": 1}, {"seed": None}, {"dataset": 3}])
def test_constants_of_another_version_or_type_are_an_error(change, finished_run, tmp_path):
    shutil.copy(finished_run / "run" / "constants.json", tmp_path)
    stored = json.loads((tmp_path / "constants.json").read_text())
    stored["config"] |= change
    (tmp_path / "constants.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="another version|must"):
        read_record(tmp_path).config("cache")
