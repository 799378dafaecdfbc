"""By what code a record was made: a test says that it is too old when that code is another one."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path


def code_digest(paths: Iterable[Path]) -> str:
    """Of the code of these files, without comments and docstrings."""
    texts = [re.sub(r'""".*?"""', "", path.read_text(), flags=re.S) for path in paths]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    code = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]
