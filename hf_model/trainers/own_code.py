"""Make a model by the user's own code, and load a checkpoint's weights into it.

The code runs because the user named it. What the checkpoint holds is still only read, never run.
"""

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_model.errors import UserError, one_line, some_of
from hf_model.trainers import archive, llm_c
from hf_model.trainers.checkpoint import load_content, naming
from hf_model.trainers.pickle_reader import fields_of
from hf_model.trainers.stated import MIXED_KEYS, MODEL_KEYS
from hf_model.trainers.tensors import find_weights, is_no_weight, weights_of


class Stated(dict[str, Any]):
    """What a checkpoint states of its model, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the checkpoint does not state {name!r}") from None


def build_module(model: str, checkpoint_path: Path) -> nn.Module:
    """The module that the user's code makes, with the weights of a checkpoint.

    Args:
        model: `FILE.py:NAME`, a class or a function. It gets what the checkpoint states (`model_args`,
            `config` or `hyper_parameters`) by the names of its arguments; an argument of another name gets all.

    Raises:
        UserError: the code or the file is not there, the code fails, or the weights are those of another model.
    """
    code, name = _named(model)
    with naming(checkpoint_path):
        if llm_c.is_model(archive.read_head(checkpoint_path)):
            raise UserError("is a model of llm.c, whose code is known here: leave out --model")
        file, content = load_content(checkpoint_path)
        _, weights = find_weights(content)
    with _running(model, code):
        module = _call(_import(code, name), _stated(content))
    if not isinstance(module, nn.Module):
        raise UserError(f"--model {model}: gives a {type(module).__name__}, not a torch.nn.Module")
    with naming(checkpoint_path):
        own = module.state_dict()
        matched = _without_prefix({name: value for name, value in weights.items() if isinstance(name, str)}, own)
        extra = [name for name in matched if name not in own and not is_no_weight(file, matched[name])]
        _check_names(set(matched), extra, module)
        floating = {name: matched[name] for name in matched if name in own and own[name].is_floating_point()}
        # One by one: the model has memory of its own already, so its weights may share their values in the file.
        _copy({name: weights_of(file, {name: value})[name] for name, value in floating.items()}, own)
    return module.eval()


def _named(model: str) -> tuple[Path, str]:
    """The user's file, and the name in it."""
    path, _, name = model.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(
            f"--model {model}: must be a file and a name, such as train.py:build. A checkpoint is --checkpoint_path"
        )
    code = Path(path).resolve()
    if not code.is_file():
        raise UserError(f"--model {model}: there is no file {path}")
    return code, name


@contextmanager
def _running(model: str, code: Path) -> Iterator[None]:
    """Let the user's code import what is beside it and in the current folder, where a trainer is started."""
    folders = [str(code.parent), str(Path.cwd())]
    sys.path[:0] = folders
    try:
        yield
    except UserError as error:
        raise UserError(f"--model {model}: {error}") from None
    except Exception as error:  # the user's code may fail in any way
        raise UserError(f"--model {model}: failed: {type(error).__name__}: {one_line(error, 200)}") from error
    finally:
        for folder in folders:
            sys.path.remove(folder)


def _import(code: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(code.stem, code)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(code.stem)
    sys.modules[code.stem] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    finally:
        if before is not None:
            sys.modules[code.stem] = before
    if not callable(make := getattr(module, name, None)):
        raise UserError(f"{code.name} has no class or function {name!r}")
    return make


def _stated(content: Mapping[Any, Any]) -> Stated:
    stated = next(filter(None, (fields_of(content.get(key)) for key in (*MODEL_KEYS, *MIXED_KEYS))), {})
    return Stated({name: value for name, value in stated.items() if isinstance(name, str)})


def _call(make: Any, stated: Stated) -> Any:
    """Call with the stated values that have an argument's name. A single argument of another name gets them all."""
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [one for one in inspect.signature(make).parameters.values() if one.kind in usual]
    named = {one.name: stated[one.name] for one in parameters if one.name in stated}
    missing = [one for one in parameters if one.default is one.empty and one.name not in named]
    if len(missing) == 1 and stated:
        kind = missing[0].annotation
        is_class = isinstance(kind, type) and kind not in (dict, object, inspect.Parameter.empty)
        named[missing[0].name] = _call(kind, stated) if is_class else stated
    elif missing:
        lacking = " and ".join(one.name for one in missing)
        raise TypeError(f"nothing gives it {lacking}: write a function without arguments that returns the model")
    return make(**named)


def _without_prefix(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by their names in the model: without what stands in front of them all, such as `model.`.

    A name without this prefix stays as it is.
    """
    first = next(iter(own), "")
    prefixes = {"", *(name.removesuffix(first) for name in weights if name.endswith(f".{first}"))}

    def stripped(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in weights.items()}

    return max(map(stripped, sorted(prefixes)), key=lambda names: len(names.keys() & own.keys()))


def _check_names(names: Set[str], extra: Sequence[str], module: nn.Module) -> None:
    """Check that each parameter has a weight, and that each weight of the file has a place."""
    buffers = {name for name, _ in module.named_buffers()}
    missing = [name for name in module.state_dict() if name not in names and name not in buffers]
    if missing or extra:
        said = [f"the file lacks {some_of(list(map(repr, missing)), 3)}"] * bool(missing)
        said += [f"the model has no place for {some_of(list(map(repr, extra)), 3)}"] * bool(extra)
        raise UserError(f"does not belong to the model of --model: {', and '.join(said)}")


@torch.no_grad()
def _copy(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise UserError(
                f"{name!r} has shape {tuple(tensor.shape)}, and {tuple(own[name].shape)} in the model of --model"
            )
        own[name].copy_(tensor)
