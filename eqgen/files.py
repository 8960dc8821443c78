"""Files that are either the old one or the new one, never half of either."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


DEEPEST = 100
"""Objects and lists within one another in JSON that is read."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` when the block ends well and vanishes when not.

    The file is synced to disk before it is renamed, so a crash leaves the old file or the new one.

    **Arguments:**

    - `path`: the file to write; its folder is made if need be. The temporary name keeps the suffix, by which
        many writers choose their format.

    **Raises:** `OSError` that names `path`, also where the system's own names nothing, as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync(path.parent)


def leftovers(path: str | Path) -> list[Path]:
    """The temporary files of `path` that processes left which were killed while they wrote it.

    Those of a process that is writing it now are among them: ask only where nobody can be.
    """
    path = Path(path)
    return sorted(path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"))


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that may be anyone's.

    **Raises:** `ValueError`, also for bytes that are no text, text that could not be written again, and for what is
    nested without end.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
        if not level:
            break
    else:
        raise ValueError("it is nested too deeply")
    if b"\\ud" in (text.encode() if isinstance(text, str) else text).lower():
        json.dumps(value, ensure_ascii=False).encode()  # half of a pair of characters
    return value


def is_number(value: Any) -> bool:
    """Whether what a JSON text held is a finite number that a float can hold."""
    return type(value) in (int, float) and -1e308 < value < 1e308


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
