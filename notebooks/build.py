"""Executes the sources in `notebooks/src`, writes the notebooks here: `python notebooks/build.py [01 ...]`.

What is written depends on nothing but the source and its outputs: no time stamps, no random cell ids, no
interpreter version, so that a rebuild which changes nothing gives no diff.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image


HERE = Path(__file__).resolve().parent
# XLA logs its alarm at a slow compile, which on a busy machine would end up in an output, as an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Stores every PNG in 256 colours, which a plot does not miss: a third of the size."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                small = io.BytesIO()
                image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
                image.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
                output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()


def build(source: Path) -> Path:
    """Executes one source; a cell that raises stops it and leaves the committed notebook as it was."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
    resources = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=900, record_timing=False, resources=resources).execute()
    notebook.metadata.language_info.pop("version", None)
    shrink_pictures(notebook)

    target = HERE / f"{source.stem}.ipynb"
    temporary = target.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, target)
    return target


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:]) or ("",)
    sources = [path for path in sorted((HERE / "src").glob("*.py")) if path.name.startswith(wanted)]
    if not sources:
        sys.exit(f"No source in notebooks/src begins with {' or '.join(wanted)}.")
    for source in sources:
        start = time.perf_counter()
        target = build(source)
        seconds, size = time.perf_counter() - start, target.stat().st_size / 1000
        print(f"{target.name}: {seconds:.0f} s, {size:.0f} KB", flush=True)
