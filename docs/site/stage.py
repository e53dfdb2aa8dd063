"""Copies the documents to the source directory of the site: `python docs/site/stage.py OUT`.

The documents stay plain files that read well in the repository. The copies differ in three points. README.md becomes the first
page and ends with the navigation, which has the groups and the order of the table in docs/README.md. Links whose text is a file
name show the title of their target. The files that documents link to lie beside them for download.
"""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INDEX = Path("docs/README.md")
FIRST, PROJECT, REFERENCE = "index.md", "Project", "Look something up"
# Pages that exist only on the site, and the group that lists each.
OWN = {"api.md": REFERENCE}
_CODE = re.compile(r"^```[\s\S]*?^```$|^ {4}.*$|`[^`\n]*`", flags=re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
# A link that shows the name of a page. MyST shows the title in place of an empty text.
_NAMED = re.compile(r"\[[\w./-]+\.md\](?=\([^)\s]+\.md(?:#[^)\s]*)?\))")


@dataclass(frozen=True)
class Site:
    """The files of the site, relative to the root of the repository.

    Attributes:
        pages: The documents.
        files: What they link to: pictures, and files to download.
        groups: The titles of the navigation with their pages, in order.
    """

    pages: list[Path]
    files: list[Path]
    groups: dict[str, list[Path]]


def links(root: Path, page: Path) -> list[Path]:
    """Returns the files of the repository that a page links to, relative to the root."""
    text = _CODE.sub("", (root / page).read_text(encoding="utf-8"))
    names = [match[1] for match in _LINK.finditer(text) if not re.match(r"[a-z]+:", match[1])]
    # Not resolved: a checkout may be reached through a link.
    targets = [Path(*_normal((page.parent / name).parts)) for name in names]
    return [target for target in dict.fromkeys(targets) if (root / target).is_file()]


def _normal(parts: tuple[str, ...]) -> list[str]:
    """Returns the parts of a path without `..`; raises ValueError if it leaves the repository."""
    found: list[str] = []
    for part in parts:
        if part != "..":
            found.append(part)
        elif found:
            found.pop()
        else:
            raise ValueError(f"{'/'.join(parts)} is outside of the repository")
    return found


def groups(root: Path, pages: list[Path]) -> dict[str, list[Path]]:
    """Returns the navigation: the rows of the index below each bold row, then the pages that no row names."""
    found: dict[str, list[Path]] = {}
    listed: set[Path] = {Path("README.md"), INDEX}
    group = ""
    for line in (root / INDEX).read_text(encoding="utf-8").splitlines():
        if title := re.match(r"\| \*\*(.+?)\*\* \|", line):
            group = title[1]
        elif group and line.startswith("|"):
            for name, _ in _LINK.findall(line):
                page = Path(*_normal((INDEX.parent / name).parts))
                if page in pages and page not in listed:
                    listed.add(page)
                    found.setdefault(group, []).append(page)
    for name, title in OWN.items():
        found.setdefault(title, []).append(Path(name))
    found[PROJECT] = [*found.get(PROJECT, []), *(page for page in pages if page not in listed)]
    return found


def site(root: Path) -> Site:
    """Returns what belongs to the site: the documents, what they link to, and the navigation."""
    pages = [path.relative_to(root) for path in sorted((*root.glob("*.md"), *(root / "docs").glob("*.md")))]
    files: list[Path] = []
    for page in pages:  # which grows: a page elsewhere is part of the site where one of these links to it
        for target in links(root, page):
            known = pages if target.suffix == ".md" else files
            if target not in known:
                known.append(target)
    return Site(pages, files, groups(root, pages))


def navigation(found: Site) -> str:
    """Returns the hidden lists of pages that the first page ends with."""
    lists = []
    for title, pages in {"Start": [INDEX], **found.groups}.items():
        names = "\n".join(page.as_posix().removesuffix(".md") for page in pages)
        lists.append(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```\n")
    return "\n" + "\n".join(lists)


def stage(root: Path, out: Path) -> None:
    """Writes the source directory of the site.

    Args:
        root: The root of the repository.
        out: The directory; an earlier one is replaced.

    Raises:
        FileExistsError: If something else is there.
        ValueError: If a link leaves the repository.
    """
    found = site(root)
    if out.exists() and not (out / FIRST).is_file():
        raise FileExistsError(f"{out} is not a site's source directory; it is not replaced")
    shutil.rmtree(out, ignore_errors=True)
    for page in found.pages:
        text = (root / page).read_text(encoding="utf-8")
        name = Path(FIRST) if page == Path("README.md") else page
        up = "../" * (len(page.parts) - 1)
        text = text if page == Path("README.md") else text.replace(f"]({up}README.md", f"]({up}{FIRST}")
        text = _NAMED.sub("[]", text)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text + (navigation(found) if name == Path(FIRST) else ""), encoding="utf-8")
    for file in found.files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, out / file)
    for own in OWN:
        shutil.copyfile(Path(__file__).parent / own, out / own)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/site/stage.py OUT")
    try:
        stage(ROOT, Path(sys.argv[1]))
    except (FileExistsError, ValueError) as error:
        sys.exit(f"error: {error}")
