"""Keep the links of the notebooks: the one before and after, the index, equations, and names that live elsewhere.

    python docs/links.py            write them
    python docs/links.py --check    say which notebooks lack some, and which links lead nowhere

Only markdown cells change. A notebook's title and its sentence stay, for they become the module's docstring.
A name is linked once in a notebook, where it is first mentioned, and only if it cannot be mistaken for a word.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOOTER = "nav-footer"
# what must stay as it is: fenced code, links and pictures, inline code, formulas, tags
PIECES = re.compile(r"(```.*?```|!?\[[^\]]*\]\([^)]*\)|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|<[^>\n]+>)", re.S)
EQUATIONS = re.compile(r"\b(Eqs?\. )(\d{1,2})((?:(?:, | and |-|–| to )\d{1,2})*)(?!\d|\.\d)")
LIBRARY_NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\))?`")
NOTEBOOK_NAME = re.compile(r"`(\d\d_[\w.]+)`")


def read(path):
    """The cells of a notebook with the whole of it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook, notebook["cells"]


def source(cell):
    """The text of a cell."""
    return "".join(cell["source"])


def groups(root):
    """Notebooks in reading order, by kind."""
    nbs = root / "nbs"
    return [
        sorted(nbs.glob("[0-9][0-9]_*.ipynb")),
        sorted((nbs / "guides").glob("*.ipynb")),
        sorted((nbs / "pipeline").glob("*.ipynb")),
    ]


def relative(target, path, root):
    """How a notebook writes the path of another."""
    nbs = root / "nbs"
    up = "../" * len(path.parent.relative_to(nbs).parts)
    if target.parent == path.parent:
        return target.name
    return up + str(target.relative_to(nbs))


def footer(path, before, after, root):
    """The line at a notebook's end."""
    parts = []
    if before:
        parts.append(f"← [{before.stem}]({relative(before, path, root)})")
    parts.append(f"[index]({relative(root / 'nbs' / 'index.ipynb', path, root)})")
    if after:
        parts.append(f"[{after.stem}]({relative(after, path, root)}) →")
    return " · ".join(parts)


def anchors(root):
    """The notebook of each equation's anchor."""
    found = {}
    for path in groups(root)[0]:
        for number in re.findall(r'<a id="eq-(\d+)"></a>', "".join(map(source, read(path)[1]))):
            found[int(number)] = path
    return found


def is_name(name):
    """Whether a public name cannot be mistaken for an English word."""
    return "_" in name.strip("_") or bool(re.match(r"[A-Z]\w*[a-z]\w*[A-Z]", name)) or name.isupper() and len(name) > 4


def homes(root):
    """The notebook of each public name that lives in exactly one."""
    found = {}
    for path in groups(root)[0]:
        module = root / "fields" / (path.stem[3:].replace(".", "/") + ".py")
        if not module.exists():
            continue
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            is_all = isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets)
            names = ast.literal_eval(node.value) if is_all else []
            for name in names:
                found.setdefault(name, []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


def link_equations(text, path, places, root):
    """Link each number behind "Eq." or "Eqs."."""

    def one(number):
        target = places.get(int(number))
        if not target:
            return number
        page = "" if target == path else relative(target, path, root)
        return f"[{number}]({page}#eq-{number})"

    def whole(found):
        if found[1] == "Eq. " and not found[3]:
            linked = one(found[2])
            return linked.replace(f"[{found[2]}]", f"[Eq. {found[2]}]", 1) if "](" in linked else found[0]
        return found[1] + one(found[2]) + re.sub(r"\d+", lambda number: one(number[0]), found[3])

    return EQUATIONS.sub(whole, text)


def link_name(piece, path, names, stems, seen, root):
    """Link an inline piece of code where it names something of another notebook, the first time."""
    found = NOTEBOOK_NAME.fullmatch(piece)
    target = stems.get(found[1]) if found else None
    if not target:
        found = LIBRARY_NAME.fullmatch(piece)
        name = found[1].split(".")[-1] if found else ""
        target = names.get(name) if found and is_name(name) else None
    if not target or target == path or piece in seen:
        return piece
    seen.add(piece)
    return f"[{piece}]({relative(target, path, root)})"


def linked(text, path, places, names, stems, seen, root):
    """The text of a markdown cell with its links."""
    pieces = PIECES.split(text)
    for n, piece in enumerate(pieces):
        if n % 2 == 0:
            pieces[n] = link_equations(piece, path, places, root)
        elif piece.startswith("`") and not piece.startswith("```"):
            pieces[n] = link_name(piece, path, names, stems, seen, root)
        elif piece.startswith("[`"):
            # a name that is linked already counts as mentioned
            seen.add(re.match(r"\[(`[^`]+`)?", piece)[1])
    return "".join(pieces)


def targets(notebooks, root):
    """What can be linked to: equations, names, notebooks by their stem."""
    stems = {path.stem: path for group in notebooks for path in group}
    return anchors(root), homes(root), stems


def with_links(path, before, after, known, root):
    """A notebook with all its links, and whether anything changed."""
    notebook, cells = read(path)
    places, names, stems = known
    old = [source(cell) for cell in cells]
    seen = set()
    for n, cell in enumerate(cells):
        if cell["cell_type"] == "markdown" and cell.get("id") != FOOTER:
            # title and sentence of the first cell become the module's docstring
            head, quote, rest = ("", "", source(cell)) if n else source(cell).partition("\n\n> ")
            sentence, newline, rest = ("", "", rest) if n else rest.partition("\n")
            text = head + quote + sentence + newline + linked(rest, path, places, names, stems, seen, root)
            if text != source(cell):
                cell["source"] = text.splitlines(keepends=True)
    line = footer(path, before, after, root)
    last = next((cell for cell in cells if cell.get("id") == FOOTER), None)
    if last is None:
        last = {"cell_type": "markdown", "id": FOOTER, "metadata": {}, "source": []}
    else:
        cells.remove(last)
    last["source"] = [line]
    # the exporter's own last cell, where there is one, stays last
    at = len(cells) - 1 if cells and "nbdev_export()" in source(cells[-1]) else len(cells)
    cells.insert(at, last)
    return notebook, [source(cell) for cell in cells] != old


def neighbours(group):
    """Each notebook with the one before and the one after."""
    around = [None, *group, None]
    return zip(group, around, around[2:], strict=False)


def broken(root):
    """Links between notebooks that lead to no file or to no anchor."""
    found = []
    everything = [path for group in groups(root) for path in group] + [root / "nbs" / "index.ipynb"]
    texts = {path: "\n".join(map(source, read(path)[1])) for path in everything}
    for path in everything:
        written = "\n".join(source(cell) for cell in read(path)[1] if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([^)\s]*)\)", written):
            if re.match(r"https?:|data:|attachment:", link) or not link:
                continue
            page, _, anchor = link.partition("#")
            target = (path.parent / page).resolve() if page else path
            if not target.exists():
                found.append(f"{path.name}: {link} leads to no file")
            elif anchor.startswith("eq-") and f'<a id="{anchor}"></a>' not in texts.get(target, ""):
                found.append(f"{path.name}: {link} leads to no equation")
    return found


def main(root=ROOT, check=False):
    """Write the links, or with `check` list what is missing; return the list of notebooks that changed."""
    notebooks = groups(root)
    known = targets(notebooks, root)
    changed = []
    for group in notebooks:
        for path, before, after in neighbours(group):
            notebook, different = with_links(path, before, after, known, root)
            if different:
                changed.append(path)
                if not check:
                    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
                    path.write_text(text, encoding="utf-8")
    return changed


if __name__ == "__main__":
    only = "--check" in sys.argv
    for notebook in main(check=only):
        print(f"{notebook.relative_to(ROOT)}: links {'are missing' if only else 'written'}")
    lines = broken(ROOT)
    print("\n".join(lines) or "every link between notebooks resolves")
    sys.exit(bool(lines))
