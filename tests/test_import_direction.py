"""Packages form layers: who may import whom, held as a table and checked against the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BELOW_NODES = {"engine", "kv_transfer", "model", "kernels", "api", "runtime", "proto"}
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": set(),
    "proto": set(),
    "kernels": set(),
    "model": {"kernels", "runtime"},
    "engine": {"model", "kernels", "runtime"},
    "kv_transfer": {"model.state_layout", "proto", "runtime"},
    "api": {"runtime"},
    "router": {"api", "proto", "runtime"},
    "node": BELOW_NODES,
    "prefill_node": BELOW_NODES | {"node"},
    "decode_node": BELOW_NODES | {"node"},
    "tools": BELOW_NODES | {"node", "router", "prefill_node", "decode_node"},
    "benchmarks": BELOW_NODES | {"node", "router", "prefill_node", "decode_node", "tools"},
}
NO_TORCH = {"runtime", "proto", "api", "router", "kv_transfer"}


def python_files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name)


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == entry or module.startswith(entry + ".") or entry.startswith(module + ".") for entry in allowed)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in python_files(package):
        for module in imported_modules(path):
            top = module.partition(".")[0]
            if top in MAY_IMPORT or top == "tests":
                assert is_allowed(module, allowed), f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("package", sorted(NO_TORCH))
def test_packages_that_must_start_fast_do_not_import_torch(package: str) -> None:
    for path in python_files(package):
        heavy = {m for m in imported_modules(path) if m.partition(".")[0] in {"torch", "triton", "transformers"}}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_each_package_resolves_to_this_repository(package: str) -> None:
    spec = __import__("importlib.util").util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / package / "__init__.py"
