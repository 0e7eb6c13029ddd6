"""Build the site: `make docs`, or `python docs/build.py` with the packages of docs/constraints.txt.

The pages are the executed notebooks, the README, a page of the public names of each module, a gallery of the notebooks'
pictures and the measured figures. Nothing is executed. The result lies in _docs/html and reads without a network.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import pages

ROOT = Path(__file__).parents[1]
OUT = ROOT / "_docs"
SOURCE = OUT / "written"
KEPT = OUT / "source"
HTML = OUT / "html"
MATHJAX = "mathjax@3.2.2"
MATHJAX_FILES = ("tex-mml-chtml.js", "output/chtml/fonts")

FLOORS = {
    "0": "00 Ground",
    "1": "10 The head",
    "2": "20 Rendering",
    "3": "30 Data",
    "4": "40 Scans",
    "5": "50 Models",
    "6": "60 Training",
    "7": "70 Evaluation",
    "8": "80 What users call",
    "9": "90 Bench and command line",
}

CONFIG = {
    "title": "FIELDS",
    "author": "The FIELDS authors",
    "logo": "",
    "copyright": "2026",
    "only_build_toc_files": True,
    "execute": {"execute_notebooks": "off"},
    "html": {"use_issues_button": False, "use_repository_button": False, "home_page_in_navbar": True},
    "launch_buttons": {"notebook_interface": "classic", "thebe": False},
    "parse": {"myst_enable_extensions": ["amsmath", "colon_fence", "dollarmath", "html_image", "linkify", "tasklist"]},
    "sphinx": {
        "config": {
            "mathjax_path": "mathjax/tex-mml-chtml.js",
            "html_static_path": ["_static"],
            "suppress_warnings": ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"],
            "nb_merge_streams": True,
            "html_show_copyright": False,
            "myst_linkify_fuzzy_links": False,
        }
    },
}

STYLE = """\
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.2rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; height: 180px; object-fit: contain; background: #fff; border: 1px solid #ddd; }
.bd-article table { display: block; overflow-x: auto; }
.bd-article .cell_output pre, .bd-article pre { overflow-x: auto; }
.bd-article img { max-width: 100%; }
.bd-article { overflow-wrap: anywhere; }
.bd-article mjx-container[display="true"] { overflow-x: auto; overflow-y: hidden; max-width: 100%; }
"""


def is_directive(text):
    """Whether a cell is for the exporter alone and not for a reader."""
    first = text.lstrip().split("\n", 1)[0]
    return bool(re.match(r"#\| *(default_exp|hide)\b", first))


def is_imports(text):
    """Whether an exported cell holds imports alone."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return text.startswith("#| export") and all(re.match(r"(import|from) ", line) for line in lines)


def prose(text, folder):
    """Turn a markdown cell's equation anchors and links into what the site's builder resolves."""
    text = re.sub(r'<a id="(eq-\d+)"></a>', r"(\1)=", text)
    text = re.sub(r"\]\((?:\.\./)?[\w.]+\.ipynb#(eq-\d+)\)", r"](#\1)", text)
    # the site's own first page is called index
    text = re.sub(r"\]\(((?:\.\./)?)index\.ipynb\)", r"](\1contents.ipynb)", text)
    deeper = "../" if folder else ""
    text = re.sub(r"\]\((?:\.\./)+README\.md\)", f"]({deeper}intro.md)", text)
    text = re.sub(r"\]\((?:\.\./)+CONTRIBUTING\.md\)", f"]({deeper}contributing.md)", text)
    return text


def shown_markdown(output):
    """Rewrite the links of an output that is markdown: to the site's pages, and to nothing where there is none."""
    text = "".join(output["data"]["text/markdown"])
    text = prose(text, "")
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|[^)]*\.ipynb)[^)]*\)", r"\1", text)
    return text


def as_prose(cell):
    """A code cell whose output is markdown as a markdown cell; None for any other."""
    outputs = [output for output in cell["outputs"] if "text/markdown" in output.get("data", {})]
    if not outputs:
        return None
    text = "\n\n".join(shown_markdown(output) for output in outputs)
    return {"cell_type": "markdown", "id": cell["id"] + "-shown", "metadata": {}, "source": text}


def write_notebook(path, target):
    """Copy a notebook for the site: directives hidden, anchors and links translated, outputs as committed."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    folder = path.parent.name if path.parent.name != "nbs" else ""
    cells = []
    for cell in notebook["cells"]:
        cells.append(cell)
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = prose(text, folder)
            continue
        if cell["cell_type"] != "code":
            continue
        if is_directive(text):
            cell["metadata"]["tags"] = ["remove-cell"]
        elif is_imports(text):
            cell["metadata"]["tags"] = ["hide-input"]
        cell["source"] = re.sub(r"\A(#\|.*\n)+", "", text)
        written = as_prose(cell)
        cell["outputs"] = [output for output in cell["outputs"] if is_shown(output)]
        for output in cell["outputs"]:
            if "text/html" in output.get("data", {}):
                # a report's links to its own files lead nowhere from here
                html = "".join(output["data"]["text/html"])
                output["data"]["text/html"] = re.sub(r' href="(?!https?:|#)[^"]*"', "", html)
        if written:
            cells.append(written)
            cell["outputs"] = [o for o in cell["outputs"] if "text/markdown" not in o.get("data", {})]
        if path.name == "index.ipynb":
            # the code that lists the notebooks is of no interest; the list is
            cell["metadata"]["tags"] = ["remove-cell"]
    notebook["cells"] = cells
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def is_shown(output):
    """Whether an output can be read on a page without a kernel."""
    kinds = set(output.get("data", {}))
    return not kinds or bool(kinds - {"application/vnd.jupyter.widget-view+json", "application/vnd.plotly.v1+json"})


def write_page(path, target, replace):
    """Copy a markdown page, its links to files of the repository translated."""
    text = path.read_text(encoding="utf-8")
    for old, new in replace.items():
        text = text.replace(f"]({old})", f"]({new})")
    pages_there = "|".join(map(re.escape, replace.values()))
    # a folder or file of the repository that has no page stays a name
    text = re.sub(rf"(?<!!)\[([^\]]+)\]\((?!https?:|#|(?:{pages_there})[)#])[^)]*\)", r"\1", text)
    target.write_text(text, encoding="utf-8")


def contents(notebooks):
    """The sidebar: guides first, then figures and gallery, then the floors, the pipeline and the public names."""

    def chapters(paths):
        return [{"file": str(path.relative_to(ROOT / "nbs").with_suffix(""))} for path in paths]

    by_floor = {}
    for path in notebooks["components"]:
        by_floor.setdefault(path.name[0], []).append(path)
    parts = [
        {"caption": "Guides", "chapters": chapters(notebooks["guides"])},
        {"caption": "Results", "chapters": [{"file": "figures"}, {"file": "gallery"}]},
        *({"caption": FLOORS[floor], "chapters": chapters(paths)} for floor, paths in sorted(by_floor.items())),
        {"caption": "The pipeline", "chapters": chapters(notebooks["pipeline"])},
        {
            "caption": "Reference",
            "chapters": [
                {"file": "contents"},
                {"file": "api/index", "sections": [{"file": f"api/{name}"} for name in pages.module_names(ROOT)]},
                {"file": "contributing"},
                {"file": "components"},
                {"file": "changelog"},
            ],
        },
    ]
    return {"format": "jb-book", "root": "intro", "parts": parts}


def fetch_mathjax():
    """Put MathJax beside the pages, from npm's registry; without npm the equations need a network."""
    target = SOURCE / "_static" / "mathjax"
    kept = OUT / "mathjax"
    if not kept.exists():
        if not shutil.which("npm"):
            print("npm was not found, so equations are drawn by a script from the network; install npm to read offline")
            del CONFIG["sphinx"]["config"]["mathjax_path"]
            return
        folder = OUT / "npm"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", MATHJAX], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        shutil.unpack_archive(next(folder.glob("mathjax-*.tgz")), folder, filter="data")
        for name in MATHJAX_FILES:
            source = folder / "package" / "es5" / name
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, kept / name)
        shutil.rmtree(folder)
    shutil.copytree(kept, target)


def find_notebooks():
    """The notebooks of the site by kind, each in reading order."""
    nbs = ROOT / "nbs"
    return {
        "components": sorted(nbs.glob("[0-9][0-9]_*.ipynb")),
        "guides": sorted((nbs / "guides").glob("*.ipynb")),
        "pipeline": sorted((nbs / "pipeline").glob("*.ipynb")),
    }


def write_sources():
    """Write everything that the book is built from."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / "_static").mkdir(parents=True)
    (SOURCE / "_static" / "house.css").write_text(STYLE, encoding="utf-8")
    fetch_mathjax()
    notebooks = find_notebooks()
    for path in [*notebooks["components"], *notebooks["guides"], *notebooks["pipeline"]]:
        write_notebook(path, SOURCE / path.relative_to(ROOT / "nbs"))
    write_notebook(ROOT / "nbs" / "index.ipynb", SOURCE / "contents.ipynb")
    shutil.copytree(ROOT / "evidence", SOURCE / "evidence")
    shutil.copytree(SOURCE / "evidence", SOURCE / "_static" / "evidence")
    places = {
        "nbs/index.ipynb": "contents.ipynb",
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "docs/components.md": "components.md",
        "components.md": "components.md",
        "docs/figures.md": "figures.md",
    }
    places |= {f"nbs/guides/{path.name}": f"guides/{path.name}" for path in notebooks["guides"]}
    write_page(ROOT / "README.md", SOURCE / "intro.md", places)
    write_page(ROOT / "CONTRIBUTING.md", SOURCE / "contributing.md", places)
    write_page(ROOT / "CHANGELOG.md", SOURCE / "changelog.md", places)
    write_page(ROOT / "docs" / "components.md", SOURCE / "components.md", {"../CONTRIBUTING.md": "contributing.md"})
    pages.write_api(ROOT, SOURCE / "api")
    pages.write_gallery(notebooks, ROOT / "nbs", SOURCE)
    pages.write_figures(ROOT, SOURCE / "figures.md")
    (SOURCE / "_toc.yml").write_text(yaml.safe_dump(contents(notebooks), sort_keys=False), encoding="utf-8")
    (SOURCE / "_config.yml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")


def bring_over(new, kept):
    """Make a folder the same as another, equal files untouched, so that only changed pages are read again."""
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(kept.rglob("*"), reverse=True):
        twin = new / path.relative_to(kept)
        if not twin.exists():
            path.rmdir() if path.is_dir() else path.unlink()
    for path in new.rglob("*"):
        twin = kept / path.relative_to(new)
        if path.is_dir():
            twin.mkdir(parents=True, exist_ok=True)
        elif not twin.exists() or twin.read_bytes() != path.read_bytes():
            shutil.copy2(path, twin)
    shutil.rmtree(new)


def main():
    if "--readme" in sys.argv:
        (ROOT / "README.md").write_text(pages.readme_with_results(ROOT), encoding="utf-8")
        return 0
    write_sources()
    bring_over(SOURCE, KEPT)
    if "--sources" in sys.argv:
        return 0
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        "build",
        "-q",
        "--path-output",
        str(OUT / "book"),
        str(KEPT),
    ]
    # what an earlier build wrote would stay
    shutil.rmtree(OUT / "book" / "_build" / "html", ignore_errors=True)
    done = subprocess.run(command)
    if done.returncode:
        return done.returncode
    shutil.rmtree(HTML, ignore_errors=True)
    shutil.copytree(OUT / "book" / "_build" / "html", HTML)
    import check

    broken = check.broken_links(HTML)
    for line in broken:
        print(line)
    print(f"{HTML / 'index.html'}: {len(list(HTML.rglob('*.html')))} pages, {len(broken)} broken links")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
