"""The figures in README.md and docs/ are those of the stored records."""

import pytest

from bench import report
from ddpm.files import read_json

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
        (report.README, "| channels_last | "),
        (report.CI, "| nothing planted | "),
    ],
)
def test_a_changed_figure_is_noticed(path, figure):
    text = path.read_text(encoding="utf-8")
    assert figure in text
    changed = text.replace(figure, f"{figure}1")
    assert report.filled(changed, path) != changed


def test_compare_is_proven():
    """Ten A/A comparisons without an alarm; at least nine of ten planted 10% found, each on its operator's own row."""
    lines = read_json(report.PROOF)["comparisons"]
    same = [line for line in lines if line["kind"] == "same"]
    assert len(same) >= 10
    assert {line["exit"] for line in same} == {0}
    found = [
        {row["row"] for row in line["rows"] if row["status"] == "slower"}
        == {f"kernels/{line['operator']}/fp32/1e5 operator"}
        for line in lines
        if line["kind"] == "slower"
    ]
    assert len(found) >= 10
    assert sum(found) >= 0.9 * len(found)
    assert all(line["processes"] >= 6 for line in lines)


def test_a_missing_block_is_named():
    with pytest.raises(ValueError, match="no block <!-- kernels -->"):
        report.filled("nothing here")
