"""A hook of MkDocs, so that pages read well on a forge and work on the site.

What pages of docs/ link to outside of it becomes part of the site: links are written as a reader of the repository
needs them, `../CONTRIBUTING.md`. The title and the description for search engines stand in a comment at the top of a
page; forges would show the usual front matter as a table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_HEAD = re.compile(r"<!--\n(title: .*?)\n-->\n", re.DOTALL)
_LINK = re.compile(r"(\]\()([^)#:\s]+)([)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add every file of the repository that a page links to, and the pages among them with their own links."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        for target in _targets(waiting.pop()):
            place = _on_site(target)
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
                if target.endswith(".md"):
                    waiting.append(place)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    if head := _HEAD.match(markdown):
        page.meta.update(yaml.safe_load(head[1]))
        markdown = markdown[head.end() :]

    def moved(link: re.Match[str]) -> str:
        target = _repository_path(here, link[2])
        if not (ROOT / target).is_file():
            return link[0]  # MkDocs then says that it is not found
        return link[1] + os.path.relpath(_on_site(target), os.path.dirname(here) or ".") + link[3]

    return _LINK.sub(moved, markdown)


def _targets(page: str) -> list[str]:
    text = (ROOT / _source(page)).read_text()
    targets = [_repository_path(page, link[2]) for link in _LINK.finditer(text)]
    return [target for target in targets if (ROOT / target).is_file()]


def _source(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    return f"docs/{page}" if (ROOT / "docs" / page).is_file() else page


def _on_site(path: str) -> str:
    return path.removeprefix("docs/")


def _repository_path(page: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(_source(page)), link))
