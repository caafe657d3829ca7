# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content``, a text in UTF-8, to ``path`` in one move: a kill leaves the file that was there before.

    Raises: OSError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
