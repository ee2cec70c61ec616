"""What to tell someone who asks for a name of peft that this library does not have."""

import pkgutil
from types import ModuleType


def missing_text(module: ModuleType, name: str) -> str:
    """That `module` has no `name`, and what it has: its public names and modules.

    Args:
        module: a package of this library.
        name: what was looked for in it.
    """
    path = ".".join(["peft", *module.__name__.split(".")[1:]])
    own = getattr(module, "__all__", None) or dir(module)
    # of the package itself those that peft has too
    parts = getattr(module, "_SUBMODULES", None) or [
        part.name for part in pkgutil.iter_modules(getattr(module, "__path__", ()))
    ]
    there = sorted(word for word in {*own, *parts} if not word.startswith("_"))
    return (
        f"module {module.__name__!r} has no attribute {name!r}: peft_fast has no {path}.{name}. "
        f"What it has of {path}: {', '.join(there)}"
    )
