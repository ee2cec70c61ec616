"""--device of the commands."""

import torch

from .errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device of that name, usable; "auto" takes a GPU where there is one. Raises: UsageError for any other name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three for what is not there
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UsageError("--device meta: it holds no numbers, nothing can be computed there")
    return device
