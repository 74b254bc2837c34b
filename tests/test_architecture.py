# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole repository: who may import whom, what is packaged, and what no file may contain."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("contracts", "exporters", "pipeline", "runtime")
HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "optimum"}
MAY_IMPORT = {
    "contracts": set(),
    "exporters": {"contracts"},
    "runtime": {"contracts"},
    "pipeline": {"contracts", "exporters", "runtime"},
}


def _tracked() -> list[Path]:
    """Files that git has or would add; the tests also run where there is no repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        skipped = {".git", ".venv", "build", "dist", "artifacts"}
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        listed = [
            str(f) for f in files if not any(p in skipped or "cache" in p or p.endswith(".egg-info") for p in f.parts)
        ]
    return [path for name in sorted(listed) if (path := ROOT / name).is_file()]


def _sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("onnxpress", *parts)).removesuffix(".__init__")


def _imports(path: Path) -> Iterator[str]:
    """Yield the absolute name of every module that a file imports, at any depth."""
    module = _module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            target = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{target}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_dependencies_run_one_way(room: str) -> None:
    for path in _sources(room):
        for name in _imports(path):
            if name.startswith("onnxpress."):
                other = name.split(".")[1]
                assert other == room or other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_the_rule_reads_relative_imports() -> None:
    seen = set(_imports(ROOT / "pipeline" / "passes" / "base.py"))
    assert "onnxpress.contracts.errors.InputError" in seen
    assert "onnxpress.exporters.graph_file.weight_bytes" in seen
    assert any(name.startswith("onnxpress.pipeline.passes.graph.") for name in seen)


def test_contracts_import_nothing_heavy() -> None:
    for path in _sources("contracts"):
        for name in _imports(path):
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name}"


def test_runtime_needs_neither_torch_nor_transformers() -> None:
    for path in _sources("runtime"):
        for name in _imports(path):
            assert name.split(".")[0] not in HEAVY - {"onnxruntime"}, f"{path.relative_to(ROOT)} imports {name}"


def _loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after running some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("words", [["--help"], ["press", "--help"], ["--version"], ["recipes", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    loaded = _loaded_by(
        f"from onnxpress.pipeline.cli import main\ntry: main({words!r})\nexcept SystemExit as e: assert not e.code"
    )
    assert not loaded & (HEAVY | {"numpy"})


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    assert not _loaded_by("import onnxpress.runtime, onnxpress.contracts.errors") & HEAVY


def test_every_sub_package_is_installed() -> None:
    settings = _pyproject()["tool"]["setuptools"]
    found = {_module_of(path) for path in _sources(*ROOMS) if path.name == "__init__.py"}
    assert set(settings["packages"]) == found
    assert settings["packages"] == sorted(settings["packages"])
    assert settings["package-dir"] == {f"onnxpress.{room}": room for room in ROOMS}
    for path in _sources(*ROOMS):
        assert (path.parent / "__init__.py").is_file(), f"{path.relative_to(ROOT)} lies in no package"


def test_every_data_file_is_installed() -> None:
    declared = _pyproject()["tool"]["setuptools"]["package-data"]
    data = [p for p in _tracked() if p.relative_to(ROOT).parts[0] in ROOMS and p.suffix != ".py"]
    assert {path.suffix for path in data} >= {".yaml", ".j2"}
    for path in data:
        package = ".".join(("onnxpress", *path.relative_to(ROOT).parts[:-1]))
        patterns = declared.get(package, [])
        assert any(fnmatch.fnmatch(path.name, p) for p in patterns), f"{path.relative_to(ROOT)} would not be installed"
    for package, patterns in declared.items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert all(any(folder.glob(pattern)) for pattern in patterns), f"{package}: a pattern that matches nothing"


@pytest.mark.parametrize("path", _sources(*ROOMS), ids=_module_of)
def test_every_module_imports_and_says_what_it_is_for(path: Path) -> None:
    loaded = importlib.import_module(_module_of(path))
    assert (loaded.__doc__ or "").strip() or not ast.parse(path.read_text("utf-8")).body


def test_public_names_exist() -> None:
    for module in map(_module_of, _sources(*ROOMS)):
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", ()):
            assert getattr(loaded, name, None) is not None, f"{module}.{name}"


def test_the_command_is_installed() -> None:
    assert _pyproject()["project"]["scripts"] == {"onnxpress": "onnxpress.pipeline.cli:main"}


def test_no_python_file_is_over_600_lines() -> None:
    for path in _tracked():
        if path.suffix == ".py":
            length = len(path.read_text("utf-8").splitlines())
            assert length <= 600, f"{path.relative_to(ROOT)} has {length} lines"


def test_every_python_file_names_its_license() -> None:
    for path in _tracked():
        if path.suffix == ".py":
            first = path.read_text("utf-8").splitlines()[:2]
            assert "# SPDX-License-Identifier: Apache-2.0" in first, path.relative_to(ROOT)


def test_no_file_holds_a_path_of_the_machine_it_was_written_on() -> None:
    """Tests may speak of a stranger's home, to see it removed from a model; nothing may speak of ours."""
    private = re.compile(rf"(?<![\w.:/~-])/(?:{'|'.join(('work', 'home', 'root', 'Users'))})/\w")
    ours = re.compile(rf"(?<![\w.:/~-])/(?:{'|'.join(('work', 'root'))})/\w|{re.escape(str(ROOT))}/")
    for path in _tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found = (ours if path.is_relative_to(ROOT / "tests") else private).search(text)
        assert found is None, f"{path.relative_to(ROOT)} line {text[: found.start()].count(chr(10)) + 1}"


def test_every_test_folder_mirrors_a_room() -> None:
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize("package", ["exporters", "pipeline", "runtime"])
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(f"onnxpress.{package}")
    assert module.__all__ == sorted(module.__all__, key=_ruffs_order)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name
    assert callable(importlib.import_module("onnxpress.pipeline").press)


def _ruffs_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: the order that ruff keeps `__all__` in."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
