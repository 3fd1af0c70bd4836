"""Random bytes and values as input: each is read or is a plain error, without another exception, a hang or a new file.

pytest tests/faults/test_fuzz.py --hypothesis-profile=thorough     10,000 inputs per test instead of 100
"""

import bz2
import gzip
import io
import json
import lzma
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
from configs import V4, configure
from configs import constants as constants_of
from helpers import SCRIPT, listing, small_flags
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_input import FINE, seal

from microbert.config.constants import Config
from microbert.config.flags import read_config
from microbert.data.fast_encode import Encoder
from microbert.data.file_formats import find_text_column, read_rows
from microbert.data.shards import open_tokens
from microbert.data.tokenizer import load_tokenizer
from microbert.errors import InputError
from microbert.fill_mask import fill_mask, load_run
from microbert.model.build import new_model, shape_of
from microbert.plot import draw_curves
from microbert.runtime.metrics import Metrics
from microbert.train.checkpoint import load_checkpoint, look_for_checkpoint
from microbert.train.hardware import Hardware
from microbert.train.optim import Optimizer
from microbert.train.recorded import read_record

CPU = Hardware("cpu", None)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged(draw, data):
    """Bytes after a few edits: overwritten, cut, inserted, repeated or truncated; or entirely random bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for kind in draw(
        st.lists(st.sampled_from(["overwrite", "cut", "insert", "repeat", "truncate"]), min_size=1, max_size=4)
    ):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(1, 16))
        new = draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([b'"', b",", b"\n", b"[", b"{", b"\x00", b"\xff", b"9" * 5000, b"[" * 5000]),
            )
        )
        match kind:
            case "overwrite":
                data = data[:at] + new + data[at + len(new) :]
            case "cut":
                data = data[:at] + data[at + length :]
            case "insert":
                data = data[:at] + new + data[at:]
            case "repeat":
                data = data[: at + length] + data[at:]
            case "truncate":
                data = data[:at]
    return data


@st.composite
def altered(draw, value):
    """A JSON value in which one part is changed, removed or added."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(ANYTHING)
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    changed = dict(value) if isinstance(value, dict) else list(value)
    place = draw(st.sampled_from(places))
    match draw(st.sampled_from(["alter", "alter", "alter", "remove", "add"])):
        case "alter":
            changed[place] = draw(altered(value[place]))
        case "remove":
            del changed[place]
        case "add" if isinstance(changed, dict):
            changed[draw(st.text(max_size=8))] = draw(ANYTHING)
        case "add":
            changed.append(draw(ANYTHING))
    return changed


def damaged_json(data):
    """JSON with damaged bytes, or with altered values."""
    return st.one_of(damaged(data), altered(json.loads(data)).map(lambda value: json.dumps(value).encode()))


def ends_well(call, *arguments):
    """Return the result of the call, None if it refuses the input with a plain error."""
    try:
        return call(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
    except SystemExit as stop:
        assert stop.code in (0, 2)


@pytest.fixture(scope="module")
def place(finished_run, tmp_path_factory):
    """A copy of a finished run. Only the tests themselves may change its folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(finished_run, folder / "copy")
    return folder / "copy"


@pytest.fixture(autouse=True)
def nothing_is_written(place):
    before = listing(place.parent)
    yield
    assert listing(place.parent) == before


CONSTANTS = constants_of(V4)


@given(
    st.dictionaries(
        st.sampled_from(sorted(CONSTANTS.keys() & Config.__dataclass_fields__.keys())), ANYTHING, min_size=1, max_size=3
    )
)
def test_constants_of_any_values(values):
    config = ends_well(lambda: read_config(str(V4), CONSTANTS | values, []))
    assert config is None or isinstance(config, Config)


FLAGS = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in sorted(Config.__dataclass_fields__)]),
    st.sampled_from(["--help", "--", "-", "--no-packing"]),
)
VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
    NUMBERS.map(str),
    st.sampled_from(["1e999", "10M", "none", "imdb"]),
)


@given(
    st.lists(st.one_of(FLAGS, VALUES, st.tuples(FLAGS, VALUES).map("=".join)), max_size=6),
    st.sampled_from([(SCRIPT, constants_of(SCRIPT)), (V4, CONSTANTS)]),
)
def test_flags_of_any_words(flags, version):
    script, constants = version
    config = ends_well(lambda: read_config(str(script), constants, flags))
    assert config is None or isinstance(config, Config)


def parquet(table):
    file = io.BytesIO()
    pa.parquet.write_table(table, file)
    return file.getvalue()


LINES = "a good film\r\nein schöner Film\n\n第三\n".encode()
CSV = b'text,more\n"a ""good"" film",1\n"two\nlines",2\n'
TABLE = pa.table({"text": ["a good film", None, "the end"], "more": [1, 2, 3]})
FILES = {
    "a.txt": LINES,
    "a.jsonl": FINE,
    "a.json": b'[{"text": "a good film"}, {"text": null, "more": [1]}]',
    "a.csv": CSV,
    "a.tsv": CSV.replace(b",", b"\t"),
    "a.parquet": parquet(TABLE),
    "a.jsonl.gz": gzip.compress(FINE),
    "a.txt.bz2": bz2.compress(LINES),
    "a.csv.xz": lzma.compress(CSV),
    "a.jsonl.zst": pa.compress(FINE, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_text_files_of_any_bytes(name, place, data):
    path = place.parent / name
    path.write_bytes(data.draw(damaged(FILES[name])))

    def read():
        column = find_text_column(str(path), None)
        return column and [row for rows in read_rows(str(path), column) for row in rows]

    rows = ends_well(read)
    assert all(row is None or isinstance(row, str) for row in rows or [])
    path.unlink()


@pytest.fixture(scope="module")
def tokens_folder(place):
    [folder] = place.glob("cache/*/tokens-*")
    [tokenizer] = place.glob("cache/*/tokenizer-*.json")
    return folder, load_tokenizer(tokenizer)


@pytest.mark.parametrize(
    "name", ["manifest.json", "token_counts.npy", "train.bin", "held_out.bin", "held_out_documents.bin"]
)
@given(data=st.data())
def test_prepared_tokens_of_any_bytes(name, tokens_folder, data):
    folder, tokenizer = tokens_folder
    whole = (folder / name).read_bytes()
    start = whole[:200]  # contains the header
    (folder / name).write_bytes(
        data.draw(damaged_json(whole)) if name.endswith(".json") else data.draw(damaged(start)) + whole[len(start) :]
    )
    try:
        ends_well(open_tokens, folder, "key", tokenizer)
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"])
@given(data=st.data())
@pytest.mark.slow
def test_checkpoints_of_any_bytes(name, place, data):
    """The manifest matches the damaged file, as an attacker would write it."""
    config = configure(*small_flags(place))
    newest = max((place / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    whole, manifest = (newest / name).read_bytes(), (newest / "manifest.json").read_bytes()
    state = json.loads((newest / "state.json").read_bytes())["state"]
    is_json = name.endswith(".json")
    new = data.draw(damaged_json(whole)) if is_json else data.draw(damaged(whole[:2000])) + whole[2000:]
    (newest / name).write_bytes(new)
    if name != "manifest.json":
        seal(newest)

    def load():
        path, _, settled = look_for_checkpoint(place / "run", config, CPU)
        model = new_model(shape_of(settled, 300))
        return load_checkpoint(path, model, Optimizer(model, settled), state["tokens_key"])

    try:
        loaded = ends_well(load)
        assert loaded is None or loaded.step >= 0
    finally:
        (newest / name).write_bytes(whole)
        (newest / "manifest.json").write_bytes(manifest)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@given(data=st.data())
def test_run_folders_of_any_bytes(name, place, data):
    folder = place / "run"
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damaged_json(whole) if name.endswith(".json") else damaged(whole[:2000])))
    try:
        if loaded := ends_well(load_run, folder):
            assert all(
                isinstance(token, str) and 0 <= p <= 1 for [(token, p), *_] in fill_mask(*loaded, "a great [MASK]")
            )
            assert max(Encoder(loaded[1]).encode(["a great film", "\u00e9 \u4e16"])[0]) < loaded[0].config.vocab_size
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["constants.json", "state.json"])
@given(data=st.data())
def test_records_of_any_bytes(name, place, data):
    newest = max((place / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    folder = place / "run" if name == "constants.json" else newest
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damaged_json(whole)))

    try:
        if config := ends_well(lambda: read_record(folder).config(str(place / "cache"))):
            assert type(config.seed) is int and isinstance(config.text_column, str | None)
    finally:
        (folder / name).write_bytes(whole)


@given(data=st.data())
def test_metrics_of_any_bytes(place, data):
    path = place / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    first, *others = whole.splitlines(keepends=True)
    path.write_bytes(
        data.draw(st.one_of(damaged(whole), damaged_json(first).map(lambda line: b"".join([line, b"\n", *others]))))
    )
    try:
        ends_well(draw_curves, [place / "run"])
        assert all(line["step"] <= 10 for line in Metrics(place / "run", 10).lines)
    finally:
        path.write_bytes(whole)
