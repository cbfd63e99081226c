"""Make a model by the user's own code, and load a checkpoint's weights into it.

The code runs because the user named it. What the checkpoint holds is still only read, never run.
"""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hf_model.errors import UserError, one_line, some_of
from hf_model.trainers import archive, llm_c
from hf_model.trainers.checkpoint import load_content, naming
from hf_model.trainers.pickle_reader import fields_of
from hf_model.trainers.stated import MIXED_KEYS, MODEL_KEYS
from hf_model.trainers.tensors import find_weights, is_no_weight, weights_of

PLAIN = (int, float, str, bool)  # annotations of an argument that is one value


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
    root, module_name = _package(code)
    with _running(model, code, root):
        module = _call(_import(code, module_name, name), _stated(content))
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
def _running(model: str, code: Path, root: Path) -> Iterator[None]:
    """Let the user's code import what is beside it and in the current folder, where a trainer is started."""
    folders = [str(code.parent), str(Path.cwd()), str(root)]
    sys.path[:0] = folders
    try:
        yield
    except UserError as error:
        raise UserError(f"--model {model}: {error}") from None
    except SystemExit:  # a parser of options at the top of the file does not know ours
        raise UserError(
            f"--model {model}: its code ended the program: put what parses options or trains "
            'under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:  # the user's code may fail in any way
        raise UserError(f"--model {model}: failed: {type(error).__name__}: {one_line(error, 200)}") from error
    finally:
        for folder in folders:
            with suppress(ValueError):  # the user's code may have removed it
                sys.path.remove(folder)


def _import(code: Path, module_name: str, name: str) -> Any:
    module = importlib.import_module(module_name) if "." in module_name else _from_file(code)
    if not callable(make := getattr(module, name, None)):
        near = get_close_matches(name, vars(module), n=1)
        raise UserError(f"{code.name} has no class or function {name!r}" + (f"; is it {near[0]!r}?" if near else ""))
    return make


def _package(code: Path) -> tuple[Path, str]:
    """The folder to import from, and the module's name. With relative imports, a file is part of a package."""
    root, name = code.parent, code.stem
    if _has_relative_imports(code):
        while (root / "__init__.py").is_file():
            root, name = root.parent, f"{root.name}.{name}"
    return root, name


def _has_relative_imports(code: Path) -> bool:
    try:
        tree = ast.parse(code.read_bytes())
    except (SyntaxError, ValueError):  # the import tells where; before Python 3.11.4, a NUL byte is a ValueError
        return False
    return any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(tree))


def _from_file(code: Path) -> ModuleType:
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
    return module


def _stated(content: Mapping[Any, Any]) -> list[Stated]:
    """What a checkpoint states of its model: the values under each key that may have them, and the dicts in these.

    The options of the model alone, such as `model_args`, count before what is stated of the training too.
    """
    only, mixed = (
        [fields for key in keys if (fields := fields_of(content.get(key)))] for keys in (MODEL_KEYS, MIXED_KEYS)
    )
    inner = [fields for one in (*only, *mixed) for value in one.values() if (fields := fields_of(value))]
    of_model = {name: value for one in reversed(only) for name, value in one.items()}
    stated = [one | of_model for one in (*only, *mixed, *inner)]
    return [Stated({name: value for name, value in one.items() if isinstance(name, str)}) for one in stated]


def _call(make: Any, stated: Sequence[Stated]) -> Any:
    """Call with what a checkpoint states: with the values that give the most arguments."""
    return _call_with(make, max(stated, key=lambda one: _n_given(make, one), default=Stated()))


def _call_with(make: Any, stated: Stated) -> Any:
    """Call with the values that have an argument's name. A single argument of another name gets them all."""
    named, other = _arguments(make, stated)
    if other is None:
        return make(**named)
    if _is_class(other):
        return make(**named, **{other.name: _call_with(other.annotation, stated)})
    try:
        return make(**named, **{other.name: stated})
    except Exception as error:  # the argument may be no configuration
        raise TypeError(
            f"{one_line(error, 200)}; the checkpoint has no value for {other.name}, which got all values as one object"
        ) from error


def _n_given(make: Any, stated: Stated) -> int:
    """How many arguments the values give by their names; -1 if a required one is left."""
    try:
        named, other = _arguments(make, stated)
    except TypeError:
        return -1
    inner = _n_given(other.annotation, stated) if other is not None and _is_class(other) else 0
    return -1 if inner < 0 else len(named) + inner


def _arguments(make: Any, stated: Stated) -> tuple[dict[str, Any], inspect.Parameter | None]:
    """The values by the arguments' names, in any case, and the one required argument of another name.

    Raises:
        TypeError: several required arguments are left, or one that is a number or a text.
    """
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [one for one in _signature(make).parameters.values() if one.kind in usual]
    values = {name.lower(): value for name, value in stated.items()} | stated
    names = {one.name: one.name if one.name in values else one.name.lower() for one in parameters}
    named = {argument: values[name] for argument, name in names.items() if name in values}
    missing = [one for one in parameters if one.default is one.empty and one.name not in named]
    if len(missing) == 1 and stated and missing[0].annotation not in PLAIN:
        return named, missing[0]
    if missing:
        lacking = " and ".join(one.name for one in missing)
        raise TypeError(
            f"the checkpoint has no value for {lacking}: write a function without arguments that returns the model"
        )
    return named, None


def _signature(make: Any) -> inspect.Signature:
    try:
        return inspect.signature(make, eval_str=True)
    except Exception:  # an annotation may name what is not there
        return inspect.signature(make)


def _is_class(argument: inspect.Parameter) -> bool:
    kind = argument.annotation
    return isinstance(kind, type) and kind not in (dict, object, inspect.Parameter.empty)


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
