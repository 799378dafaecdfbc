"""The figures in README.md and docs/ are those of the stored records."""

import json

import pytest

from bench import report
from bench.cli import main
from ddpm.errors import WorkFailed

TEXTS = report.documents()
README = report.ROOT / "README.md"
ALL = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in report.BLOCKS)


def test_the_documents_agree_with_the_records():
    assert report.filled(TEXTS) == TEXTS, "run `make report`"


@pytest.mark.parametrize(
    "figure",
    [
        "| q_sample bf16 | ",
        "| step/fp32/batch1/plain | eager | ",
        "| one sampling step | ",
        "| peers/ddpm10/guided/batch32 | ",
        "| a renamed local | ",
    ],
)
def test_a_changed_figure_is_noticed(figure):
    (path,) = (path for path, text in TEXTS.items() if figure in text)
    changed = TEXTS | {path: TEXTS[path].replace(figure, f"{figure}1")}
    assert report.filled(changed) == TEXTS


def test_a_block_is_filled_wherever_it_stands(tmp_path):
    one, two = tmp_path / "README.md", tmp_path / "docs.md"
    head, tail = ALL.split("<!-- peers -->")
    found = report.filled({one: f"before\n{head}", two: f"<!-- peers -->{tail}\nafter\n"})
    assert found[one].startswith("before\n<!-- summary -->\n\n| one sampling step |")
    assert found[two].startswith("<!-- peers -->\n\n`ddpm-bench ")
    assert found[two].endswith("<!-- /export-speed -->\nafter\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALL.replace("peers -->", "peer -->"), "has the mark 'peer', needs one of summary, kernels"),
        (ALL.replace("<!-- /peers -->", ""), "'peers' needs <!-- peers --> and <!-- /peers --> in this order"),
        (ALL.replace("/kernels", "bench"), "'kernels' needs"),
        ("", "have no block bench, clients, export-parity"),
    ],
)
def test_a_wrong_or_missing_block_is_one_line(text, words, monkeypatch, capsys):
    monkeypatch.setattr(report, "documents", lambda: {README: text})
    assert main(["report"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_record_without_parity_gives_no_figures(tmp_path, content, monkeypatch):
    made = content({"kernels/a/fp32/1e5": 1.0})
    made["records"][3] |= {"parity": False, "error": 1.0, "tolerance": 1e-4}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made))
    monkeypatch.setattr(report, "RUN", path)
    with pytest.raises(WorkFailed, match=r"run\.json: no figures for kernels/a/fp32/1e5 operator"):
        report.BLOCKS["bench"]()


# Those that may not be made yet.
PROOFS = {"planted": report.PLANTED, "reliability": report.RELIABILITY}


@pytest.mark.parametrize("name", [name for name in report.BLOCKS if name not in PROOFS or PROOFS[name].exists()])
def test_records_that_are_stored_can_still_be_read(name):
    """Of the machine that the documents show; some were written by commands that are gone."""
    assert len(report.BLOCKS[name]().splitlines()) > 3
