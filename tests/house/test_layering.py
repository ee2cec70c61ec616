"""Imports point down only: from a module's own layer and the layers below it (docs/layout.md has the picture)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Top to bottom. A name stands for the module and everything in it; the longest match counts.
LAYERS = (
    ("cli", "__main__"),
    ("demo", "engine", "generation", "training", "planning"),
    ("jobs",),
    ("integrations",),
    ("auto", "mapping", "mapping_func", "peft_model", "mixed_model", "helpers", "functional"),
    ("tuning",),
    (
        "utils.save_and_load",
        "utils.load_directory",
        "utils.initial_adapter",
        "utils._survey",
        "utils.transformers_weight_conversion",
    ),
    ("tuners", "prompts"),
    ("config", "utils", "routing", "prompts.call", "checkpoint"),  # utils: the rest of it
    ("quantized",),
    ("ops.functional", "ops.prefix_functional"),
    ("ops",),
    ("reference",),
)
LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}
THIRD_PARTY = {
    "torch", "safetensors", "transformers", "bitsandbytes", "accelerate", "matplotlib",
    "huggingface_hub", "numpy", "packaging", "regex", "tqdm", "yaml",  # come with transformers
}  # fmt: skip
KNOW_KERNELS = ("peft_fast.ops", "peft_fast.tuning")
INSIDE_FUNCTIONS_ONLY = {"bitsandbytes", "transformers", "accelerate", "matplotlib", "csrc_triton"}


def level(module: str) -> int:
    """Layer of "peft_fast.a.b", counted from below; KeyError for a module that the table does not know."""
    parts = module.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LEVEL:
            return LEVEL[".".join(parts[:end])]
    raise KeyError(f"{module} has no layer: give it one in tests/house/test_layering.py and docs/layout.md")


def imports(module: str, is_package: bool, source: str, modules: set[str]) -> list[tuple[str, bool]]:
    """(imported module, at module level) for each import statement, relative ones resolved."""
    found = []
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - child.level] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:  # `from . import x` imports the module x where there is one
                    if alias.name == "__version__":
                        continue
                    whole = f"{base}.{alias.name}"
                    found.append((whole if whole in modules else base, top))
            if is_package and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue  # what a package re-exports by name, on first use
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), True)
    return found


def violations(module: str, is_package: bool, source: str, modules: set[str]) -> list[str]:
    """What `source`, as the module of that name, imports and must not."""
    wrong = []
    own = module.partition(".")[0]
    for name, top in imports(module, is_package, source, modules):
        first = name.partition(".")[0]
        if first == "peft_fast" and own == "peft_fast":
            if name == "peft_fast":
                if level(module) > LEVEL["integrations"]:  # programs are written as a user writes them
                    continue
                wrong.append(f"{module} imports the package's public names: import the module that has them")
            elif level(name) > level(module):
                wrong.append(f"{module} imports {name}, which is above it")
        elif own == "csrc_triton":
            if first not in {"torch", "triton", "csrc_triton"} and first not in sys.stdlib_module_names:
                wrong.append(f"{module} imports {name}: device code knows torch and triton only")
        elif first == "csrc_triton" and not module.startswith(KNOW_KERNELS) and name != "csrc_triton.tables":
            wrong.append(f"{module} imports {name}: only peft_fast.ops and peft_fast.tuning do")
        elif first not in THIRD_PARTY | {"csrc_triton"} and first not in sys.stdlib_module_names:
            wrong.append(f"{module} imports {name}, which is no dependency")
        if own == "peft_fast" and top and first in INSIDE_FUNCTIONS_ONLY:
            wrong.append(f"{module} imports {name} when it is itself imported: do it inside the function that needs it")
    return wrong


def python_files() -> list[Path]:
    return sorted(path for package in ("peft_fast", "csrc_triton") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in python_files()}


def test_no_module_needs_itself() -> None:
    """What modules import when they are imported themselves has no circle, neither between modules nor (but for utils,
    where PEFT has both constants and state dicts) between packages."""
    needs: dict[str, set[str]] = {}
    for path in python_files():
        module, tree = module_name(path), ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        found = imports(module, path.name == "__init__.py", ast.unparse(tree), MODULES)
        needs[module] = {name for name, top in found if top and name in MODULES and name != module}
    needs.pop("peft_fast")
    assert circle(needs) == []
    rooms = {module: ".".join(module.split(".")[:2]) for module in needs}
    between: dict[str, set[str]] = {}
    for module, room in rooms.items():
        others = {rooms[name] for name in needs[module] if name in rooms} - {room}
        between.setdefault(room, set()).update(others - {"peft_fast.utils"})
    assert circle(between) == []


def circle(needs: dict[str, set[str]]) -> list[str]:
    """The first way from a name back to itself; none: []."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(needs.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(needs) if (found := walk(name, []))), [])


def test_the_check_finds_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and circle({"a": {"b"}, "b": {"c"}}) == []


# the package itself re-exports from every layer, lazily: tests/peft_model/test_import.py
@pytest.mark.parametrize("path", [path for path in python_files() if module_name(path) != "peft_fast"], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    assert violations(module_name(path), path.name == "__init__.py", path.read_text(encoding="utf-8"), MODULES) == []


def test_examples_use_the_public_packages() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        names = {
            name.partition(".")[0] for name, _ in imports("examples", False, path.read_text(encoding="utf-8"), set())
        }
        assert "peft" not in names and "csrc_triton" not in names, path.name


def test_kernels_named_in_strings_exist() -> None:
    """ops name their launchers as "csrc_triton.module:function": a typo would show only on a GPU."""
    for path in sorted((ROOT / "peft_fast" / "ops").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("csrc_triton."):
                module, _, function = node.value.partition(":")
                source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
                functions = {n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)}
                assert not function or function in functions, f"{path.name} names {node.value}"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("peft_fast.ops.lora_linear", "from ..tuners import lora", "above it"),
        ("peft_fast.ops.lora_linear", "def f():\n    from peft_fast.peft_model import PeftModel", "above it"),
        ("peft_fast.reference.lora", "from ..ops import functional", "above it"),
        ("peft_fast.tuners.lora.layer", "from peft_fast import LoraConfig", "public names"),
        ("peft_fast.tuners.lora.layer", "def f():\n    import csrc_triton.lora.linear", "only peft_fast.ops and"),
        ("peft_fast.ops.lora_linear", "import csrc_triton.lora.linear", "inside the function"),
        ("peft_fast.ops.lora_linear", "import triton", "no dependency"),
        ("peft_fast.config", "try:\n    import bitsandbytes\nexcept ImportError:\n    pass", "inside the function"),
        ("peft_fast.config", "def f():\n    from peft import LoraConfig", "no dependency"),
        ("csrc_triton.lora.linear", "import numpy", "torch and triton only"),
        ("csrc_triton.lora.linear", "def f():\n    from peft_fast import reference", "torch and triton only"),
    ],
)
def test_the_check_finds(module: str, source: str, complaint: str) -> None:
    assert any(complaint in line for line in violations(module, False, source, MODULES))


def test_the_check_lets_pass() -> None:
    assert violations("peft_fast.demo.run", False, "from peft_fast import LoraConfig", MODULES) == []
    source = "import torch\nfrom ... import reference\nfrom ...ops import functional\nfrom .config import LoraConfig\n"
    assert violations("peft_fast.tuners.lora.layer", False, source, MODULES) == []


def test_a_module_without_a_layer_is_an_error() -> None:
    with pytest.raises(KeyError, match="no layer"):
        level("peft_fast.somewhere_new")
