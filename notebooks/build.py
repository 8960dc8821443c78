"""Executes the sources in `notebooks/src`, writes the notebooks here: `python notebooks/build.py [01 ...]`.

A notebook depends on nothing but its source and its outputs: no time stamps, no random cell ids, no interpreter
version, and of a figure with sliders the picture alone, since a widget is nothing without the kernel that made it.
So a rebuild which changes nothing gives no diff. What does differ from build to build, the time that it took and
on what, goes to `index.json`, the tagged picture of each notebook to `thumbnails/`, and both into the table of
`README.md`. `python notebooks/build.py --index` makes the last two anew from what is there.
"""

import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from eqgen.files import replacing, write_json
from eqgen.provenance import provenance


HERE = Path(__file__).resolve().parent
THUMBNAIL = (300, 240)  # the largest width and height
BEGIN, END = "<!-- begin: made by build.py -->\n", "<!-- end -->\n"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def build(source: Path) -> Path:
    """Executes one source; a cell that raises stops it and leaves the committed notebook as it was."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
    options = {"record_timing": False, "store_widget_state": False}
    resources = {"metadata": {"path": str(HERE)}}
    before = os.times()
    NotebookClient(notebook, timeout=900, **options, resources=resources).execute()
    after = os.times()  # the kernel has ended, and been waited for, so that it counts among the children
    seconds = sum(
        getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system")
    )
    notebook.metadata.language_info.pop("version", None)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop(WIDGET, None)
    shrink_pictures(notebook)

    target = HERE / f"{source.stem}.ipynb"
    with replacing(target) as temporary:
        nbformat.write(notebook, temporary)
    record(source.stem, seconds)
    return target


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Stores every PNG in 256 colours, which a plot does not miss: a third of the size."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                small = png(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
                output["data"]["image/png"] = base64.b64encode(small).decode()


def png(image: Image.Image, method: int | None = None) -> bytes:
    buffer = io.BytesIO()
    image.quantize(256, method, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def thumbnail(notebook: nbformat.NotebookNode) -> bytes:
    """The picture of the cell tagged `thumbnail`, small."""
    pictures = [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "thumbnail" in cell.metadata.get("tags", []) and "image/png" in output.get("data", {})
    ]
    (picture,) = pictures
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    return png(image, Image.Quantize.FASTOCTREE)  # which keeps the colours of thin lines


def record(name: str, seconds: float) -> None:
    """Enters what an execution took, and on what."""
    made_on = provenance()
    entry = {"cpu_seconds": float(f"{seconds:.2g}")}
    entry |= {key: made_on[key] for key in ("cpu", "cores", "backend", "python")}
    entry |= {"jax": made_on["packages"]["jax"]}
    if hasattr(os, "getloadavg"):
        entry["load"] = round(os.getloadavg()[2], 1)  # the mean over the last 15 minutes, this build included
    entries = measured() | {name: entry}
    write_json(HERE / "index.json", dict(sorted(entries.items())))


def measured() -> dict[str, dict]:
    """Name of a notebook -> what its last build took, and on what."""
    path = HERE / "index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def described(source: Path) -> tuple[str, str, str]:
    """The title of a notebook, the first sentence about it, and what it needs: all of the opening cell."""
    opening = jupytext.read(source).cells[0].source
    title, sentence = re.match(r"# ([^\n]+)\n\n(.+?\.)\s", opening, flags=re.DOTALL).groups()
    (needs,) = re.findall(r"^\*\*Needs\*\* (.+)\.$", opening, flags=re.MULTILINE)
    return title, " ".join(sentence.split()), needs


def index() -> str:
    """The table of all notebooks, and on what the times in it were measured."""
    rows = ["| | notebook | CPU time | needs |", "|---|---|---|---|"]
    entries, circumstances = measured(), {}
    for source in sorted((HERE / "src").glob("*.py")):
        name, (title, sentence, needs) = source.stem, described(source)
        number, entry = name.split("_")[0], entries.get(name, {})
        time = f"{entry['cpu_seconds']:.0f} s" if entry else "not measured"
        picture = f'<img src="thumbnails/{name}.png" alt="">'
        rows.append(f"| {picture} | {number} [{title}]({name}.ipynb). {sentence} | {time} | {needs} |")
        if entry:
            machine = "{cores} cores of {cpu}, backend {backend}, Python {python}, JAX {jax}".format(**entry)
            circumstances.setdefault(machine, []).append((number, entry.get("load")))
    lines = [
        "",
        "*CPU time* is what the kernel used at the last build, summed over cores, compilation included: on two idle"
        "\ncores the wait is somewhat shorter, on a busy machine longer. The last builds ran on",
        "",
    ]
    for machine, builds in circumstances.items():
        numbers, loads = zip(*builds)
        known = [load for load in loads if load is not None]
        load = f"; load average up to {max(known):.0f}" if known else ""
        lines.append(f"- {machine}{load} (notebook{'s' * (len(builds) > 1)} {', '.join(numbers)})")
    return "\n".join(rows + lines) + "\n"


def indexed(readme: str) -> str:
    """A README with the table as it should be."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + index() + "\n" + END + rest.split(END)[1]


def write_index() -> None:
    """The thumbnails and the table, from the notebooks and `index.json`."""
    for path in HERE.glob("*.ipynb"):
        with replacing(HERE / "thumbnails" / f"{path.stem}.png") as temporary:
            temporary.write_bytes(thumbnail(nbformat.read(path, as_version=4)))
    readme = HERE / "README.md"
    text = indexed(readme.read_text(encoding="utf-8"))
    with replacing(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    # XLA logs its alarm at a slow compile, which on a busy machine would end up in an output, as an error.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # "python3" has to be this interpreter's kernel, whatever else of that name is installed: see `make lab`.
    os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_PATH": ""}
    arguments = tuple(sys.argv[1:]) or ("",)
    sources = [path for path in sorted((HERE / "src").glob("*.py")) if path.name.startswith(arguments)]
    if not sources and arguments != ("--index",):
        sys.exit(f"No source in notebooks/src begins with {' or '.join(arguments)}.")
    for source in sources:
        target = build(source)
        size = target.stat().st_size / 1000
        print(
            f"{target.name}: {measured()[source.stem]['cpu_seconds']:.0f} s of CPU time, {size:.0f} KB",
            flush=True,
        )
        write_index()
    if not sources:
        write_index()
