"""Links of the manual lead somewhere: relative files are there, and anchors are headings of them."""

import re
from pathlib import Path

import pytest

import mpq_plugins
from tests.docs.pages import INCLUDED, MANUAL, PAGES, README, ROOT, name_of, prose

LINK = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
BESIDE = re.compile(r'href="([^"]+)"')
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
DOCUMENTED = re.compile(r"^::: mpq_plugins\.(\w+)$", re.MULTILINE)
SAID = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As mkdocs and GitHub make them of headings: lower case, words joined by hyphens, no other signs."""
    found = set()
    for heading in HEADING.findall(prose(page)):
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}: {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_includes_is_linked_for_who_reads_it_where_it_is_kept(page: Path) -> None:
    linked = {(page.parent / target).resolve() for target in BESIDE.findall(prose(page))}
    assert linked == {ROOT / name for name in INCLUDED.findall(page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_one_title(page: Path) -> None:
    assert len(re.findall(r"^# ", prose(page), re.MULTILINE)) == 1


def test_every_page_is_in_the_sites_navigation() -> None:
    named = re.findall(r"[\w/-]+\.md", (ROOT / ".mkdocs.yml").read_text())
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in MANUAL)


def test_the_python_reference_has_every_public_name_once() -> None:
    named = DOCUMENTED.findall((ROOT / "docs/reference/api.md").read_text())
    assert sorted(named) == sorted(mpq_plugins.__all__)


def test_errors_that_the_manual_explains_are_errors_that_are_raised() -> None:
    code = "\n".join(path.read_text() for name in ("mpq_plugins", "adapters") for path in (ROOT / name).rglob("*.py"))
    said = SAID.findall((ROOT / "docs/troubleshooting.md").read_text())
    assert len(said) > 40
    assert [text for text in said if text not in code] == []


def test_the_readme_is_the_way_in_and_no_longer() -> None:
    assert len(README.read_text().splitlines()) <= 200
