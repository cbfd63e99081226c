"""Load a converted folder with quantized weights in several ways, and compare them with float32.

Prints a table of the speed, the memory of the weights, and how far the logits move. Uses a GPU if there is one.

python -m examples.quantization.measure --model capitals-hf
python -m examples.quantization.measure --random 12 768 12 32000
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig, TorchAoConfig
from transformers.utils import logging

from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.devices import pick_device
from hf_model.errors import one_line

NEW_TOKENS = 32


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    from torchao.quantization import Int4WeightOnlyConfig

    return TorchAoConfig(Int4WeightOnlyConfig(group_size=32))


def torchao_int8_dynamic() -> TorchAoConfig:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


# A name for each way, its configuration, and the dtype of the weights that stay unquantized.
WAYS: dict[str, tuple[Callable[[], object], torch.dtype]] = {
    "torchao int8": (torchao_int8, torch.float32),
    "torchao int8, dynamic": (torchao_int8_dynamic, torch.float32),
    "torchao int4": (torchao_int4, torch.bfloat16),
    "hqq 8 bits": (lambda: HqqConfig(nbits=8, group_size=32), torch.float32),
    "hqq 4 bits": (lambda: HqqConfig(nbits=4, group_size=32), torch.float32),
    "bitsandbytes 8 bits": (lambda: BitsAndBytesConfig(load_in_8bit=True), torch.float32),
    "bitsandbytes nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), torch.float32),
}


@contextlib.contextmanager
def folder_of(args: argparse.Namespace) -> Iterator[str]:
    """The folder given by --model, or a temporary one with random weights."""
    if args.random is None:
        yield args.model
        return
    n_layer, n_embd, n_head, vocab_size = args.random
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab_size, "block_size": 1024}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        CustomGPTForCausalLM(CustomGPTConfig(**sizes)).save_pretrained(folder)
        yield folder


@torch.inference_mode()
def speed(model: Any) -> float:
    """Tokens per second of one greedy answer, the faster of two."""
    prompt = torch.arange(8, 16, device=model.device)[None]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        output = model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return (output.shape[1] - prompt.shape[1]) / min(seconds)


def measure(folder: str, name: str, ids: torch.Tensor, expected: torch.Tensor, plain: float) -> str:
    """A row of the table. `plain` is the speed of the plain model; `expected` are its logits."""
    config, dtype = WAYS[name]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config(), device_map=ids.device
        )
        with torch.inference_mode():
            logits = model(input_ids=ids).logits.float()
        rate = speed(model)
    except Exception as error:  # a library may fail in any way on a machine that it does not support
        return f"| {name} | does not work here: {type(error).__name__}: {one_line(error, 160)} | | | | |"
    moved = (logits - expected).abs()
    spread = expected.std().item()
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    size = model.get_memory_footprint() / 1e6
    return f"| {name} | {rate:.1f} | {rate / plain:.2f} | {size:.0f} MB | {moved.mean() / spread:.4f} | {same:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="converted folder")
    which.add_argument("--random", type=int, nargs=4, metavar=("LAYERS", "WIDTH", "HEADS", "VOCABULARY"))
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with folder_of(args) as folder:
        model = AutoModelForCausalLM.from_pretrained(Path(folder)).eval().to(pick_device(args.device))
        size = min(64, model.config.block_size)
        ids = torch.randint(8, model.config.vocab_size, (4, size), generator=torch.Generator().manual_seed(0))
        ids = ids.to(model.device)
        with torch.inference_mode():
            expected = model(input_ids=ids).logits.float()
        plain = speed(model)
        print(f"{model.device}, torch {torch.__version__}\n")
        print(
            "| weights | tokens/s | of the plain model's | memory | logits moved (of their spread) | same likeliest |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        print(f"| float32, plain | {plain:.1f} | 1 | {model.get_memory_footprint() / 1e6:.0f} MB | 0 | 100% |")
        for name in args.only:
            print(measure(folder, name, ids, expected, plain), flush=True)


if __name__ == "__main__":
    main()
