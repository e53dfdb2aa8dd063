"""The sources of the documentation site: `docs/site/stage.py` copies the documents, their links and the navigation."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def staging() -> Iterator[ModuleType]:
    """The script."""
    with pytest.MonkeyPatch.context() as patch:
        yield script(ROOT / "docs" / "site" / "stage.py", patch)


@pytest.fixture
def repository() -> Path:
    """A repository with an index of two groups, a page that no row names, and files that pages link to."""
    files = {
        "README.md": "# x\n\n[docs/b.md](docs/b.md), ![p](docs/p.png)\n",
        "NEWS.md": "# News\n",
        "docs/README.md": "# Index\n\n[README](../README.md)\n\n| I want to | page |\n|---|---|\n| **First** | |\n"
        "| b | [b.md](b.md) |\n| a | [a.md](a.md#part), again [b.md](b.md) |\n| **Second** | |\n| c | [c.md](c.md) |\n",
        "docs/a.md": "# A\n\n## Part\n\n[x.sh](../more/x.sh), `[no](none.sh)`\n\n    [no](none.sh)\n",
        "docs/b.md": "# B\n\n```\n[no](none.sh)\n```\n\n[the card](../more/card.md), [site](https://example.org/a.md)\n",
        "docs/c.md": "# C\n",
        "docs/p.png": "p",
        "more/card.md": "# Card\n\n![q](q.png)\n",
        "more/q.png": "q",
        "more/x.sh": "x",
        "more/other.md": "# Other\n",
    }
    root = Path("repository").absolute()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_documents_and_what_they_link_to_are_staged(staging: ModuleType, repository: Path) -> None:
    out = Path("out")
    (out / "left").mkdir(parents=True)
    (out / "index.md").touch()  # of an earlier build
    staging.stage(repository, out)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        *("index.md", "NEWS.md", "api.md", "docs/README.md", "docs/a.md", "docs/b.md", "docs/c.md", "docs/p.png"),
        *("more/card.md", "more/q.png", "more/x.sh"),
    }
    assert not (out / "left").exists()


def test_links_show_titles_and_lead_to_the_first_page(staging: ModuleType, repository: Path) -> None:
    staging.stage(repository, Path("out"))
    index = Path("out/docs/README.md").read_text(encoding="utf-8")
    assert "[README](../index.md)" in index and "[](a.md#part), again [](b.md)" in index
    assert Path("out/index.md").read_text(encoding="utf-8").startswith("# x\n\n[](docs/b.md), ![p](docs/p.png)\n")
    kept = Path("out/docs/b.md").read_text(encoding="utf-8")
    assert "[the card](../more/card.md)" in kept and "[site](https://example.org/a.md)" in kept


def test_the_navigation_has_the_groups_of_the_index(staging: ModuleType, repository: Path) -> None:
    """In the order of its rows; a page is listed once, and one that no row names stands in the last group."""
    groups = staging.site(repository).groups
    assert {title: [page.as_posix() for page in pages] for title, pages in groups.items()} == {
        "First": ["docs/b.md", "docs/a.md"],
        "Second": ["docs/c.md"],
        staging.REFERENCE: ["api.md"],
        staging.PROJECT: ["NEWS.md", "more/card.md"],
    }
    staging.stage(repository, Path("out"))
    first = Path("out/index.md").read_text(encoding="utf-8")
    assert ":caption: First\n\ndocs/b\ndocs/a\n```" in first and first.count("docs/README\n") == 1


def test_a_link_that_leaves_the_repository_is_an_error(staging: ModuleType, repository: Path) -> None:
    (repository / "docs" / "c.md").write_text("[x](../../../etc/passwd)\n", encoding="utf-8")
    with pytest.raises(ValueError, match="outside of the repository"):
        staging.stage(repository, Path("out"))


def test_a_directory_of_something_else_is_kept(staging: ModuleType, repository: Path) -> None:
    with pytest.raises(FileExistsError, match="not replaced"):
        staging.stage(repository, repository)
    assert (repository / "README.md").is_file()


def test_every_group_of_the_index_has_pages(staging: ModuleType) -> None:
    """The index of this repository is read as a navigation: a change of its form would leave every page in the last group."""
    groups = staging.site(ROOT).groups
    assert len(groups) >= 7 and all(groups.values())
    assert {page.as_posix() for page in groups[staging.PROJECT]} >= {"CHANGELOG.md"}
    assert not [page for page in groups[staging.PROJECT] if page.parent.name == "docs"]
