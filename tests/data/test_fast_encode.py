"""The fast encoder returns the ids of a plain tokenizers call for any text."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from microbert.data import fast_encode as encoder_module
from microbert.data.fast_encode import Encoder
from microbert.data.tokenizer import SPECIAL_TOKENS, UNK_ID, train_tokenizer

SAMPLE = [
    "The quick brown fox doesn't jump over 3.14 lazy dogs, again & again!",
    "Die Größe der Bäume über dem Fluß gefällt mir sehr.",
    "我喜欢看电影，电影很好看。",
    "Ελληνικά και русский текст, ещё раз",
    "नमस्ते दुनिया",
    "한국어 문장",
    "Việt Nam đẹp lắm",
] * 3
SETTINGS = [
    {"lowercase": lowercase, "strip_accents": strip_accents}
    for lowercase in (True, False)
    for strip_accents in (True, False)
]
ENCODERS = {}


def encoder_for(settings):
    key = tuple(settings.values())
    if key not in ENCODERS:
        tokenizer = train_tokenizer(lambda: iter(SAMPLE), vocab_size=300, **settings)
        ENCODERS[key] = tokenizer, Encoder(tokenizer)
    return ENCODERS[key]


def assert_same_ids(texts, settings):
    tokenizer, encoder = encoder_for(settings)
    ids, lengths = encoder.encode(texts)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [list(part) for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected


HOSTILE = {
    "nothing": "",
    "spaces only": " \t\r\n \u00a0\u3000",
    "controls": "a\x00b\x07c\x7f \x1b[0m \ufeffd\u200be\u00adf \ufffd",
    "white space of all kinds": "a\u2003b\u2028c\u205fd\x85e\x0bf\x0cg\u1680h",
    "Chinese": "我喜欢看电影，电影很好看。abc中文def",
    "rare Chinese": "𠀀𪜀豈 丽",
    "accents": "Ünïcödé naïve café cafe\u0301 ÅNGSTRÖM İstanbul ẞtraße ﬁne Ǆ",
    "Korean": "한국어 문장 한국어",
    "emoji": "😀 👩‍👩‍👧‍👦 🇩🇪 ❤️ ☃️x☃",
    "punctuation": "a.b,c!?…—–“x”‘y’«z» $5+3=8 ^_`|~ ¿qué? §1 ©2",
    "marks that NFD reorders": "a\u302e\u0316\U0001d165b \U0001d165\u302e c\u302f\u0301\u0316",
    "long words": "x" * 99 + " " + "x" * 100 + " " + "x" * 101 + " ü" * 3 + "ü" * 150 + "İ" * 77 + "a\u0301" * 99,
    "long words of several kinds": "한" * 180 + "\x00x" * 99 + " " + "quickbrown" * 35,
    "long words and special tokens": "quick" * 30 + "[MASK]" + "fox" * 80 + "[UNK]" + "lazy" * 80,
    "special tokens": "a [MASK] b[SEP]c [PAD][UNK] [CLS",
    "almost special": "[mask] [ MASK ] [x]",
    "right to left": "שָׁלוֹם עולם مرحبا بِك",
    "Thai": "สวัสดีชาวโลก",
    "mathematics": "𝐇𝐞𝐥𝐥𝐨 ∑∞ ½ ² Ⅷ",
    "private use": "a\ue000b\U000f0000 \U0010ffff",
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_has_the_ids_of_the_library(name, settings):
    assert_same_ids([HOSTILE[name]], settings)
    assert_same_ids(["plain before", HOSTILE[name], "", HOSTILE[name].upper(), "plain after"], settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_character_of_the_basic_plane_between_letters(settings):
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    assert_same_ids(
        [" ".join(f"a{c}B{c}" for c in characters[start : start + 4096]) for start in range(0, len(characters), 4096)],
        settings,
    )


letters = st.text(alphabet="axéüİ한\u0301\x00中☃", min_size=1, max_size=4)
words = st.one_of(
    st.text(max_size=20),
    st.builds(lambda text, times: text * times, letters, st.integers(1, 130)),
    st.sampled_from(SPECIAL_TOKENS),
)
long_texts = st.lists(words, max_size=5).map("".join)


@given(st.lists(long_texts, min_size=1, max_size=3), st.sampled_from(SETTINGS), st.integers(1, 300))
def test_long_words_in_chunks_of_any_size(texts, settings, characters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "CHUNK_CHARACTERS", characters)
        assert_same_ids(texts, settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "text", ["quickbrown" * 500, "한국어" * 900, "é\x00" * 999, "xx" + "[MASK]" * 300, "我喜" * 900]
)
def test_a_text_without_spaces_is_encoded_in_bounded_pieces(text, settings, monkeypatch):
    monkeypatch.setattr(encoder_module, "CHUNK_CHARACTERS", 400)
    _, encoder = encoder_for(settings)
    lengths = []
    real = encoder._encode_chunk
    monkeypatch.setattr(encoder, "_encode_chunk", lambda texts: lengths.append(sum(map(len, texts))) or real(texts))
    assert_same_ids([text], settings)
    assert len(lengths) >= 3 and max(lengths) < 2 * 400


def test_a_megabyte_without_spaces_is_encoded_in_seconds():
    tokenizer, encoder = encoder_for(SETTINGS[0])
    start = time.process_time()
    ids, _ = encoder.encode(["quickbrown" * 100_000])
    assert len(ids) > 100_000 and tokenizer.token_to_id("[UNK]") not in ids
    assert time.process_time() - start < 20


def test_long_words_are_unknown_to_a_tokenizer_of_an_earlier_version():
    tokenizer = Tokenizer.from_str(encoder_for(SETTINGS[0])[0].to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids, _ = Encoder(tokenizer).encode(["fox " + "fox" * 50])
    assert list(ids) == tokenizer.encode("fox " + "fox" * 50, add_special_tokens=False).ids
    assert ids[-1] == UNK_ID


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_characters_of_unknown_words_are_counted(settings):
    _, encoder = encoder_for(settings)
    for _ in range(2):  # counts cover the last call only
        encoder.encode(["fox☃☃ the dog", "fox☃☃ [MASK] Жд☃ [UNK]", "x" * 90 + "☃" * 20])
        expected = {"☃": 2 + 3 + 20, "[UNK]": 1}
        assert {text: n for text, n in encoder.unknown_characters.items() if text in expected} == expected
    encoder.encode(SAMPLE)
    assert not encoder.unknown_characters


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.sampled_from(SETTINGS))
def test_any_text(texts, settings):
    assert_same_ids(texts, settings)


@given(
    st.lists(st.text(alphabet="aZé中 \n.[]MASK\x00İ\u0301\u302e\U0001d165", max_size=30), min_size=1, max_size=8),
    st.sampled_from(SETTINGS),
    st.integers(1, 40),
)
def test_any_text_in_chunks_of_any_size(texts, settings, characters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "CHUNK_CHARACTERS", characters)
        assert_same_ids(texts, settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_texts_that_the_library_encodes_keep_their_order(settings):
    assert_same_ids(["a \u0316\u302e b", "the [MASK] c d e", "\U0001d165\u0316 d", "[SEP]"], settings)


def test_a_full_word_table_is_replaced(monkeypatch):
    monkeypatch.setattr(encoder_module, "MOST_WORDS", 10)
    for number in range(20):
        assert_same_ids([f"word{number} and other{number % 3} words, {'many ' * number}"], SETTINGS[0])


def test_only_exceptions_are_encoded_by_the_library(monkeypatch):
    tokenizer, _ = encoder_for(SETTINGS[1])
    encoder = Encoder(tokenizer)
    by_library = []
    monkeypatch.setattr(
        encoder,
        "_encode_by_library",
        lambda texts: by_library.extend(texts) or Encoder._encode_by_library(encoder, texts),
    )
    encoder.encode([*SAMPLE, f"a {SPECIAL_TOKENS[4]} b"])
    assert by_library == ["a [MASK] b"]
