"""What mkdocs shows beside this folder: the repository's other pages, its notebooks, and every module of eqgen.

Each file keeps the path that it has in the repository, so that links between pages hold here as they do there;
a page for a module stands where the module does. No module or notebook is listed by hand.
"""

import ast
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter


ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "notebooks/README.md",
    "paper_figures/README.md",
    "eqgen/envs/README.md",
)
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")


def modules() -> list[Path]:
    """Every public module, in alphabetical order."""
    found = (path for path in (ROOT / "eqgen").rglob("*.py") if not path.stem.startswith("_"))
    return sorted(found, key=lambda path: path.relative_to(ROOT).with_suffix("").parts)


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def uri(path: Path) -> str:
    """The page of a file: Markdown is its own, a module or a notebook has one of its name."""
    return path.relative_to(ROOT).with_suffix(".md").as_posix()


# --- What mkdocs calls ---


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, and Markdown as it is read elsewhere."""
    config.markdown_extensions.append(AsElsewhere())
    packages: dict[str, list[dict[str, str]]] = {}
    top = []
    for path in modules():
        entry = {path.stem: uri(path)}
        if (package := path.parent.relative_to(ROOT / "eqgen").as_posix()) == ".":
            top.append(entry)
        else:
            packages.setdefault(package.replace("/", "."), []).append(entry)
    titles = [{title(path): uri(path)} for path in notebooks()]
    config.nav = [
        {"eqgen": "README.md"},
        {"Notebooks": ["notebooks/README.md", *titles]},
        {"Environments": "eqgen/envs/README.md"},
        {"Figures": "paper_figures/README.md"},
        {"Clusters": "docs/clusters.md"},
        {"Contributing": "CONTRIBUTING.md"},
        {"Modules": ["eqgen/index.md", *top, *({name: pages} for name, pages in packages.items())]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages under their paths in the repository, and the files that they show or link to."""
    kept, texts = [], {}
    for file in files:
        if file.src_uri.endswith(".md"):
            texts[f"docs/{file.src_uri}"] = file.content_string
        elif not file.src_uri.endswith(".py"):
            kept.append(file)
    texts |= {name: (ROOT / name).read_text() for name in PAGES}
    texts["paper_figures/README.md"] += gallery()
    for path in notebooks():
        texts[uri(path)], pictures = notebook_page(path)
        kept += [File.generated(config, name, content=content) for name, content in pictures.items()]
    for path in modules():
        name = uri(path).removesuffix(".md").replace("/", ".")
        texts[uri(path)] = f"# {name}\n\n::: {name}\n"
    texts["eqgen/index.md"] = overview()

    linked = set()
    for name, text in texts.items():
        texts[name] = LINK.sub(lambda match, name=name: here(match, name, linked), text)
    kept += [File.generated(config, name, content=text) for name, text in texts.items()]
    made = {file.src_uri for file in kept}
    for path in sorted(linked):
        if path.relative_to(ROOT).as_posix() not in made:
            name = path.relative_to(ROOT).as_posix()
            kept.append(File.generated(config, name, abs_src_path=str(path)))
    return Files(kept)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas of notebooks as MathML, which browsers draw by themselves."""
    if not page.file.src_uri.startswith("notebooks/"):
        return markdown
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):  # what is not code
        block = lambda match: f"\n\n{convert(unmarked(match[1]), display='block')}\n\n"
        parts[i] = re.sub(r"\$\$(.+?)\$\$", block, parts[i], flags=re.DOTALL)
        inline = lambda match: f"<span>{convert(unmarked(match[1]))}</span>"
        parts[i] = re.sub(r"(?<![\\$\w])\$([^$]+?)\$(?!\d)", inline, parts[i])
    return "".join(parts)


def unmarked(formula: str) -> str:
    return " ".join(formula.split())


# --- Pages ---


def here(match: re.Match, page: str, linked: set[Path]) -> str:
    """A link as it is on the site: to the page of a module or notebook; other files are taken along."""
    path = (ROOT / page).parent.joinpath(match[2]).resolve()
    if path in SHOWN:
        return f"{match[1]}{Path(match[2]).with_suffix('.md').as_posix()}{match[3]}"
    if path.suffix != ".md" and path.is_file():
        linked.add(path)
    return match[0]


SHOWN = {*modules(), *notebooks()}


def overview() -> str:
    """All modules with the first line of what they say about themselves."""
    lines = ["# Modules", ""]
    for path in modules():
        about = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
        name = uri(path).removesuffix(".md").replace("/", ".")
        lines.append(f"- [{name}]({uri(path).removeprefix('eqgen/')}): {' '.join(about.split())}")
    return "\n".join(lines) + "\n"


def title(notebook: Path) -> str:
    """Its first heading."""
    cells = nbformat.read(notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^# (.*)$", text, flags=re.MULTILINE)[0]


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their paths."""
    text, resources = MarkdownExporter().from_filename(str(path))
    folder = f"{path.stem}_files"
    pictures = {f"notebooks/{folder}/{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        text = text.replace(f"]({name})", f"]({folder}/{name})")
    return text, pictures


def gallery() -> str:
    """Every figure, by paper."""
    lines = []
    for folder in sorted((ROOT / "paper_figures").iterdir()):
        pictures = sorted(folder.glob("*.png")) if folder.is_dir() else []
        lines += [f"\n## {folder.name.replace('_', ' ').capitalize()}\n"] if pictures else []
        lines += [f"![{path.stem.replace('_', ' ')}]({folder.name}/{path.name})\n" for path in pictures]
    return "\n".join(lines)


class AsElsewhere(Extension):
    """Two things in which Python-Markdown differs from CommonMark, and from how eqgen's docstrings are written."""

    def extendMarkdown(self, md: Markdown) -> None:
        # After fenced code has been taken out of the text (25), before anything else is looked for.
        md.preprocessors.register(_AsElsewhere(md), "as_elsewhere", 20)


class _AsElsewhere(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        result, within = [], False
        for line in lines:
            item = line.startswith("- ")
            if item and result and result[-1].strip() and not within:
                result.append("")  # a list may begin in the line after a paragraph
            within = item or (within and bool(line.strip()))
            result.append(re.sub(r"\] \[(?=[^\]]*\])", r"] \\[", line))  # "[-1, 1] [P]" is no link
        return result
