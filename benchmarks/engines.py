"""The engines that the benchmarks compare. Each is built from one plain GPT and continues prompts.

All decode greedily on the CPU, with as many threads as PyTorch has, and never stop early. An engine that is not
installed raises ImportError when it is built. An engine that cannot do a case raises NotImplementedError.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from examples.plain_gpt import GPT
from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.fast_cpu import fast_on_cpu
from hf_model.formats.gguf import write_file
from hf_model.formats.gpt2 import stock_model
from hf_model.loading import with_weights

Prompts = list[list[int]]  # all of one length
Generate = Callable[[Prompts, int], list[list[int]]]  # prompts and the number of new tokens -> the new tokens


def original(gpt: GPT, folder: Path) -> Generate:
    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        if len(prompts) > 8:
            raise NotImplementedError("prompts run one after another, so 32 take minutes and are no faster than 8")
        rows = [gpt.generate(torch.tensor([prompt]), new, temperature=0) for prompt in prompts]
        return [row[0, len(prompts[0]) :].tolist() for row in rows]

    return generate


class ThroughGenerate:
    """A transformers model, run by its `generate`."""

    def __init__(self, model: PreTrainedModel):
        model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
        self.model = model

    def __call__(self, prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        if ids.shape[1] + new > self.model.config.max_position_embeddings and self.model.config.model_type == "gpt2":
            raise NotImplementedError("GPT2LMHeadModel ends with its context")
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        return output[:, ids.shape[1] :].tolist()


def twin(gpt: GPT) -> CustomGPTForCausalLM:
    """The same weights in this repository's model."""
    return with_weights(CustomGPTConfig(**gpt.model_args()), gpt.state_dict())


def ours(gpt: GPT, folder: Path, dtype: torch.dtype = torch.float32, is_fast: bool = True) -> ThroughGenerate:
    """A saved folder by `from_pretrained`, in its fast form as `hf_model.load` gives it, or as it is."""
    if not (folder / "hf").exists():
        twin(gpt).save_pretrained(folder / "hf")
    model = CustomGPTForCausalLM.from_pretrained(folder / "hf", dtype=dtype)
    return ThroughGenerate(fast_on_cpu(model) if is_fast else model)


def gpt2(gpt: GPT) -> GPT2LMHeadModel:
    """The same weights in the library's GPT-2, as `--format gpt2` writes them."""
    return stock_model(twin(gpt)).eval()


def gpt2_in_transformers(gpt: GPT, folder: Path) -> Generate:
    return ThroughGenerate(gpt2(gpt))


def ctranslate2(gpt: GPT, folder: Path, compute_type: str = "float32") -> Generate:
    from ctranslate2 import Generator
    from ctranslate2.converters.transformers import GPT2Loader

    if not (folder / "ct2").exists():
        loader = GPT2Loader()
        model = gpt2(gpt)
        spec = loader.get_model_spec(model)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.register_vocabulary([str(i) for i in range(gpt.config.vocab_size)])
        spec.validate()
        spec.optimize(quantization=None)
        (folder / "ct2").mkdir()
        spec.save(str(folder / "ct2"))
    threads = torch.get_num_threads()
    generator = Generator(str(folder / "ct2"), compute_type=compute_type, inter_threads=1, intra_threads=threads)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        if len(prompts[0]) + new > gpt.config.block_size:
            raise NotImplementedError("CTranslate2 ends with the context")
        tokens = [[str(i) for i in prompt] for prompt in prompts]
        options = {"max_length": new, "min_length": new}  # min_length forbids the end token
        results = generator.generate_batch(tokens, beam_size=1, include_prompt_in_result=False, **options)
        return [[int(token) for token in result.sequences[0]] for result in results]

    return generate


def llama_cpp(gpt: GPT, folder: Path, quantization: str = "F32") -> Generate:
    """llama.cpp's own GPT-2. It computes the tanh GELU, not the exact one: the same work, nearly the same numbers."""
    from llama_cpp import Llama, llama_get_logits_ith

    args, path = gpt.config, folder / f"{quantization}.gguf"
    if not path.exists():
        write_file(path, twin(gpt), quantization.lower(), tokenizer=None)
    threads = torch.get_num_threads()
    llama = Llama(str(path), n_ctx=args.block_size, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        if len(prompts) > 1 or len(prompts[0]) + new > args.block_size:
            raise NotImplementedError("the binding's simple interface runs one sequence, within the context")
        llama.reset()
        llama.eval(prompts[0])
        tokens: list[int] = []
        while True:
            logits = np.ctypeslib.as_array(llama_get_logits_ith(llama.ctx, -1), (args.vocab_size,))
            tokens.append(int(logits.argmax()))
            if len(tokens) == new:
                return [tokens]
            llama.eval(tokens[-1:])

    return generate


ENGINES: dict[str, Callable[[GPT, Path], Generate]] = {
    "original": original,
    "transformers GPT-2": gpt2_in_transformers,
    "CTranslate2 f32": ctranslate2,
    "llama.cpp f32": llama_cpp,
    "this repository f32": ours,
    "AutoModelForCausalLM f32": partial(ours, is_fast=False),
    "llama.cpp f16": partial(llama_cpp, quantization="F16"),
    "this repository f16": partial(ours, dtype=torch.float16),
    "this repository bf16": partial(ours, dtype=torch.bfloat16),
    "AutoModelForCausalLM bf16": partial(ours, dtype=torch.bfloat16, is_fast=False),
    "llama.cpp q8_0": partial(llama_cpp, quantization="Q8_0"),
    "CTranslate2 int8": partial(ctranslate2, compute_type="int8"),
}
