"""The table of losses by length, as text, Markdown, JSON, metrics and a picture."""

import json

from microbert.runtime.run_folder import LOSS_PICTURE
from microbert.train.by_length import LengthScore, LossByLength
from microbert.train.length_table import as_json, as_metrics, draw_losses, table_lines, table_markdown

SCORES = [
    LengthScore(8, 1000, 20_000, 4.3731, 0.312, 6.178, 1.4826, None),
    LengthScore(128, 50, 950, 3.9628, 0.4, 6.27, 1.3435, -0.4103),
]


def test_columns_are_aligned_and_numbers_rounded():
    title, header, first, second, left_out = table_lines(LossByLength(SCORES, [256, 512]))
    assert "nats" in title and len(header) == len(first) == len(second)
    assert first.split() == ["8", "4.373", "6.178", "31.2%", "1.483", "1,000", "20,000"]
    assert second.split() == ["128", "3.963", "6.270", "40.0%", "1.343", "-0.410", "50", "950"]
    assert header.index("documents") + len("documents") == first.index("1,000") + len("1,000")
    assert "no document has so many tokens: 256, 512 " in left_out


def test_a_table_without_any_length_says_so():
    [_, line] = table_lines(LossByLength([], []))
    assert "fewer than 8 tokens" in line
    assert "8, 16" in table_lines(LossByLength([], [8, 16]))[1]
    assert table_markdown(LossByLength([], [8])) == ""


def test_the_markdown_has_a_cell_for_every_column():
    rows = [line for line in table_markdown(LossByLength(SCORES, [])).splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert "| 128 | 3.963 | 6.270 |" in rows[3]


def test_programs_read_the_exact_numbers():
    stored = json.loads(json.dumps(as_json(LossByLength(SCORES, [512]))))
    assert stored["lengths_left_out"] == [512] and stored["lengths"][1]["change"] == -0.4103
    assert [one["loss"] for one in stored["lengths"]] == [4.3731, 3.9628]
    assert as_metrics(LossByLength(SCORES, [])) == {
        "by_length/loss_8": 4.3731,
        "by_length/accuracy_8": 0.312,
        "by_length/loss_128": 3.9628,
        "by_length/accuracy_128": 0.4,
    }


def test_the_picture_is_drawn_even_without_a_length(tmp_path):
    for scores in (SCORES, SCORES[:1], []):
        path = draw_losses(tmp_path, tmp_path / "x_{$", LossByLength(scores, []))
        assert path == tmp_path / LOSS_PICTURE and path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
