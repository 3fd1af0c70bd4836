"""Encode texts as token ids: the ids of a plain `tokenizers` call, several times faster.

BERT's normalizer maps one character at a time, its pre-tokenizer splits at white space and around punctuation, long
words are split, and WordPiece maps one of these words at a time. So two tables determine the ids of a text: what each
character is normalized to, and the ids of each word. Both are filled when a character or word first occurs; the rest is
numpy on large chunks of text. The library encodes the few exceptions: texts that contain special tokens, or marks that
NFD reorders.
Shapes: C characters of a chunk, W words, N ids, D texts.
"""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from microbert.data.tokenizer import LONGEST_WORD, SPECIAL_TOKENS, UNK_ID, alphabet_of

CHUNK_CHARACTERS = 4_000_000  # characters encoded at a time, with about 50 bytes of memory each
MOST_WORDS = 500_000  # words in the table, at about 200 bytes each; a full table is replaced by an empty one
SHORT_WORD = 32  # characters; longer words are encoded here, because the library tries pieces longer than any token

# kinds of characters: ALONE is a word of its own, such as punctuation; SEVERAL becomes more than one character
WORD, ALONE, SPACE, DROPPED, SEVERAL, UNSEEN = range(6)
CODE_POINTS = 0x110000
# spacing marks of combining classes 224 and 216; NFD moves a mark of any other class past one of them
REORDERED = "\u302e", "\U0001d165"


class Encoder:
    """Encode texts with one tokenizer of this suite. Not thread-safe: the tables grow while it encodes.

    unknown_characters: for each character missing from the vocabulary, how often it occurs in the unknown words of the
    last call of `encode`. A literal "[UNK]" in a text is counted under that name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = _CharacterTable(tokenizer)
        self._words = _WordTable(tokenizer)
        self._alphabet = alphabet_of(tokenizer)
        self.unknown_characters: Counter[str] = Counter()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, int32 [N], and the number of ids of each text, int64 [D].

        [CLS] and [SEP] are not added.
        """
        ids, lengths = [np.zeros(0, np.int32)], np.zeros(len(texts), np.int64)
        self.unknown_characters = Counter()
        for numbers, pieces in self._chunks(texts):
            if len(self._words) > MOST_WORDS:
                self._words = _WordTable(self._tokenizer)
            chunk_ids, chunk_lengths = self._encode_chunk(pieces)
            ids.append(chunk_ids)
            np.add.at(lengths, numbers, chunk_lengths)
        return np.concatenate(ids), lengths

    def _chunks(self, texts: list[str]) -> Iterator[tuple[list[int], list[str]]]:
        """Yield lists of text indices and texts of about CHUNK_CHARACTERS. Longer texts are split into pieces."""
        numbers: list[int] = []
        pieces: list[str] = []
        characters = 0
        for number, text in enumerate(texts):
            for piece in self._pieces(text):
                numbers.append(number)
                pieces.append(piece)
                characters += len(piece)
                if characters >= CHUNK_CHARACTERS:
                    yield numbers, pieces
                    numbers, pieces, characters = [], [], 0
        if pieces:
            yield numbers, pieces

    def _pieces(self, text: str) -> Iterator[str]:
        """Split a text into pieces that together have the same ids, at a space if possible."""
        start, size = 0, CHUNK_CHARACTERS
        while start + size < len(text):
            end = text.rfind(" ", start + 1, start + size)
            if end < 0:
                end = self._characters.last_cut(text, start, start + size)
            if end > 0:
                yield text[start:end]
                start, size = end, CHUNK_CHARACTERS
            else:
                size *= 2
        yield text[start:]

    def _encode_chunk(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode one chunk: ASCII texts together, other texts together, exceptions by the library."""
        ascii: list[int] = []
        wide: list[int] = []
        by_library: list[int] = []
        for number, text in enumerate(texts):
            needs_library = "[" in text and any(token in text for token in SPECIAL_TOKENS)
            (by_library if needs_library else ascii if text.isascii() else wide).append(number)
        if wide:
            self._characters.learn("".join(texts[number] for number in wide))
            is_unsure = {number: self._characters.is_unsure(texts[number]) for number in wide}
            by_library += [number for number in wide if is_unsure[number]]
            wide = [number for number in wide if not is_unsure[number]]
        numbers = [ascii + wide, by_library]
        by_words = self._encode_by_words([[texts[number] for number in group] for group in (ascii, wide) if group])
        parts = [by_words, self._encode_by_library([texts[number] for number in by_library])]
        ids, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order, starts = np.argsort(np.concatenate(numbers).astype(np.int64)), np.cumsum(lengths) - lengths
        return ids[ranges(starts[order], lengths[order])], lengths[order]

    def _encode_by_library(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            if UNK_ID in encoding.ids:
                self._count_unknown_in(text)
        lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
        return np.array([i for encoding in encodings for i in encoding.ids], np.int32), lengths

    def _encode_by_words(self, groups: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Encode all groups together, so that a word that occurs in several groups is looked up once."""
        parts = [self._split_words(texts) for texts in groups]
        words, distinct = _distinct_words([letters for letters, _, _ in parts], [starts for _, starts, _ in parts])
        table = self._words
        rows = table.rows(distinct)
        is_unknown = table.ids[table.starts[rows]] == UNK_ID
        if is_unknown.any():
            times = np.bincount(words, minlength=len(distinct))
            for number in np.flatnonzero(is_unknown).tolist():
                self._count_unknown(distinct[number].decode(), int(times[number]))
        rows = rows[words]  # [W]
        lengths = table.lengths[rows]
        ids = table.ids[ranges(table.starts[rows], lengths)]
        ids_before = np.zeros(len(words) + 1, np.int64)
        np.cumsum(lengths, out=ids_before[1:])
        word_counts = [np.zeros(0, np.int64), *(counts for _, _, counts in parts)]
        return ids, np.diff(ids_before[np.cumsum(np.concatenate(word_counts))], prepend=0)

    def _count_unknown(self, word: str, times: int) -> None:
        for character in word:
            if character not in self._alphabet:
                self.unknown_characters[character] += times

    def _count_unknown_in(self, text: str) -> None:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)  # encode again: the fast call has no offsets
        for token_id, (first, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == UNK_ID and text[first:end] == SPECIAL_TOKENS[UNK_ID]:
                self.unknown_characters[text[first:end]] += 1
            elif token_id == UNK_ID:
                self._count_unknown(self._tokenizer.normalizer.normalize_str(text[first:end]), 1)

    def _split_words(self, texts: list[str]) -> tuple[bytes, np.ndarray, np.ndarray]:
        """Split texts into words.

        Returns the concatenated words in UTF-8, the offset of each word [W] and the number of words of each text [D].
        """
        text_ends = np.cumsum([len(text) + 1 for text in texts])
        characters, kinds, text_ends = self._characters.translate(" ".join(texts) + " ", text_ends)  # [C], [C], [D]
        starts_word = np.empty(len(kinds), bool)
        starts_word[:1] = True
        np.logical_or(kinds[:-1] != WORD, kinds[1:] == ALONE, out=starts_word[1:])
        is_space = kinds == SPACE
        starts_word &= ~is_space
        positions = np.flatnonzero(starts_word)  # [W]
        starts = positions - np.cumsum(is_space, dtype=np.int32)[positions]  # offsets after the spaces are removed
        letters = characters[~is_space]
        positions, starts = self._characters.cut_words(positions, starts, len(letters))
        word_counts = np.diff(np.searchsorted(positions, text_ends), prepend=0)
        if letters.itemsize == 1:
            return letters.tobytes(), starts, word_counts
        n_bytes = np.ones(len(letters) + 1, np.int64)
        for first_of_more in (0x80, 0x800, 0x10000):
            n_bytes[1:] += letters >= first_of_more
        n_bytes[0] = 0
        return letters.tobytes().decode("utf-32-le").encode(), np.cumsum(n_bytes)[starts], word_counts


class _CharacterTable:
    """What BERT's normalizer and pre-tokenizer turn each character into, found by calling them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._normalize = tokenizer.normalizer.normalize_str
        self._split = tokenizer.pre_tokenizer.pre_tokenize_str
        [(first, _), *rest] = self._split("a" * (LONGEST_WORD + 1))
        self._longest = len(first) if rest else None  # None: tokenizers of earlier versions do not split words
        self._kinds = np.full(CODE_POINTS, UNSEEN, np.uint8)
        self._characters = np.zeros(CODE_POINTS, np.uint32)  # what a character becomes, if that is one character
        self._several: dict[int, tuple[list[int], list[int]]] = {}  # characters and kinds, if it is several
        self._unsure: set[str] = set()  # characters whose result depends on their neighbours
        ascii = "".join(map(chr, range(128)))
        self.learn(ascii)
        self._ascii_tables = [
            bytes(table[:128].astype(np.uint8)).ljust(256) for table in (self._characters, self._kinds)
        ]
        self._ascii_dropped = bytes(np.flatnonzero(self._kinds[:128] == DROPPED).tolist())

    def learn(self, text: str) -> None:
        """Add every new character of the text to the table."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        new = np.unique(codes[self._kinds[codes] == UNSEEN])
        for code in new.tolist():
            self._kinds[code] = self._add(chr(code))

    def is_unsure(self, text: str) -> bool:
        """Return whether the text contains a character whose result depends on its neighbours."""
        return any(character in text for character in self._unsure)

    def _add(self, character: str) -> int:
        """Record what the character becomes, and return its kind."""
        normal = self._normalize(character)
        for before, after in ((REORDERED[0], ""), ("", REORDERED[1])):
            if self._normalize(before + character + after) != self._normalize(before) + normal + self._normalize(after):
                self._unsure.add(character)
        match [word for word, _ in self._split(f"a{normal}a")]:
            case ["aa"]:
                return DROPPED
            case ["a", "a"]:
                return SPACE
            case ["a", alone, "a"] if len(alone) == 1:
                self._characters[ord(character)] = ord(alone)
                return ALONE
            case [word] if len(word) == 3:
                self._characters[ord(character)] = ord(word[1])
                return WORD
            case _:
                kinds = [(WORD, SPACE, ALONE)[len(self._split(f"a{part}a")) - 1] for part in normal]
                self._several[ord(character)] = [ord(part) for part in normal], kinds
                return SEVERAL

    def cut_words(self, positions: np.ndarray, starts: np.ndarray, n_letters: int) -> tuple[np.ndarray, np.ndarray]:
        """Split words that are too long.

        positions, starts: offset of each word in the text with spaces and without them [W]. Returns the offsets of the
        pieces.
        """
        lengths = np.diff(starts, append=n_letters)
        if self._longest is None or lengths.max(initial=0) <= self._longest:
            return positions, starts
        counts = -(-lengths // self._longest)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, 2 ... in each word
        offsets = self._longest * number
        return np.repeat(positions, counts) + offsets, np.repeat(starts, counts) + offsets

    def last_cut(self, text: str, first: int, end: int) -> int:
        """Return the last offset in (first, end] at which splitting the text does not change its ids, or 0.

        Splitting at `first` must not change them either.
        """
        window = " " + text[first:end]  # with a leading space no end below is 0
        self.learn(window)
        _, kinds, ends = self.translate(window, np.arange(2, len(window) + 1))
        numbers = np.arange(1, len(kinds) + 1)
        letters = numbers - np.maximum.accumulate(np.where(kinds == WORD, 0, numbers))  # length of the word so far
        can_be_cut = letters[ends - 1] % (self._longest or len(kinds)) == 0
        for place in (first + 1 + np.flatnonzero(can_be_cut))[::-1].tolist():
            around = (text[max(0, place - len(token) + 1) : place + len(token) - 1] for token in SPECIAL_TOKENS)
            is_in_token = any(token in part for token, part in zip(SPECIAL_TOKENS, around, strict=True))
            if not is_in_token and not unicodedata.combining(text[place]):  # NFD reorders combining characters
                return place
        return 0

    def translate(self, text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normalize a text.

        Returns its characters, uint8 (ASCII) or uint32 [C], their kinds, uint8 [C], and the new offsets of `ends`.
        """
        if text.isascii():
            as_bytes, as_kinds = (text.encode().translate(table, self._ascii_dropped) for table in self._ascii_tables)
            if len(as_bytes) == len(text):
                return np.frombuffer(as_bytes, np.uint8), np.frombuffer(as_kinds, np.uint8), ends
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        kinds, characters = self._kinds[codes], self._characters[codes]
        is_kept = kinds != DROPPED
        if not is_kept.all():
            codes, kinds, characters = codes[is_kept], kinds[is_kept], characters[is_kept]
            ends = np.cumsum(is_kept)[ends - 1]
        is_several = kinds == SEVERAL
        if not is_several.any():
            return characters, kinds, ends
        several = [self._several[code] for code in codes[is_several].tolist()]
        counts = np.ones(len(codes), np.int64)
        counts[is_several] = [len(parts) for parts, _ in several]
        characters, kinds, is_several = (np.repeat(array, counts) for array in (characters, kinds, is_several))
        characters[is_several] = [part for parts, _ in several for part in parts]
        kinds[is_several] = [kind for _, part_kinds in several for kind in part_kinds]
        return characters, kinds, np.cumsum(counts)[ends - 1]


class _WordTable:
    """The WordPiece ids of every word seen so far. Row r is ids[starts[r] : starts[r] + lengths[r]]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._wordpiece = Tokenizer(tokenizer.model)  # no normalizer, no pre-tokenizer: its input is one word
        self._vocabulary = tokenizer.get_vocab()
        self._longest_token = max(map(len, self._vocabulary))
        self._rows: dict[bytes, int] = {}
        self._n_ids = 0
        self.starts, self.lengths = np.zeros((2, 1), np.int64)
        self.ids = np.zeros(1, np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, words: list[bytes]) -> np.ndarray:
        """Return the rows of distinct words, int64 [W], adding new words to the table."""
        rows = np.fromiter(map(self._rows.get, words, itertools.repeat(-1)), np.int64, len(words))
        new = np.flatnonzero(rows < 0)
        if len(new):
            rows[new] = np.arange(len(self), len(self) + len(new))
            self._add([words[number] for number in new.tolist()])
        return rows

    def _add(self, words: list[bytes]) -> None:
        """Encode words and append them to the table."""
        texts = [word.decode() for word in words]
        is_long = [SHORT_WORD < len(text) <= LONGEST_WORD for text in texts]  # the library maps longer words to [UNK]
        others = [text for text, long in zip(texts, is_long, strict=True) if not long]
        encodings = iter(self._wordpiece.encode_batch_fast(others, add_special_tokens=False))
        ids = [self._search(text) if long else next(encodings).ids for text, long in zip(texts, is_long, strict=True)]
        lengths = np.array([len(of_word) for of_word in ids], np.int64)
        first, end, n_ids = len(self), len(self) + len(words), int(lengths.sum())
        self.starts, self.lengths = _grown(self.starts, end), _grown(self.lengths, end)
        self.ids = _grown(self.ids, self._n_ids + n_ids)
        self.starts[first:end] = self._n_ids + np.cumsum(lengths) - lengths
        self.lengths[first:end] = lengths
        self.ids[self._n_ids : self._n_ids + n_ids] = [i for of_word in ids for i in of_word]
        self._n_ids += n_ids
        self._rows.update(zip(words, range(first, end), strict=True))

    def _search(self, word: str) -> list[int]:
        """Encode one word by WordPiece: repeatedly take the longest token that fits; [UNK] if none fits."""
        ids: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self._longest_token - len(prefix)), start, -1):
                token_id = self._vocabulary.get(prefix + word[start:end])
                if token_id is not None:
                    break
            else:
                return [UNK_ID]
            ids.append(token_id)
            start, prefix = end, "##"
        return ids


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """Return the array with at least `size` elements, at least doubled if it must grow."""
    if size <= len(array):
        return array
    return np.concatenate([array, np.zeros(max(size, 2 * len(array)) - len(array), array.dtype)])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenation of range(start, start + length) for all pairs."""
    if not lengths.all():
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    steps = np.ones(int(lengths.sum()), np.int64)  # differences of consecutive results
    if len(steps):
        steps[0] = starts[0]
        steps[np.cumsum(lengths[:-1])] = starts[1:] - starts[:-1] - lengths[:-1] + 1
    return np.cumsum(steps)


def _distinct_words(letters: list[bytes], starts: list[np.ndarray]) -> tuple[np.ndarray, list[bytes]]:
    """Find the distinct words among groups of words.

    letters, starts: the concatenated words of each group and the offset of each word. Returns for each word its index
    in the list of distinct words, and that list.
    """
    group_ends = np.cumsum([len(of_group) for of_group in letters], dtype=np.int64)
    groups = zip(letters, starts, group_ends, strict=True)
    offsets = [of_group + end - len(text) for text, of_group, end in groups]
    all_offsets = np.concatenate([*offsets, group_ends[-1:] if letters else [0]]).astype(np.int64)
    words = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(all_offsets) - 1, [None, pa.py_buffer(all_offsets), pa.py_buffer(b"".join(letters))]
    )
    distinct = words.dictionary_encode()
    # to_numpy would import pandas, which takes half a second
    return np.from_dlpack(distinct.indices), distinct.dictionary.to_pylist()
