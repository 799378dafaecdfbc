"""The Hugging Face distribution `kernels` beside ours is refused by name, not silently mixed up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__file__).parents[1]


def import_beside(folder, distribution, module="kernels"):
    """Import our module in a fresh process that also sees an installed distribution of this name, 0.9.0."""
    metadata = folder / f"{distribution}-0.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.9.0\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", f"import {module}"], env=environment, cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["kernels", "ddpm"])
def test_the_clash_is_an_import_error_that_names_it(tmp_path, module):
    result = import_beside(tmp_path, "kernels", module)
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: ")
    assert "'kernels' 0.9.0" in error
    assert "fused-ddpm" in error


def test_other_distributions_do_not_matter(tmp_path):
    assert import_beside(tmp_path, "kernels_of_somebody").returncode == 0
