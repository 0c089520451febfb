"""What is shipped: the wheel and the sdist, their files and their names."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import tomllib

import attn_n

ROOT = Path(__file__).parent.parent


def test_wheel_and_sdist(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
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


def test_torch_is_the_only_hard_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.8"]
    assert set(project["optional-dependencies"]) == {"triton", "flash-attn", "xformers", "demo", "bench", "test", "dev"}
