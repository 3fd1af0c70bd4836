"""The constants of a script and its flags become one Config; a mistake is one line on stderr and exit code 2."""

import importlib
import resource
import subprocess
import sys

import pytest
from configs import configure, configure_v4, constants
from helpers import SCRIPT

from microbert.config.flags import comments_of_constants, read_config, whole_number
from microbert.errors import InputError


def test_a_script_saved_with_a_byte_order_mark_is_read(tmp_path):
    script = tmp_path / SCRIPT.name
    script.write_bytes(b"\xef\xbb\xbf" + SCRIPT.read_bytes())
    assert read_config(str(script), constants(), ["--n-layers", "3"]).n_layers == 3


def test_a_flag_overrides_the_constant():
    assert configure("--n-layers", "3").n_layers == 3
    assert configure("--n-layers", "3", n_layers=7).n_layers == 3
    assert configure(n_layers=7).n_layers == 7
    assert configure("--lr", "1e-3").learning_rate == configure("--learning-rate=1e-3").learning_rate == 1e-3


@pytest.mark.parametrize(
    "flags, packing",
    [
        (["--packing"], True),
        (["--no-packing"], False),
        (["--packing", "true"], True),
        (["--packing", "false"], False),
        (["--packing=True"], True),
    ],
)
def test_booleans_accept_every_usual_form(flags, packing):
    assert configure(*flags, packing=not packing).packing is packing


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--batch_size", "8"], "batch_size", 8),
        (["--batch_size=8"], "batch_size", 8),
        (["--no_packing"], "packing", False),
        (["--output_dir=my_runs/a_b"], "output_dir", "my_runs/a_b"),
        (["--cache_dir", "my_cache"], "cache_dir", "my_cache"),
        (["--max_samples", "5_000"], "max_samples", 5000),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
    ],
)
def test_underscores_in_flags_become_dashes_but_not_in_values(flags, name, value):
    assert getattr(configure(*flags), name) == value


@pytest.mark.parametrize(
    "command, words",
    [
        ("finetune run --max_samples 1", "max_samples = 1 must be"),
        ("finetune run --no_such_flag", "--no-such-flag"),
        ("advise --num_gpus many", "--num-gpus"),
        ("plot run --output_dir", "expected one argument"),
        ("fill_mask", "folder, text"),
    ],
)
def test_commands_accept_underscores_in_flags_and_report_a_mistake_in_one_line(command, words, monkeypatch, capsys):
    name, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"microbert.{name}").main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, number", [("500K", 500_000), ("10m", 10_000_000), ("5000", 5000), ("1.5k", 1500), (7, 7), ("1e6", 1_000_000)]
)
def test_whole_numbers_may_end_in_k_or_m(text, number):
    assert whole_number("max_samples", text) == number
    assert configure("--max-samples", str(text)).max_samples == number


def test_none_is_accepted_only_where_the_constant_may_be_none():
    assert configure("--max-samples", "None", max_samples=5).max_samples is None
    with pytest.raises(SystemExit):
        configure("--n-layers", "None")


@pytest.mark.parametrize("text", ["1.5", "many", "K", "", "1e-3", "nan"])
def test_other_text_is_not_a_whole_number(text):
    with pytest.raises(InputError):
        whole_number("epochs", text)


def test_a_misspelt_constant_is_an_error_that_suggests_the_right_one(capsys):
    block = constants()
    block["n_layer"] = block.pop("n_layers")
    with pytest.raises(SystemExit):
        read_config(str(SCRIPT), block, [])
    assert "unknown constant n_layer; did you mean n_layers?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, value",
    [([], None), (["--torch-compile"], True), (["--no-torch-compile"], False), (["--torch-compile", "none"], None)],
)
def test_an_optional_boolean_may_be_none(flags, value):
    assert configure_v4(*flags, torch_compile=None).torch_compile is value


def test_a_flag_of_another_version_is_named_as_such(capsys):
    with pytest.raises(SystemExit):
        configure("--preset", "large")
    assert "belongs to another version" in capsys.readouterr().err


def test_a_missing_constant_is_named(capsys):
    block = constants()
    del block["seed"]
    with pytest.raises(SystemExit):
        read_config(str(SCRIPT), block, [])
    assert "seed is missing" in capsys.readouterr().err


def test_help_shows_every_constant_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        configure("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in configure().__dataclass_fields__.keys() & constants():
        assert "--" + name.replace("_", "-") in text
    assert "transformer layers [default: 2]" in text


@pytest.mark.parametrize("flags, code", [(["--help"], 0), (["--n-layer", "4"], 2), (["--lr", "nan"], 2)])
def test_help_and_mistakes_answer_in_under_a_second_and_create_nothing(flags, code, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=tmp_path, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code
    # processor time, because a busy machine takes longer
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--n-layer", "4"], ["--n-layer", "did you mean --n-layers"]),
        (["--learning-rat=1"], ["did you mean --learning-rate"]),
        (["--lr", "nan"], ["learning_rate", "finite"]),
        (["--epochs", "1.5"], ["epochs", "whole number"]),
        (["--packing", "maybe"], ["packing", "true or false"]),
        (["--n-layers", "true"], ["n_layers", "whole number"]),
        (["--n-layers"], ["--n-layers"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_flag_that_cannot_be_read_exits_with_2_and_one_line_that_names_it(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(*flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_fits_the_terminal_and_breaks_no_line_inside_a_default(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        configure("--help")
    text = capsys.readouterr().out
    assert text.count("[default: ") == len(constants().keys() & configure().__dataclass_fields__)
    assert all(len(line) < int(columns) for line in text.splitlines()) and "\u00a0" not in text


def test_the_comment_of_a_constant_may_be_on_any_line_of_its_statement():
    source = "a = 1  # one\nb = (\n    None  # two\n)\nc = 3\n\nclass Settings:\n    d: int = 4  # four = 2 + 2\n"
    assert comments_of_constants(source) == {"a": "one", "b": "two", "c": ""}
    assert comments_of_constants(source, "Settings") == {"d": "four = 2 + 2"}
