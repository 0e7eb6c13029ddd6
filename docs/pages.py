"""Pages of the site that are made and not written: public names, gallery, measured figures."""

import ast
import base64
import json
import re
from pathlib import Path

import yaml

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules(root):
    """Files of the library, without the exporter's index."""
    kept = [path for path in (root / "fields").rglob("*.py") if not path.name.startswith("_")]
    return sorted(kept)


def dotted(path, root):
    """`fields.head.flame` of a file."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def module_names(root):
    """Dotted names of all modules, in alphabetical order."""
    return [dotted(path, root) for path in modules(root)]


def notebook_of(name, root):
    """The notebook that a module is exported from, or None."""
    found = sorted((root / "nbs").glob(f"[0-9][0-9]_{name.removeprefix('fields.')}.ipynb"))
    return found[0] if found else None


def title_of(notebook):
    """Title and sentence of a notebook."""
    text = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, _, sentence = text.partition("\n\n> ")
    return title.removeprefix("# ").strip(), sentence.split("\n")[0]


# public names


def signature(node, lines):
    """The source of a definition up to its body, comments of the parameters included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = lines[first - 1 : node.body[0].lineno - 1] or [lines[node.lineno - 1]]
    return "\n".join(text).rstrip()


def fields_of(node, lines):
    """The annotated fields of a class, as they stand."""
    kept = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    return "\n".join(line for child in kept for line in lines[child.lineno - 1 : child.end_lineno])


def describe(node, lines, level):
    """Markdown about one function or class."""
    kind = "class " if isinstance(node, ast.ClassDef) else ""
    text = [f"{'#' * level} {kind}`{node.name}`", ast.get_docstring(node) or "", "```python", signature(node, lines)]
    if isinstance(node, ast.ClassDef):
        inside = fields_of(node, lines)
        text += [inside] if inside else []
        text.append("```")
        methods = [child for child in node.body if isinstance(child, FUNCTIONS) and not child.name.startswith("_")]
        for method in methods:
            text.append(describe(method, lines, level + 1))
    else:
        text.append("```")
    return "\n\n".join(part for part in ("\n".join(text[:1]), text[1], "\n".join(text[2:])) if part)


def module_page(path, root):
    """Markdown about the public names of a module."""
    name = dotted(path, root)
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    notebook = notebook_of(name, root)
    text = [f"# {name}"]
    if notebook:
        title, sentence = title_of(notebook)
        text += [sentence, f"Explained and tested in [{title}](../{notebook.name})."]
    kinds = (*FUNCTIONS, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_") and not is_patch(node):
            text.append(describe(node, lines, 2))
    patched = [node for node in tree.body if isinstance(node, FUNCTIONS) and is_patch(node)]
    for node in patched:
        text.append(describe(node, lines, 2))
    return "\n\n".join(text) + "\n"


def is_patch(node):
    """Whether a function is put on a class by fastcore's `@patch`."""
    decorators = getattr(node, "decorator_list", [])
    return any("patch" in ast.dump(decorator) for decorator in decorators)


def write_api(root, folder):
    """Write a page for each module, and one that lists them by folder."""
    folder.mkdir(parents=True)
    index = [
        "# Public names",
        "Each page lists a module's functions and classes; the notebook beside it explains them.",
    ]
    last = None
    for path in modules(root):
        name = dotted(path, root)
        (folder / f"{name}.md").write_text(module_page(path, root), encoding="utf-8")
        group = ".".join(name.split(".")[:-1])
        if group != last:
            index.append(f"\n## {group}\n")
            last = group
        notebook = notebook_of(name, root)
        index.append(f"- [{name}]({name}.md)" + (f": {title_of(notebook)[1]}" if notebook else ""))
    (folder / "index.md").write_text("\n".join(index) + "\n", encoding="utf-8")


# the gallery


def first_pictures(notebook, most=1):
    """The first pictures among a notebook's outputs, as (suffix, bytes)."""
    found = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind, suffix in (("image/jpeg", "jpg"), ("image/png", "png")):
                if kind in data:
                    found.append((suffix, base64.b64decode("".join(data[kind]))))
                    break
    # the largest says most; a colour bar says little
    return sorted(found, key=lambda item: -len(item[1]))[:most]


def write_gallery(notebooks, nbs, source):
    """Write a page of pictures, each leading to its notebook."""
    folder = source / "_static" / "gallery"
    folder.mkdir(parents=True)
    text = ["# Gallery", "One picture of each notebook that shows some; each leads to the place where it is made."]
    for heading, group in (("Guides", "guides"), ("Components", "components")):
        text += [f"## {heading}", '<div class="gallery">']
        for path in notebooks[group]:
            for suffix, data in first_pictures(path):
                name = f"{path.stem}.{suffix}"
                (folder / name).write_bytes(data)
                title, sentence = title_of(path)
                page = str(path.relative_to(nbs).with_suffix(".html"))
                picture = f'<img src="_static/gallery/{name}" alt="{title}" loading="lazy">'
                caption = f"<figcaption><b>{title}</b>. {plain(sentence)}</figcaption>"
                text.append(f'<figure><a href="{page}">{picture}</a>{caption}</figure>')
        text.append("</div>\n")
    (source / "gallery.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def plain(text):
    """A sentence of markdown as plain HTML text."""
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "")


# measured figures


def lookup(values, place):
    """The value at a path of keys, written `a / b / c`."""
    for key in place.split(" / "):
        values = values[int(key)] if isinstance(values, list) else values[key]
    return values


def known_figures(root):
    """The figures that may be quoted, each with its file's date and commit, and those that are out of date."""
    outdated = yaml.safe_load((root / "evidence" / "OUTDATED.yaml").read_text(encoding="utf-8")) or {}
    groups = yaml.safe_load((root / "docs" / "figures.yaml").read_text(encoding="utf-8"))
    current, older = [], {}
    for group in groups:
        name = group["file"]
        path = root / "evidence" / name
        if name in outdated or not path.is_file():
            older[name] = outdated.get(name, "it is not there")
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        for entry in group["figures"]:
            found = [lookup(values, place) for place in entry["at"]]
            text = entry["say"].format(*found)
            current.append((group["title"], text, entry.get("peer", ""), name, values["date"], values["commit"]))
    unquoted = {name: why for name, why in outdated.items() if name not in older}
    return current, older | unquoted


def write_figures(root, target):
    """Write the page of measured figures, peers' beside ours, dated and linked to the files."""
    current, older = known_figures(root)
    text = [
        "# Measured figures",
        "Each line names the file that it was read from, with its date and commit. "
        "A file that was measured on an older head or older code is not quoted; such files stand at the end.",
    ]
    last = None
    for title, sentence, peer, name, date, commit in current:
        if title != last:
            text += ["", f"## {title}", "", "| measured | beside it | file | date | commit |", "|---|---|---|---|---|"]
            last = title
        link = f'<a href="_static/evidence/{name}">{name}</a>'
        text.append(f"| {sentence} | {peer} | {link} | {date} | {commit[:9]} |")
    text += ["", "## Out of date, not quoted", "", "| file | why |", "|---|---|"]
    text += [f"| {name} | {str(why).replace(chr(10), ' ')} |" for name, why in sorted(older.items())]
    Path(target).write_text("\n".join(text) + "\n", encoding="utf-8")


def readme_lines(root, most=10):
    """The lines of results in README: the first figures that stand."""
    current, older = known_figures(root)
    kept = [f"- {text} (`evidence/{name}`, {date})" for _, text, _, name, date, _ in current][:most]
    if older:
        kept.append(f"- {len(older)} older files are not quoted; `evidence/OUTDATED.yaml` says why.")
    return kept


RESULTS = re.compile(r"(<!-- results:[^>]*-->\n).*?(<!-- end of results -->)", re.S)


def readme_with_results(root):
    """README's text with the block of results as the evidence says it today."""
    text = (root / "README.md").read_text(encoding="utf-8")
    lines = "".join(f"{line}\n" for line in readme_lines(root))
    return RESULTS.sub(lambda found: found[1] + lines + found[2], text)
