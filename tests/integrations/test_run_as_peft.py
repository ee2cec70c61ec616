"""`import peft` means peft_fast: in a program that asks for it, in its libraries and its children, nowhere else."""

import os
import sys
from pathlib import Path

import pytest
from run_scripts import python

import peft_fast
from peft_fast.config import FORMAT_VERSION
from peft_fast.integrations import run_as_peft as integration

# as on a machine where peft was never installed
NO_PEFT = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *args): return None if name.partition(".")[0] == "peft" else self.finder.find_spec(name, *args)
    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda context: ())(context)
        return [one for one in found if one.metadata["Name"] != "peft"]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""  # noqa: E501


@pytest.mark.parametrize("installed", [True, False])
def test_peft_is_peft_fast(installed: bool) -> None:
    """Names, module objects, versions; whether or not peft is installed."""
    program = """
import importlib.metadata, importlib.util
import peft_fast
if importlib.util.find_spec("peft") and not INSTALLED: raise SystemExit("not blocked")
peft_fast.run_as_peft()
import peft, peft.tuners.lora.layer, peft.utils.save_and_load as saving
from peft import LoraConfig, get_peft_model, PeftModel
from peft.tuners import lora
from peft.functional import inject_adapter_in_model
import peft_fast.tuners.lora.layer
import sys
check = {
    "names": peft.LoraConfig is LoraConfig is peft_fast.LoraConfig,
    "modules": peft.tuners.lora.layer is peft_fast.tuners.lora.layer and sys.modules["peft.tuners.lora"] is lora
        and saving is sys.modules["peft_fast.utils.save_and_load"],
    "spec kept": lora.__spec__.name == lora.__name__ == "peft_fast.tuners.lora",
    "versions": {peft.__version__, *map(importlib.metadata.version, ("peft", "PEFT"))} == {"0.21.2"},
    "own version kept": peft_fast.__version__ != "0.21.2",
    "distributions": "peft" in importlib.metadata.packages_distributions()["peft"],
    "metadata": importlib.metadata.metadata("peft")["Name"] == "peft",
    "spec": importlib.util.find_spec("peft").name == "peft" and importlib.util.find_spec("peft.tuners.lora"),
    "no such module": importlib.util.find_spec("peft.tuners.loha") is None,
    "hasattr": hasattr(peft, "LoraConfig") and not hasattr(peft, "LoHaConfig"),
    "not peft's": "run_as_peft" not in peft.__all__,
    "other distributions": importlib.metadata.version("torch").startswith("2."),
}
from transformers.utils import is_peft_available
from transformers.utils.peft_utils import check_peft_version
from transformers.utils.import_utils import is_peft_greater_or_equal
check_peft_version("0.21.0")
check["transformers"] = is_peft_available() and is_peft_greater_or_equal("0.21.2")
from transformers import trainer
check["trainer"] = trainer.PeftModel is PeftModel
print([name for name, right in check.items() if not right], len(check))
"""
    program = ("" if installed else NO_PEFT) + program.replace("INSTALLED", str(installed))
    assert python("-c", program).strip() == "[] 14"


def test_the_versions_are_the_files() -> None:
    assert integration.PEFT_VERSION == FORMAT_VERSION


@pytest.mark.parametrize(
    ("statement", "error", "there"),
    [
        ("from peft import LoHaConfig", "ImportError", "LoraConfig"),
        ("import peft.tuners.loha", "ImportError", "p_tuning"),
        ("from peft.tuners import LoHaModel", "ImportError", "LoraModel"),
        ("import peft; peft.LoHaConfig", "AttributeError", "PrefixTuningConfig"),
    ],
)
def test_a_missing_name_says_what_is_there(statement: str, error: str, there: str) -> None:
    program = f"""
import peft_fast
peft_fast.run_as_peft()
try:
    {statement}
except {error} as error:
    print(error)
"""
    text = python("-c", program)
    missing = "peft.tuners.loha" if "loha" in statement else "LoHa"
    assert "peft_fast has no peft" in text and missing in text
    assert there in text.partition("What it has")[2]


def test_undo_leaves_nothing_behind() -> None:
    program = """
import importlib.metadata, importlib.util, os, sys
import peft_fast
from peft_fast.integrations import run_as_peft
import transformers.utils.import_utils as asks
before = (list(sys.meta_path), dict(os.environ), asks.is_peft_available())
with peft_fast.run_as_peft() as handle:
    import peft.tuners.lora
    if peft_fast.run_as_peft() is not handle: raise SystemExit("a second alias")
    if not asks.is_peft_available() or sys.meta_path == before[0]: raise SystemExit("no alias")
    if os.environ == before[1]: raise SystemExit("children see nothing")
handle.undo()
after = (list(sys.meta_path), dict(os.environ), asks.is_peft_available())
left = [name for name in sys.modules if name.partition(".")[0] == "peft"]
spec = importlib.util.find_spec("peft")
print(after == before, left, spec is None, "0.21.2" in importlib.metadata.packages_distributions().get("peft", []))
"""
    assert python("-c", NO_PEFT + program).strip() == "True [] True False"


@pytest.mark.parametrize(
    ("before", "complaint"),
    [
        ("import sys, types; sys.modules['peft'] = types.ModuleType('peft')", "peft is imported already"),
        ("from peft_fast import get_peft_model, PeftModel", ""),
        ("from transformers import LlamaForCausalLM, AutoModelForCausalLM; from transformers.utils import "
         "is_peft_available; is_peft_available()", ""),
    ],
)  # fmt: skip
def test_too_late_is_an_error(before: str, complaint: str) -> None:
    """Models of transformers may be imported before: they ask later. peft itself may not."""
    text = python("-c", f"{before}\nimport peft_fast\npeft_fast.run_as_peft()", code=1 if complaint else 0)
    assert complaint in text


def test_a_module_that_found_no_peft_makes_it_too_late() -> None:
    """The Trainer of transformers looks once, as it is imported. Asking whether there is a peft is no such look."""
    ask = "import peft_fast\npeft_fast.run_as_peft()\nfrom transformers import trainer\nprint(trainer.PeftModel)"
    text = python("-c", NO_PEFT + "import transformers.trainer_utils\n" + ask, code=1)
    assert "transformers.trainer_utils" in text and "python -m peft_fast run" in text
    early = "from transformers.utils import is_peft_available\nif is_peft_available(): raise SystemExit(3)\n"
    assert "peft_fast" in python("-c", NO_PEFT + early + ask)


CHILDREN = """
import multiprocessing, subprocess, sys
FIRST_LINE

def ask(queue):
    import peft
    queue.put(peft.__file__)

if __name__ == "__main__":
    GUARDED
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=ask, args=(queue,))
        child.start()
        print(method, "peft_fast" in queue.get(timeout=60))
        child.join()
    code = "import sys, peft; print('program', 'peft_fast' in peft.__file__, 'torch' in sys.modules, any('startup' in p for p in sys.path))"
    subprocess.run([sys.executable, "-c", code], check=True)
"""  # noqa: E501


@pytest.mark.parametrize("where", ["COMMAND", "FIRST_LINE", "GUARDED"])
def test_children_see_the_same(where: str, tmp_path: Path) -> None:
    """multiprocessing's spawn and forkserver, and a Python program: started by `run`, or after run_as_peft()."""
    script = tmp_path / "program.py"
    text = CHILDREN.replace(where, "import peft_fast; peft_fast.run_as_peft()")
    script.write_text(text.replace("FIRST_LINE", "").replace("GUARDED", "pass"), encoding="utf-8")
    out = python(*(["-m", "peft_fast", "run"] if where == "COMMAND" else []), str(script))
    assert sorted(out.splitlines()) == ["forkserver True", "program True False False", "spawn True"]


def test_a_child_can_be_left_alone_and_other_sitecustomizes_run(tmp_path: Path) -> None:
    """Without the variable a child is an ordinary one; the machine's own sitecustomize runs either way."""
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.was_here = 'yes'", encoding="utf-8")
    program = """
import os, subprocess, sys
import peft_fast
peft_fast.run_as_peft()
code = "import importlib.util; print(was_here, 'peft_fast' in getattr(importlib.util.find_spec('peft'), 'origin', ''))"
for variables in (dict(os.environ), {k: v for k, v in os.environ.items() if k != "PEFT_FAST_RUN_AS_PEFT"}):
    subprocess.run([sys.executable, "-c", code], check=True, env=variables)
alone = peft_fast.run_as_peft().undo() or peft_fast.run_as_peft(children=False)
subprocess.run([sys.executable, "-c", code], check=True)
"""
    out = python("-c", program, env={"PYTHONPATH": str(tmp_path)})
    assert out.splitlines() == ["yes True", "yes False", "yes False"]


def test_run_is_like_python(tmp_path: Path) -> None:
    """argv, path, name, file, imports beside the script; a script, a module, a folder; exit codes."""
    (tmp_path / "beside.py").write_text("VALUE = 5", encoding="utf-8")
    text = """
import sys, beside, peft
print([__name__, sys.argv[1:], sys.path[0], __file__, beside.VALUE, peft.__version__])
if sys.argv[1] == "code": sys.exit(7)
if sys.argv[1] == "text": sys.exit("a text")
if sys.argv[1] == "error": raise ValueError("own error")
"""
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("print('folder')", encoding="utf-8")

    def run(*arguments: str, code: int = 0) -> str:
        return python("-m", "peft_fast", "run", *arguments, code=code, cwd=tmp_path)

    expected = ["__main__", ["x", "--help", "-m", "--", "y"], str(tmp_path), str(script), 5, "0.21.2"]
    assert run("script.py", "x", "--help", "-m", "--", "y").strip() == str(expected)
    assert run("-m", "script", "x", "--help", "-m", "--", "y").strip() == str(expected)
    assert run("folder").strip() == "folder"
    run("script.py", "code", code=7)
    assert run("script.py", "text", code=1).endswith("a text\n")
    error = run("script.py", "error", code=1)
    assert "Traceback" in error and error.endswith("ValueError: own error\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["nope.py"], "no such file: nope.py"), (["-m", "nope.x"], "no module named nope.x"), ([], "required: SCRIPT")],
)
def test_a_missing_program_is_one_line(arguments: list[str], complaint: str) -> None:
    text = python("-m", "peft_fast", "run", *arguments, code=2)
    assert complaint in text and text.count("\n") == 1


def test_run_says_what_it_does() -> None:
    text = python("-m", "peft_fast", "run", "--help")
    assert "import peft" in text and "ImportError" in text and len(text.splitlines()) < 20


def test_nobody_who_did_not_ask() -> None:
    """Importing the package, or the module of the alias, changes nothing."""
    assert integration._active is None and integration.VARIABLE not in os.environ
    assert "run_as_peft" in peft_fast.__all__
    assert not any(type(finder).__module__ == integration.__name__ for finder in sys.meta_path)
