"""The wheel and the sdist have the right files and names."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import attn_n

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    assert wheel.name == f"attn_n-{attn_n.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "attn_n").rglob("*.py")}
    assert modules | {"attn_n/py.typed"} <= shipped
    assert {name.split("/")[0] for name in shipped} == {"attn_n", f"attn_n-{attn_n.__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        top = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"attn_n", "pyproject.toml", "README.md", "LICENSE"} <= top
    assert "backends" not in top


def test_the_link_to_the_backends() -> None:
    link = ROOT / "backends"
    assert link.is_symlink()
    assert link.resolve() == (ROOT / "attn_n" / "backends").resolve()


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {attn_n.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_torch_is_the_only_hard_dependency(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        metadata = message_from_bytes(archive.read(f"attn_n-{attn_n.__version__}.dist-info/METADATA"))
    required = metadata.get_all("Requires-Dist", [])
    assert [each for each in required if "extra ==" not in each] == ["torch>=2.8"]
    extras = {
        "triton", "flash-attn", "xformers", "transformers", "trainers", "demo", "bench", "docs", "test", "dev",
    }  # fmt: skip
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert metadata["Requires-Python"] == ">=3.10"
