"""The torch device that a user names."""

import torch

from quantize.errors import UserError


def torch_device(name: str) -> torch.device:
    """The torch device of this name; "auto" is CUDA where there is some.

    Raises UserError when it is CUDA and there is none, or unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device here (torch.cuda.is_available() is False): use --device cpu")
    return torch.device(name)
