"""Which dtype the weights get, and which device the model goes to."""

import torch

from hf_model.errors import UserError
from hf_model.trainers.tensors import WEIGHT_DTYPES, dtype_name

DTYPES = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}


def pick_dtype(dtype: torch.dtype | str, own: torch.dtype) -> torch.dtype:
    """The dtype with this name; `"auto"` gives `own`, the dtype of the weights.

    Raises:
        UserError: weights of that dtype are not supported.
    """
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise UserError(f"dtype={name!r} is none of auto, {', '.join(DTYPES)}")
    return own if name == "auto" else DTYPES[name]


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """The device with this name. Without a name, the best device: cuda, then mps, then the CPU.

    Raises:
        UserError: there is no such device.
    """
    accelerators = [
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if name is None:
        return torch.device(accelerators[0] if accelerators else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("the meta device holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # each backend raises its own error if it is missing
        raise UserError(
            f"--device {name}: there is no such device here; there is {', '.join([*accelerators, 'cpu'])}"
        ) from None
    return device
