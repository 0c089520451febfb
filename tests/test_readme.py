"""README.md and docs/: every Python snippet runs, every link leads somewhere, and every generated table is current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from attn_n.backends import registry
from docs_build import blocks

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
DOCUMENTS = blocks.documents()
WITH_SNIPPETS = [document for document in DOCUMENTS if SNIPPET.search(document.read_text())]
OF_TRANSFORMERS = {"README.md", "migrate.md", "transformers.md"}


@pytest.fixture
def gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where "openai/gpt-oss-20b" is a folder, with a tiny model, so that nothing is downloaded."""
    transformers = pytest.importorskip("transformers", "5.17")
    config = transformers.GptOssConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "openai" / "gpt-oss-20b")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of torchrun with one process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("document", WITH_SNIPPETS, ids=lambda document: document.name)
def test_snippets(document: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run the snippets of a document in the order in which a reader meets them."""
    if document.name in OF_TRANSFORMERS:
        request.getfixturevalue("gpt_oss")
    if document.name == "scale.md":
        request.getfixturevalue("one_rank")
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    text = document.read_text()
    namespace: dict[str, object] = {}
    try:
        for snippet in SNIPPET.finditer(text):
            above = "\n" * (text[: snippet.start()].count("\n") + 1)  # so that an error names the line of the document
            exec(compile(above + snippet[1], str(document), "exec"), namespace)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_which_documents_have_snippets() -> None:
    wanted = {"README.md", "backends.md", "faq.md", "inference.md", "mathematics.md", "migrate.md", "scale.md"}
    assert {document.name for document in WITH_SNIPPETS} == wanted | {"start.md", "transformers.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link) or link.startswith("../../actions/"):  # a page of the forge, beside the files
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Return the anchors that forges give to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_generated_tables_are_current(document: Path) -> None:
    """Hold figures to the results files, and the tables of backends to the code; `make tables` writes them."""
    text = document.read_text()
    if blocks.names(text):
        pytest.importorskip("triton")  # all backends have to be there
        from docs_build.tables import MAKERS

        assert blocks.renewed(text, MAKERS) == text


def test_a_table_that_is_not_current_is_seen() -> None:
    assert blocks.renewed("a\n<!-- generated: it -->\nold\n<!-- end -->\n", {"it": lambda: "new"}).split() == [
        "a", "<!--", "generated:", "it", "-->", "new", "<!--", "end", "-->",
    ]  # fmt: skip
    with pytest.raises(KeyError, match="it"):
        blocks.renewed("<!-- generated: it -->\n<!-- end -->", {})


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([\w-]+)|^    make ([\w-]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_every_page_has_a_title_and_a_description() -> None:
    for document in DOCUMENTS[1:]:
        assert re.match(r"<!--\ntitle: .+\ndescription: .+\n", document.read_text()), document.name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(re.findall(r": ([\w.]+)$", navigation, re.M))


def test_no_picture_is_forgotten() -> None:
    """A picture is there for a light page and for a dark one, and some document shows it."""
    texts = "".join(document.read_text() for document in DOCUMENTS)
    pictures = [path.name for path in (ROOT / "docs" / "pictures").iterdir()]
    assert pictures
    for name in pictures:
        assert f"pictures/{name}" in texts, name
        assert re.sub("-(light|dark)", "-light", name) in pictures
        assert re.sub("-(light|dark)", "-dark", name) in pictures
