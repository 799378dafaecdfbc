"""The README's figures are those of the stored records."""

import pytest

from bench import report


def test_the_readme_agrees_with_the_records():
    text = report.README.read_text(encoding="utf-8")
    assert report.filled(text) == text, "run `make report`"


def test_a_changed_figure_is_noticed():
    text = report.README.read_text(encoding="utf-8").replace("| q_sample bf16 | ", "| q_sample bf16 | 1")
    assert report.filled(text) != text


def test_a_missing_block_is_named():
    with pytest.raises(ValueError, match="no block <!-- kernels -->"):
        report.filled("nothing here")
