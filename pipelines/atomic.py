"""Small files that exist whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write text (UTF-8, as it is) or bytes under a temporary name, then rename; returns the path."""
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
