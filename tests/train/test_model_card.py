"""The model card states the facts of a run, and shows any text as text."""

import re
import types

import numpy as np
import pytest
from configs import configure, configure_v4, resolve

from microbert.data.documents import Documents
from microbert.data.pieces import PLANS
from microbert.data.row_lengths import row_lengths
from microbert.model.examples import Example
from microbert.train.checkpoint import State
from microbert.train.model_card import model_card_facts, write_model_card


@pytest.mark.parametrize("steps, passed", [(25, "0.5 epochs"), (50, "1 epoch"), (90, "1 epoch")])
def test_the_facts_are_those_of_the_run(steps, passed):
    config = resolve(configure(global_batch_size=2, epochs=1, seed=7))
    counts = types.SimpleNamespace(bits_per_byte=lambda loss: loss / 2)
    tokens = types.SimpleNamespace(train=np.zeros((100, 16)), token_counts=np.zeros(300), corpus_counts=counts)
    facts = model_card_facts(config, tokens, State("key", step=steps, last_eval_loss=3.0, last_eval_accuracy=0.25))
    assert facts["trained on"] == f"imdb, 100 sequences of {config.max_seq_len} tokens, {passed}"
    assert "300 tokens in the vocabulary" in facts["shape"] and facts["steps"].startswith(f"{steps} of 2 sequences")
    assert facts["held-out MLM loss"] == "3.0000 nats per masked token, 1.500 bits per byte of text"
    assert (facts["held-out MLM accuracy"], facts["seed"]) == ("25.0%", "7")


def test_the_facts_of_rows_of_documents_name_their_lengths():
    config = resolve(configure_v4(epochs=2), n_layers=4, batch_size=32)
    counts = np.zeros((1, PLANS, 14), np.int64)
    counts[:, :, 8] = 32 * 10  # rows of 128 tokens: ten steps
    documents = Documents(np.zeros(1, np.uint16), np.zeros(1, np.uint64), counts, row_lengths(config))
    corpus_counts = types.SimpleNamespace(bits_per_byte=lambda loss: loss / 2)
    tokens = types.SimpleNamespace(train=documents, token_counts=np.zeros(300), corpus_counts=corpus_counts)
    facts = model_card_facts(config, tokens, State("key", step=15, last_eval_loss=3.0))
    assert facts["trained on"] == "imdb, documents in 320 rows of 8 to 512 tokens, 1.5 epochs"
    assert facts["steps"].startswith("15 of 4,096 tokens")


@pytest.mark.parametrize("text", ["``` # title | <b>[MASK]", "| [MASK] | `` ` ````` '", '\u0e17 [MASK] "\\', "[MASK]"])
def test_a_model_card_shows_any_text_unchanged(text, tmp_path):
    example = Example(text, "a|b", 0.5, [("```", 0.25), ("<script>", 0.125)])
    write_model_card(tmp_path, "runs", {"trained on": "texts|more\n# x `y` <b> [z]"}, [example])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^(`{3,})(\w+)\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)
    assert [language for _, language, _ in blocks] == ["python", "text"]
    assert blocks[1][2].split("\n") == list(example.lines())
    compile(blocks[0][2], "card", "exec")
    assert repr(text) in blocks[0][2]
    assert r"| trained on | texts\|more # x \`y\` \<b\> \[z\] |" in card
    outside = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^#+ .*", outside, re.MULTILINE) == ["# runs", "## Examples"]
    assert "private" in card


def test_the_losses_by_length_are_a_section_of_their_own(tmp_path):
    write_model_card(tmp_path, "runs", {"seed": "42"}, [Example("[MASK]", "a", 0.5, [])], "| 8 | 4.3 |")
    card = (tmp_path / "README.md").read_text()
    assert "\n## Loss by length\n\n| 8 | 4.3 |\n\n## Examples\n" in card


def test_a_model_card_without_examples_has_no_section_for_them(tmp_path):
    write_model_card(tmp_path, "runs", {"seed": "42"}, [])
    card = (tmp_path / "README.md").read_text()
    assert "Examples" not in card and "[MASK]" in card and "movie" not in card
