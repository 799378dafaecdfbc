"""The figures in README.md and docs/ are those of the stored records."""

import pytest

from bench import report

FILES = sorted({path for path, _ in report.BLOCKS.values()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_documents_agree_with_the_records(path):
    text = path.read_text(encoding="utf-8")
    assert report.filled(text, path) == text, "run `make report`"


@pytest.mark.parametrize(
    ("path", "figure"),
    [
        (report.README, "| q_sample bf16 | "),
        (report.README, "| step/fp32/batch1/plain | eager | "),
        (report.README, "| fp32/batch32/plain | x eager | "),
        (report.CI, "| nothing planted | "),
    ],
)
def test_a_changed_figure_is_noticed(path, figure):
    text = path.read_text(encoding="utf-8")
    assert figure in text
    changed = text.replace(figure, f"{figure}1")
    assert report.filled(changed, path) != changed


def test_a_missing_block_is_named():
    with pytest.raises(ValueError, match="no block <!-- kernels -->"):
        report.filled("nothing here")
