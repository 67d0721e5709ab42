"""The architecture's import rules, what `import qat` may load, and calls that could run code out of a file.

The rules are read off the sources, so an import inside a function counts as knowledge like one at the top;
only for cycles does the difference matter. Every checker is itself tested on sources that break its rule.
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: From the bottom to the top; a unit (module or package directly in qat/) imports its own row and lower ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files", "torchvision"),
    ("scheme",),
    ("schemes", "numerics", "encoding_json"),
    ("encoding",),
    ("encodings",),
    ("native",),
    ("targets",),
    ("observers",),
    ("quantizers",),
    ("graph",),
    ("integer",),
    ("export",),
    ("interop", "packages"),
    ("algorithms", "train", "models", "analysis", "report"),
    ("",),  # qat/__init__.py, the public names
    ("recipe",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, row in enumerate(LAYERS) for unit in row}

#: What the order alone would allow: unit -> units that it must not know.
FORBIDDEN = {
    "observers": {"targets"},
    "quantizers": {"targets"},
    "export": {"observers"},
    "interop": {"observers"},
    "packages": {"observers"},
}

#: Libraries for some units only: the lowest unit that may import them. torchvision has one door instead.
LIBRARIES = {"torch.fx": "graph", "onnx": "export", "onnxruntime": "export", "typer": "cli"}
DOORS = {"torchvision": "torchvision"}

#: pickle's errors may be named: torch.load(weights_only=True) raises them for a malicious file
PICKLE_ERRORS = {"pickle.PickleError", "pickle.PicklingError", "pickle.UnpicklingError"}
PICKLING = {"cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_YAML = {f"yaml.{how}{what}" for how in ("", "full_", "unsafe_") for what in ("load", "load_all")}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and whether importing the file already imports it."""

    target: str
    line: int
    at_import: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _type_checking(node: ast.If) -> bool:
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
    return name == "TYPE_CHECKING"


def imports_of(tree: ast.AST, modules: frozenset[str], at_import: bool = True) -> Iterator[Import]:
    """The modules that a file imports; `from a import b` is a.b where that is a module, else a."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from torch import fx`: modules of others are known only as far as a rule names them
                target = full if full in modules or full in LIBRARIES else base
                yield Import(target, node.lineno, at_import)
        elif isinstance(node, ast.If) and _type_checking(node):
            body = ast.Module(body=node.body, type_ignores=[])
            yield from imports_of(body, modules, at_import=False)
            yield from imports_of(ast.Module(body=node.orelse, type_ignores=[]), modules, at_import)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, modules, at_import and not inside)


def unit_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def broken_rules(module: str, source: str, modules: frozenset[str]) -> list[str]:
    """What one file imports against the rules, as `module:line cause`."""
    unit = unit_of(module)
    if unit not in RANK:
        return [f"{module}: qat/{unit} has no place in LAYERS of tests/test_imports.py"]
    found = []
    for item in imports_of(ast.parse(source), modules):
        where = f"{module}:{item.line} imports {item.target}"
        if item.target == "qat" or item.target.startswith("qat."):
            other = unit_of(item.target)
            if other not in RANK:
                found.append(f"{where}, which does not exist")
            elif other != unit and RANK[other] > RANK[unit]:
                found.append(f"{where}, which is above it")
            elif other in FORBIDDEN.get(unit, ()):
                found.append(f"{where}, which it must not know")
        for library, lowest in LIBRARIES.items():
            if f"{item.target}.".startswith(f"{library}.") and RANK[unit] < RANK[lowest]:
                found.append(f"{where}, which is for qat.{lowest} and above")
        door = DOORS.get(item.target.split(".")[0], unit)
        if door != unit:
            found.append(f"{where}, which goes through qat.{door}")
    return found


def cycle_of(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle while they are being imported, or an empty list."""
    modules = frozenset(sources)
    edges = {
        name: {i.target for i in imports_of(ast.parse(text), modules) if i.at_import and i.target in modules}
        for name, text in sources.items()
    }
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local names of imported things: {"y": "yaml"} for `import yaml as y`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(function: ast.expr, aliases: dict[str, str]) -> str:
    """Full name of an expression; empty where that is not a plain dotted name."""
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    return ".".join([aliases.get(function.id, function.id), *reversed(parts)])


def unsafe_calls(module: str, source: str) -> list[str]:
    """Imports and calls by which a file that `qat` reads could run code, as `module:line cause`."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    found = []
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
            imported += [f"pickle.{a.name}" for a in node.names if node.module == "pickle"]
        elif isinstance(node, ast.Attribute):
            name = _dotted(node, aliases)
            if name.startswith("pickle.") and name not in PICKLE_ERRORS:
                found.append(f"{module}:{node.lineno} uses {name}")
        for name in imported:
            pickling = name.startswith("pickle.") and name not in PICKLE_ERRORS
            if pickling or name.split(".")[0] in PICKLING:
                found.append(f"{module}:{node.lineno} imports {name}")
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, aliases)
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if called in ("eval", "builtins.eval"):
            found.append(f"{module}:{node.lineno} calls eval")
        elif called in UNSAFE_YAML:
            found.append(f"{module}:{node.lineno} calls {called}; use yaml.safe_load")
        elif called == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"{module}:{node.lineno} calls torch.load without weights_only=True")
        elif keywords.get("allow_pickle") is True:
            found.append(f"{module}:{node.lineno} calls {called} with allow_pickle=True")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Source text of every module of qat, by its dotted name."""
    return {module_name(p, ROOT): p.read_text(encoding="utf-8") for p in sorted((ROOT / "qat").rglob("*.py"))}


def test_imports_point_downward(sources: dict[str, str]) -> None:
    modules = frozenset(sources)
    assert "qat" in modules
    assert [line for name, text in sources.items() for line in broken_rules(name, text, modules)] == []


def test_no_module_imports_itself_in_a_circle(sources: dict[str, str]) -> None:
    assert cycle_of(sources) == []


def test_no_file_that_is_read_can_run_code(sources: dict[str, str]) -> None:
    assert [line for name, text in sources.items() for line in unsafe_calls(name, text)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qat.errors", "from qat.scheme import Scheme"),
        ("qat.errors", "from qat import scheme"),
        ("qat.errors", "import qat.scheme as s"),
        ("qat.encoding", "import torch.fx"),
        ("qat.encoding", "from torch import fx"),
        ("qat.encoding", "from torch.fx.graph import Graph"),
        ("qat.observers.base", "from qat.graph import plan"),
        ("qat.observers.base", "def f():\n    from qat.targets import Target"),
        ("qat.quantizers.weight", "import qat.graph.plan"),
        ("qat.graph.plan", "from qat.export import export_onnx"),
        ("qat.graph.plan", "import onnx"),
        ("qat.export.onnx", "from qat.observers import Observer"),
        ("qat.train.trainer", "if TYPE_CHECKING:\n    from qat.recipe import Recipe"),
        ("qat", "from qat.cli import main"),
        ("qat.graph.plan", "from qat import plan"),
        ("qat.train.data", "import torchvision.datasets"),
        ("qat.encoding", "from qat.no_such import x"),
        ("qat.no_such", ""),
    ],
)
def test_a_broken_import_rule_is_found(module: str, source: str) -> None:
    modules = frozenset({"qat", "qat.scheme", "qat.graph.plan", module})
    assert len(broken_rules(module, source, modules)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qat.encoding", "import torch\nfrom qat import numerics\nfrom qat.errors import QatError"),
        ("qat.export.onnx", "import onnx\nfrom qat.export import verify\nfrom qat.errors import QatError"),
        ("qat.torchvision", "import torchvision"),
        ("qat.train.data", "from qat.torchvision import torchvision"),
        ("qat.recipe.run", "import qat\nfrom qat import prepare"),
        ("qat.graph.trace", "import torch.fx\nfrom torch import fx"),
    ],
)
def test_a_kept_import_rule_is_not_reported(module: str, source: str) -> None:
    modules = frozenset({"qat", "qat.numerics", "qat.errors", "qat.torchvision", module})
    assert broken_rules(module, source, modules) == []


def test_cycles_are_found_only_where_importing_would_hit_them() -> None:
    late = "def f():\n    import a.x"
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.x"
    assert set(cycle_of({"a.x": "from a import y", "a.y": "import a.x"})) == {"a.x", "a.y"}
    assert set(cycle_of({"a.x": "import a.y", "a.y": "class C:\n    import a.x"})) == {"a.x", "a.y"}
    assert cycle_of({"a.x": "from a import y", "a.y": late}) == []
    assert cycle_of({"a.x": "import a.y", "a.y": guarded}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(data)",
        "import pickle as p\nclass C(p.Unpickler): pass",
        "from pickle import load",
        "import dill",
        "from joblib import load",
        "eval('1')",
        "import yaml\nyaml.load(text, Loader=Loader)",
        "from yaml import full_load as read\nread(text)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load\nload(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert len(unsafe_calls("m", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass",
        "from pickle import UnpicklingError",
        "import yaml\nyaml.safe_load(text)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "from safetensors.torch import load\nload(data)",
    ],
)
def test_a_safe_call_is_not_reported(source: str) -> None:
    assert unsafe_calls("m", source) == []


def test_importing_qat_loads_no_heavy_library() -> None:
    heavy = ["onnxruntime", "matplotlib", "torchvision", "typer", "sklearn"]
    code = f"import json, sys, qat; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
