"""transformers' Trainer and TRL know peft_fast's models and configurations as they know peft's, with peft or without.

These libraries ask `isinstance(model, PeftModel)` about the class of peft, and take no for the answer where peft is not
installed: an adapter would be saved as a whole model, and a quantized base refused. So in the modules that ask, and in
no others, the names that they took from peft mean the classes of both libraries, and the few functions that import peft
when they are called get a branch for our models. peft itself is not touched, and `import peft` stays what it is.
"""

import copy
import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# asked once for these modules; all of TRL's ask
_MODULES = (
    *("transformers.trainer", "transformers.trainer_utils", "transformers.distributed.fsdp"),
    *("accelerate.utils", "accelerate.utils.modeling", "accelerate.utils.fsdp_utils"),
)
# name that they take from peft -> module of peft_fast that has it
_NAMES = {
    "PeftModel": "peft_model",
    "PeftMixedModel": "mixed_model",
    "PeftConfig": "config",
    "PromptLearningConfig": "config",
    "LoraConfig": "tuners.lora",
    "PrefixTuningConfig": "tuners.prefix_tuning",
    "BaseTunerLayer": "tuners.tuners_utils",
}


def introduce() -> None:
    """Make the libraries know peft_fast: those that are imported already, and others when they are."""
    if any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _WhenImported())
    for name, module in list(sys.modules.items()):
        if _asks(name) and isinstance(module, ModuleType):
            teach(module)


def _asks(name: str) -> bool:
    return name in _MODULES or name.startswith("trl.")


class _WhenImported:
    """Leaves finding a module to the other finders, and has it taught once it is executed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _asks(fullname):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                return _taught(spec)
        return None


def _taught(spec: ModuleSpec) -> ModuleSpec:
    """The same with a loader that teaches the module, a copy: some loaders are shared by many modules."""
    if hasattr(spec.loader, "exec_module"):
        loader: Any = copy.copy(spec.loader)
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            teach(module)

        loader.exec_module = exec_module
        spec.loader = loader
    return spec


def teach(module: ModuleType) -> None:
    """Let a module that asks about peft's classes get the answer for peft_fast's too. Twice is as once."""
    names = vars(module)
    for name, branch in _BRANCHES.items():
        function = names.get(name)
        if callable(function) and not hasattr(function, "without_peft_fast"):
            names[name] = _with_branch(function, branch)
    ask = names.get("is_peft_available")
    if ask is None or module.__name__.startswith("accelerate."):  # those functions import peft themselves
        return
    has_peft = ask()
    for name, home in _NAMES.items():
        theirs = names.get(name)
        # not again, and not peft_fast's own under peft's name (run_as_peft)
        if (theirs is not None or not has_peft) and not getattr(theirs, "__module__", "").startswith("peft_fast."):
            names[name] = _Both(theirs, home, name)
    if "get_peft_model" in names and not hasattr(names["get_peft_model"], "without_peft_fast"):
        names["get_peft_model"] = _with_branch(names["get_peft_model"], _get_peft_model)
    if not has_peft:
        names["is_peft_available"] = _yes
        names["get_peft_model"] = _ours("mapping_func", "get_peft_model")
        names["peft"] = _Versioned("peft")


class _Both:
    """A class of peft, if there is peft, and the one of peft_fast: `isinstance` takes either, all else is as before."""

    def __init__(self, theirs: Any, home: str, name: str) -> None:
        self._theirs, self._home, self._name = theirs, home, name

    def __instancecheck__(self, thing: Any) -> bool:
        module = sys.modules.get(f"peft_fast.{self._home}")  # without it there are no instances
        if module is not None and isinstance(thing, getattr(module, self._name)):
            return True
        return self._theirs is not None and isinstance(thing, self._theirs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._class(), name)

    def _class(self) -> Any:
        return _ours(self._home, self._name) if self._theirs is None else self._theirs


class _Versioned(ModuleType):
    """What a module without peft has for `peft`: it asks for the version only."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return _ours("config", "FORMAT_VERSION")
        return getattr(sys.modules["peft_fast"], name)


def _yes(*args: Any, **kwargs: Any) -> bool:
    """`is_peft_available` where peft_fast is what there is."""
    return True


def _ours(home: str, name: str) -> Any:
    return getattr(import_module(f"peft_fast.{home}"), name)


# ------------------------------------------------------------------------------ functions that import peft when called
def _with_branch(function: Callable[..., Any], branch: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which asks `branch` first: that returns NotImplemented where the case is not ours."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = branch(*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    vars(call)["without_peft_fast"] = function
    return call


def _is_ours(model: Any) -> bool:
    """Whether it is a PeftModel of peft_fast, or one that accelerate or torch have wrapped."""
    module = sys.modules.get("peft_fast.peft_model")
    if module is None:
        return False
    if isinstance(model, module.PeftModel):
        return True
    from accelerate.utils.other import extract_model_from_parallel

    return isinstance(extract_model_from_parallel(model), module.PeftModel)


def _is_peft_model(model: Any) -> Any:
    return True if _is_ours(model) else NotImplemented


def _get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(peft_config, _ours("config", "PeftConfig")):
        return _ours("mapping_func", "get_peft_model")(model, peft_config, *args, **kwargs)
    return NotImplemented


def _set_fsdp_policy(model: Any, accelerator: Any) -> Any:
    """FSDP shards adapters as units of their own, and a 4-bit base in the dtype that it is stored in."""
    if not _is_ours(model):
        return NotImplemented
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = _ours("utils.other", "fsdp_auto_wrap_policy")(model)
    quantization = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    storage = getattr(quantization, "bnb_4bit_quant_storage", None)
    if storage is not None and storage.is_floating_point:
        plugin.set_mixed_precision(storage, override=True)
    return None


def _get_fsdp_state(model: Any, adapter_only: bool = False, sd_options: Any = None) -> Any:
    if not adapter_only or getattr(sd_options, "full_state_dict", False) or not _is_ours(model):
        return NotImplemented
    return _ours("utils", "get_peft_model_state_dict")(model, adapter_name=model.active_adapter)


def _set_fsdp_state(model: Any, state_dict: Any, adapter_only: bool = False, sd_options: Any = None) -> Any:
    if not adapter_only or getattr(sd_options, "full_state_dict", False) or not _is_ours(model):
        return NotImplemented
    return _ours("utils", "set_peft_model_state_dict")(model, state_dict, adapter_name=model.active_adapter)


_BRANCHES: dict[str, Callable[..., Any]] = {
    "is_peft_model": _is_peft_model,
    "update_fsdp_plugin_peft": _set_fsdp_policy,
    "_get_model_state_dict": _get_fsdp_state,
    "_set_model_state_dict": _set_fsdp_state,
}
