"""Imports keep the contracts of pyproject.toml, and what must work without torch reaches no torch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_TORCH = """
import importlib, pkgutil, sys
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "numpy", "safetensors", "bitsandbytes", "accelerate"}:
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Heavy())
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
"""

LIGHT = (
    "bench.chat",
    "bench.cli",
    "bench.compare",
    "bench.records",
    "bench.run",
    "bench.suite",
    "bench.sweep",
    "bench.worker.request",
    "quantize.checkpoint",
    "quantize.cli",
    "quantize.ls",
    "quantize.schema",
    "quantize.suite",
    "quantize.variant",
    "quantize.verify",
    "quantable",
    "reports",
)
"""What imports with nothing installed but what `report` needs; a package means all that is in it."""


def light(*names: str, folder: Path = ROOT) -> str:
    """What goes wrong when these are imported without torch; nothing where nothing does."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *names], cwd=folder, capture_output=True, text=True, check=False
    )
    return ran.stderr


def contracts(folder: Path) -> dict[str, bool]:
    """Whether each contract holds for the packages in this folder, by its name."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    verdicts = {}
    for line in ran.stdout.splitlines():
        name, _, verdict = line.rpartition(" ")
        if verdict in ("KEPT", "BROKEN"):
            verdicts[name.partition(":")[0].strip()] = verdict == "KEPT"
    assert verdicts, ran.stdout + ran.stderr
    return verdicts


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source in a folder of its own, to plant violations in."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in ("quantable", "quantize", "bench", "reports"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_contracts_hold_and_one_line_breaks_each(copied: Path) -> None:
    before = contracts(copied)
    assert len(before) == 3
    assert all(before.values()), before
    planted = {
        "quantize/variant.py": "from bench import records",
        "bench/records/scenario.py": "def late():\n    from bench.run import plan",
        "bench/run/plan.py": "from quantize.loader import load",
    }
    for name, line in planted.items():
        with (copied / name).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    assert not any(contracts(copied).values())


def test_the_product_does_without_its_tests_and_experiments() -> None:
    for package in ("quantize", "bench", "reports", "quantable"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) tests\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_what_report_needs_imports_without_torch(copied: Path) -> None:
    assert light(*LIGHT) == ""
    with (copied / "quantize" / "schema.py").open("a", encoding="utf-8") as file:
        file.write("\nimport torch\n")
    assert "torch is not installed" in light("bench.records", folder=copied)
