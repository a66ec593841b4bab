"""The reference, ``python -m pdoc funcnet``: what is on its pages, and that nothing is amiss."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import funcnet as fn
from funcnet.reference import PAGES, names

pytestmark = pytest.mark.cpu_only

ROOT = Path(fn.__file__).parent.parent
# What a name in single backticks may be, beside a public name: a name of another library.
FOREIGN = ("torch.", "jax.", "optree.")


class Page(HTMLParser):
    """What a page has: ids, links, and the text of its sections, with code that is no link."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links = [], []
        self.documented, self.unlinked, self.emphasized = set(), set(), set()
        self.section = self.inside = None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "section":
            self.section = attributes.get("id", "")
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "div" and attributes.get("class") == "docstring":
            self.documented.add(self.section)
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "code":
            self.unlinked.add((self.section, text))
        if self.inside == "em":
            self.emphasized.add(text)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-W", "error", "-m", "pdoc", "-o", str(folder), "funcnet"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (made.returncode, made.stderr) == (0, "")
    return {
        path.relative_to(folder).as_posix(): Page(path.read_text())
        for path in sorted(folder.rglob("*.html"))
    }


def file_of(page):
    return page.replace(".", "/") + ".html"


def listed(module):
    """The public names of a module: ``import a as a``, or the functions that it defines."""
    path = Path(module.__file__)
    body = ast.parse(path.read_text()).body
    if path.name == "__init__.py":
        imports = (node for node in body if isinstance(node, ast.ImportFrom))
        found = {alias.asname or alias.name for node in imports for alias in node.names}
    else:
        found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("page", PAGES)
def test_each_public_name_is_in_one_family(page):
    shown = names(page)
    assert len(shown) == len(set(shown))
    public = listed(importlib.import_module(page))
    if page in ("funcnet.losses", "funcnet.optimizers"):
        public -= set(names("funcnet")) - {"schedules"}
    assert public - set(shown) == set()


@pytest.mark.parametrize("page", PAGES)
def test_each_public_function_has_an_example(page):
    module = importlib.import_module(page)
    functions = [name for name in names(page) if inspect.isfunction(getattr(module, name))]
    assert [name for name in functions if ">>>" not in (getattr(module, name).__doc__ or "")] == []


def test_there_is_a_page_of_each_module_and_of_no_other(pages):
    assert set(pages) == {"index.html", *map(file_of, PAGES)}


@pytest.mark.parametrize("page", PAGES)
def test_each_name_has_its_section_and_its_text(pages, page):
    made, module = pages[file_of(page)], importlib.import_module(page)
    shown = {name for name in names(page) if not inspect.ismodule(getattr(module, name))}
    assert shown - set(made.ids) == set()
    assert shown - made.documented == set()


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_something(pages, page):
    here = Path(file_of(page))
    for link in pages[file_of(page)].links:
        if link.startswith(("http", "#")) or link == "":
            target, place = file_of(page), link.partition("#")[2] if link[:1] == "#" else ""
        else:
            path, _, place = link.partition("#")
            parts = []
            for part in (*here.parent.parts, *Path(path).parts):
                parts = parts[:-1] if part == ".." else [*parts, part]
            target = "/".join(parts)
        assert target in pages, link
        assert not place or place in pages[target].ids or place in ("", "top"), link


def references(text):
    """The names in single backticks, but for those in an example."""
    text = text.partition(">>>")[0]
    return set(re.findall(r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)", text))


@pytest.mark.parametrize("page", PAGES)
def test_names_in_single_backticks_are_links(pages, page):
    module = importlib.import_module(page)
    unresolved = set()
    for section, text in pages[file_of(page)].unlinked:
        about = module if section in ("", None) else getattr(module, section.split(".")[0], None)
        named = references(inspect.getdoc(about) or "")
        if text.removesuffix("()") in named and not text.startswith(FOREIGN):
            unresolved.add((section, text))
    assert unresolved == set()


@pytest.mark.parametrize("page", PAGES)
def test_no_star_of_a_formula_is_taken_for_emphasis(pages, page):
    assert [text for text in pages[file_of(page)].emphasized if re.search(r"[^\w :-]", text)] == []
