"""The table of trainers' names: what each trainer calls its tensors, and what turns these names into this project's.

To add a trainer, add an entry to `TABLE`. Nothing else knows what a trainer calls its tensors.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch

from hf_model.errors import UserError, some_of

EXACT, WRITTEN_OUT_TANH, TORCH_TANH = "gelu", "gelu_new", "gelu_pytorch_tanh"
# torch.compile, DistributedDataParallel, FSDP, its activation checkpoints, Lightning Fabric
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
MAX_DIGITS = 4  # of a layer's number
MAX_PIECES = 8  # of a module's name, between its dots, without what stands in front
LLAMA_MARKS = ("gate", "rotary", "rope", "freqs", "w3.", "rms", "q_norm", "k_norm")
LLAMA = (
    "If this is Llama's shape (RMSNorm, rotary positions, a gated MLP), use a converter to LlamaForCausalLM, such as "
    "llama2.c's export.py or minimind's convert_model.py"
)
LITGPT = "This is litgpt's naming, whose models have rotary positions: use its own `litgpt convert_from_litgpt`"
# This project's module for each role. A module stands for its weight and its bias.
OURS = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "ln_1": "transformer.h.{i}.ln_1",
    "attn.c_attn": "transformer.h.{i}.attn.c_attn",
    "attn.c_proj": "transformer.h.{i}.attn.c_proj",
    "ln_2": "transformer.h.{i}.ln_2",
    "mlp.c_fc": "transformer.h.{i}.mlp.c_fc",
    "mlp.c_proj": "transformer.h.{i}.mlp.c_proj",
    "ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # GPT-2's layers whose weight is (in, out)
PARAMETERS = {"weight": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Names:
    """What a trainer calls its modules, and what its models have that no tensor shows."""

    trainer: str
    modules: Mapping[str, str | tuple[str, ...]]
    """Role to the module's name in the file. `{i}` is the layer, `{head}` the head. A tuple is query, key, value.

    Without `attn.c_proj`, the heads' results are added to the residual as they are.
    """
    activation: str | None = None
    """The trainer's activation; None if what else the file holds must tell it."""
    n_head: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """The number of heads for a width and a number of layers, if the vocabulary is GPT-2's."""
    forms: tuple[Mapping[str, Any], ...] = ({},)
    """Models that have these names: fields of `CustomGPTConfig`. If there are several, the loss on a text decides."""
    left_open: str = ""
    """How these models differ, in words."""
    is_transposed: bool = False
    """Whether linear weights are (in, out), as in GPT-2's `Conv1D`."""
    left_out: tuple[str, ...] = ()
    """Ends of names that are no weights."""
    parameters: Mapping[str, str] = field(default_factory=lambda: PARAMETERS)
    """The trainer's names of a module's weight and bias."""
    may_tie: bool = True
    """Whether the trainer ties the head to the embedding, so that one of the two may be missing."""
    has_biases: bool = False
    """Whether all modules but the joined projection and the head always have a bias."""


FAMILY = Names("nanoGPT and its relatives", OURS, left_out=("attn.masked_bias",))
WITHOUT_HEAD = {role: name.removeprefix("transformer.") for role, name in OURS.items()}
GPT2_HEADS = {(768, 6): 12, (768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1600, 48): 25}
LECTURE = Names(
    "Karpathy's lecture",
    {
        "wte": "token_embedding_table",
        "wpe": "position_embedding_table",
        "ln_1": "blocks.{i}.ln1",
        "attn.c_attn": tuple(f"blocks.{{i}}.sa.heads.{{head}}.{part}" for part in ("query", "key", "value")),
        "attn.c_proj": "blocks.{i}.sa.proj",
        "ln_2": "blocks.{i}.ln2",
        "mlp.c_fc": "blocks.{i}.ffwd.net.0",
        "mlp.c_proj": "blocks.{i}.ffwd.net.2",
        "ln_f": "ln_f",
        "lm_head": "lm_head",
    },
    # The same names and shapes are in courses with post-norm blocks, in copies from before January 2023 that scale
    # attention by the model's width, in copies with another activation, and in models that never call `ln_f`.
    forms=tuple(
        {"activation_function": activation, "norm_first": norm_first, "attention_scale": scale, "final_norm": final}
        for activation, norm_first, scale, final in product(
            ("relu", EXACT, "silu", "tanh", "relu2"), (True, False), (None, "width"), (True, False)
        )
    ),
    may_tie=False,
    has_biases=True,
    left_open="norms before or after, two scales of attention, the activation",
)
GPT2 = Names(
    "transformers' GPT-2",
    OURS,
    activation=WRITTEN_OUT_TANH,
    n_head=GPT2_HEADS,
    is_transposed=True,
    left_out=("attn.masked_bias",),
)
BOOK = Names(
    "LLMs-from-scratch",
    {
        "wte": "tok_emb",
        "wpe": "pos_emb",
        "ln_1": "trf_blocks.{i}.norm1",
        "attn.c_attn": tuple(f"trf_blocks.{{i}}.att.W_{part}" for part in ("query", "key", "value")),
        "attn.c_proj": "trf_blocks.{i}.att.out_proj",
        "ln_2": "trf_blocks.{i}.norm2",
        "mlp.c_fc": "trf_blocks.{i}.ff.layers.0",
        "mlp.c_proj": "trf_blocks.{i}.ff.layers.2",
        "ln_f": "final_norm",
        "lm_head": "out_head",
    },
    activation=WRITTEN_OUT_TANH,
    n_head=GPT2_HEADS,
    parameters=PARAMETERS | {"scale": "weight", "shift": "bias"},
    may_tie=False,
    has_biases=True,
)
TRAIN_LLM = Names(
    "train-llm-from-scratch",
    {
        "wte": "token_embed",
        "wpe": "position_embed",
        "ln_1": "attn_blocks.{i}.ln1",
        "attn.c_attn": tuple(f"attn_blocks.{{i}}.attn.heads.{{head}}.{part}" for part in ("query", "key", "value")),
        "attn.c_proj": "attn_blocks.{i}.attn.proj",
        "ln_2": "attn_blocks.{i}.ln2",
        "mlp.c_fc": "attn_blocks.{i}.mlp.hidden",
        "mlp.c_proj": "attn_blocks.{i}.mlp.proj",
        "ln_f": "layer_norm",
        "lm_head": "lm_head",
    },
    activation="relu",
    may_tie=False,
    has_biases=True,
)
FASTER = {"attn.c_attn": "trf_blocks.{i}.att.qkv", "attn.c_proj": "trf_blocks.{i}.att.proj"}
TABLE = (
    FAMILY,
    GPT2,
    Names("nanoGPT and its relatives, without the head", WITHOUT_HEAD),
    replace(GPT2, trainer="transformers' GPT-2, without the head", modules=WITHOUT_HEAD),
    BOOK,
    replace(
        BOOK,
        trainer="LLMs-from-scratch's faster variant",
        modules={**BOOK.modules, **FASTER},
        activation=TORCH_TANH,
    ),
    # Before June 2026 its attention had no output projection; before 16 March 2025 the model's width scaled it.
    replace(
        TRAIN_LLM,
        trainer="train-llm-from-scratch before June 2026",
        modules={role: name for role, name in TRAIN_LLM.modules.items() if role != "attn.c_proj"},
        forms=tuple(
            {"activation_function": "relu", "norm_first": True, "attention_scale": scale, "final_norm": True}
            for scale in (None, "width")
        ),
        left_open="two scales of attention",
    ),
    TRAIN_LLM,  # if both entries know the same number of names, the first one is taken
    LECTURE,
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file belongs."""

    role: str
    parameter: str
    """`weight` or `bias`."""
    part: int
    """0, 1, 2 for queries, keys and values that are apart."""
    layer: int = 0
    head: int = 0

    @property
    def ours(self) -> str:
        return f"{OURS[self.role].format(i=self.layer)}.{self.parameter}"


@dataclass(frozen=True)
class Placed:
    """The tensors of a file, by the names of one trainer."""

    names: Names
    prefix: str
    """What stands in front of all names, such as `model.`."""
    places: Mapping[str, Place]
    """The file's name to the tensor's place."""
    others: tuple[str, ...]
    """Names that have no place."""

    @property
    def n_head(self) -> int | None:
        """The number of heads, if each head is a tensor of its own."""
        has_heads = any("{head}" in name for name in _parts(self.names.modules["attn.c_attn"]))
        return 1 + max(place.head for place in self.places.values()) if has_heads else None

    def names_of(self, *roles: str) -> tuple[str, ...]:
        """The file's names of the weights that have these roles."""
        return tuple(n for n, place in self.places.items() if place.role in roles and place.parameter == "weight")

    def joined(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors under this project's names, with heads and queries, keys and values joined.

        Raises:
            UserError: two tensors have one place, a part of a joined tensor is missing or has another shape than the
                others, or the trainer's models have something that is missing.
        """
        self._check_missing()
        groups: dict[str, list[str]] = {}
        for name, place in self.places.items():
            groups.setdefault(place.ours, []).append(name)
        joined = {ours: self._join({name: tensors[name] for name in group}) for ours, group in groups.items()}
        return joined | self._projections(joined)

    def _projections(self, joined: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The identity for each layer, if the trainer's attention has no output projection: the result is the same."""
        if "attn.c_proj" in self.names.modules:
            return {}
        layers = {place.layer for place in self.places.values() if place.role == "attn.c_attn"}
        weights = {layer: joined.get(Place("attn.c_attn", "weight", 0, layer).ours) for layer in layers}
        return {
            Place("attn.c_proj", "weight", 0, layer).ours: torch.eye(weight.shape[1], dtype=weight.dtype)
            for layer, weight in weights.items()
            if weight is not None and weight.ndim == 2 and weight.shape[0] == 3 * weight.shape[1]
        }

    def _join(self, group: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One tensor from its parts. A part that has no bias, where others have one, gets zeros."""
        name, tensor = next(iter(group.items()))
        first = self.places[name]
        modules = _parts(self.names.modules[first.role])
        if len(modules) == 1:
            is_turned = self.names.is_transposed and first.role in CONV1D and tensor.ndim == 2
            return tensor.t().contiguous() if is_turned else tensor
        found = {(self.places[name].part, self.places[name].head): part for name, part in group.items()}
        wanted = list(product(range(len(modules)), range(self.n_head or 1)))
        missing = [(part, head) for part, head in wanted if (part, head) not in found]
        if first.parameter == "bias":  # a part that never has a bias has zeros
            missing = [(part, head) for part, head in missing if (first.role, part) in self._biased]
        if missing:
            names = [modules[part].format(i=first.layer, head=head) for part, head in missing]
            raise UserError(f"it lacks {some_of([repr(f'{self.prefix}{one}.{first.parameter}') for one in names], 5)}")
        if other := next((name for name, part in group.items() if part.shape != tensor.shape), None):
            raise UserError(
                f"{other!r} has shape {tuple(group[other].shape)}, but {name!r} has {tuple(tensor.shape)}: queries, "
                "keys and values must have one shape"
            )
        return torch.cat([found[key] if key in found else torch.zeros_like(tensor) for key in wanted])

    @cached_property
    def _biased(self) -> set[tuple[str, int]]:
        """The roles and parts that have a bias somewhere."""
        return {(place.role, place.part) for place in self.places.values() if place.parameter == "bias"}

    @property
    def unbiased_parts(self) -> list[str]:
        """Queries, keys or values that have no bias, while others of the three have one."""
        modules = _parts(self.names.modules["attn.c_attn"])
        biased = [part for part in range(len(modules)) if ("attn.c_attn", part) in self._biased]
        return [f"{modules[part]}.bias" for part in range(len(modules)) if biased and part not in biased]

    def _check_missing(self) -> None:
        """Check what no shape shows: no place is taken twice; heads, ties and biases are the trainer's."""
        taken: dict[Place, str] = {}
        for name, place in self.places.items():
            if (other := taken.setdefault(place, name)) != name:
                raise UserError(f"{other!r} and {name!r} are the same weight: save one of them alone")
        if self.n_head is not None and self.n_head > len(self.places):
            raise UserError(f"it has a head numbered {self.n_head - 1}, but too few tensors for so many heads")
        needed = [] if self.names.may_tie else [("wte", "weight"), ("lm_head", "weight")]
        if self.names.has_biases:
            needed += [
                (role, "bias") for role in self.names.modules if role not in ("wte", "wpe", "attn.c_attn", "lm_head")
            ]
        has = {(place.role, place.parameter) for place in self.places.values()}
        if missing := [(role, parameter) for role, parameter in needed if (role, parameter) not in has]:
            told = [f"{self.prefix}{_parts(self.names.modules[role])[0].format(i=0)}.{kind}" for role, kind in missing]
            raise UserError(f"it lacks {some_of(list(map(repr, told)), 5)}")


def place_names(shapes: Mapping[str, tuple[int, ...]]) -> Placed:
    """Find the trainer whose names the tensors of a file have: the entry of the table that knows the most of them.

    Args:
        shapes: the file's names, and the shape of each tensor.

    Raises:
        UserError: two names become the same, the file holds several models, or no trainer has most of the names.
    """
    clean: dict[str, str] = {}
    for name in shapes:
        stripped = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if stripped in clean:
            raise UserError(f"the weights {clean[stripped]!r} and {name!r} are both {stripped!r}")
        clean[stripped] = name
    best = max((_place(names, clean) for names in TABLE), key=lambda one: (len(one.places), _is_turned(one, shapes)))
    if not best.places or 2 * len(best.places) < len(shapes) or not best.names_of("ln_1"):
        raise UserError(_unknown_names(list(shapes)))
    return best


def _place(names: Names, clean: Mapping[str, str]) -> Placed:
    """Place the names that the entry knows, behind the prefix that most of them have."""
    templates = _templates(names)
    found = {name: one for name in clean if (one := _find(templates, name, names.parameters)) is not None}
    counts = Counter(prefix for prefix, _ in found.values()).most_common(2)
    if len(counts) == 2 and counts[1][1] > max(3, counts[0][1] // 2):
        raise UserError(
            f"holds two models, whose names begin with {counts[0][0]!r} and {counts[1][0]!r}: save one of them alone"
        )
    prefix = counts[0][0] if counts else ""
    places = {clean[name]: place for name, (begin, place) in found.items() if begin == prefix}
    if not any(place.role == "lm_head" for place in places.values()):  # it may stand outside of the model's body
        places |= {
            clean[name]: place
            for name, (begin, place) in found.items()
            if place.role == "lm_head" and prefix.startswith(begin)
        }
    others = [name for name in clean.values() if name not in places and not name.endswith(names.left_out)]
    return Placed(names, prefix, places, tuple(others))


def _parts(module: str | tuple[str, ...]) -> tuple[str, ...]:
    return (module,) if isinstance(module, str) else module


def _templates(names: Names) -> dict[str, list[tuple[list[str], str, int]]]:
    """The names of an entry, by their form: each number replaced by `#`."""
    templates: dict[str, list[tuple[list[str], str, int]]] = {}
    for role, module in names.modules.items():
        for part, name in enumerate(_parts(module)):
            pieces = name.split(".")
            templates.setdefault(_form(pieces), []).append((pieces, role, part))
    return templates


def _form(pieces: Sequence[str]) -> str:
    return ".".join("#" if piece.isdecimal() or piece in ("{i}", "{head}") else piece for piece in pieces)


def _find(
    templates: Mapping[str, list[tuple[list[str], str, int]]], name: str, parameters: Mapping[str, str]
) -> tuple[str, Place] | None:
    """The prefix and the place of a name; None if the entry does not know it."""
    *pieces, last = name.split(".")
    if last not in parameters:
        return None
    for start in range(max(0, len(pieces) - MAX_PIECES), len(pieces)):
        for template, role, part in templates.get(_form(pieces[start:]), []):
            numbers = {want: piece for want, piece in zip(template, pieces[start:], strict=True) if want != piece}
            if all(want in ("{i}", "{head}") and len(n) <= MAX_DIGITS for want, n in numbers.items()):
                layer, head = int(numbers.get("{i}", 0)), int(numbers.get("{head}", 0))
                return ".".join([*pieces[:start], ""]), Place(role, parameters[last], part, layer, head)
    return None


def _is_turned(placed: Placed, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the joined projection is (in, out) or (out, in) as the entry has it."""
    joined = [shapes[name] for name in placed.names_of("attn.c_attn") if len(shapes[name]) == 2]
    return bool(joined) and placed.names.is_transposed == (3 * joined[0][0] == joined[0][1])


def _unknown_names(names: list[str]) -> str:
    said = f"its {len(names)} tensors ({', '.join(names[:5])}, …) have the names of no trainer that is known here"
    if any(".norm_1." in name for name in names) and any(name.startswith("transformer.h.") for name in names):
        return f"{said}. {LITGPT}"
    if any(mark in name.lower() for name in names for mark in LLAMA_MARKS):
        return f"{said}. {LLAMA}"
    return f"{said}: name the class or function that makes your model, such as --model train.py:GPT"
