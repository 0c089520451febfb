"""Every Python snippet of the README and of the migration notes is run, in the order in which a reader meets them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attn_n.backends import registry

ROOT = Path(__file__).parent.parent
README, MIGRATE = ROOT / "README.md", ROOT / "docs" / "migrate.md"


@pytest.mark.parametrize("document", [README, MIGRATE], ids=lambda document: document.name)
def test_snippets(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if document == MIGRATE:
        pytest.importorskip("transformers", "5.17")
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    text = document.read_text()
    namespace: dict[str, object] = {}
    snippets = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(snippets) >= 4
    for snippet in snippets:
        above = "\n" * (text[: snippet.start()].count("\n") + 1)  # so that an error names the line of the document
        exec(compile(above + snippet[1], str(document), "exec"), namespace)


def test_links_of_the_migration_notes() -> None:
    text = MIGRATE.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link[1:] in anchors if link.startswith("#") else (MIGRATE.parent / link).exists(), link


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
