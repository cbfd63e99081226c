"""The engines under comparison, each built from one plain GPT: a function from (prompts, number of tokens) to tokens.

All decode greedily on the CPU with the threads of PyTorch and never stop early. An engine that is not installed raises
ImportError when it is built; one that does not do what it is asked for raises NotImplementedError.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from examples.plain_gpt import GPT
from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.fast_cpu import fast_on_cpu

Prompts = list[list[int]]  # all of one length
Generate = Callable[[Prompts, int], list[list[int]]]


def original(gpt: GPT, folder: Path) -> Generate:
    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        if len(prompts) > 8:
            raise NotImplementedError("one after the other: no faster than eight, and minutes long")
        rows = [gpt.generate(torch.tensor([prompt]), new, temperature=0) for prompt in prompts]
        return [row[0, len(prompts[0]) :].tolist() for row in rows]

    return generate


class ThroughGenerate:
    """A transformers model as its users run it."""

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
    model = CustomGPTForCausalLM(CustomGPTConfig(**gpt.model_args())).eval()
    model.load_state_dict(gpt.state_dict())
    return model


def ours(gpt: GPT, folder: Path, dtype: torch.dtype = torch.float32, is_fast: bool = True) -> ThroughGenerate:
    """A saved folder by `from_pretrained`, in its fast form as `hf_model.load` gives it, or as it is."""
    if not (folder / "hf").exists():
        twin(gpt).save_pretrained(folder / "hf")
    model = CustomGPTForCausalLM.from_pretrained(folder / "hf", dtype=dtype)
    return ThroughGenerate(fast_on_cpu(model) if is_fast else model)


def gpt2(gpt: GPT) -> GPT2LMHeadModel:
    """The same weights in the library's GPT-2, whose projections are stored transposed and always have a bias."""
    args = gpt.config
    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.block_size,
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=args.n_head,
        activation_function="gelu",
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config).eval()
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {name: w.t() if name.endswith(projections) else w for name, w in gpt.state_dict().items()}
    biases = {name: torch.zeros_like(b) for name, b in model.state_dict().items() if name.endswith("bias")}
    model.load_state_dict(biases | weights)
    return model


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
        options = {"max_length": new, "min_length": new}  # never the end token
        results = generator.generate_batch(tokens, beam_size=1, include_prompt_in_result=False, **options)
        return [[int(token) for token in result.sequences[0]] for result in results]

    return generate


def llama_cpp(gpt: GPT, folder: Path, quantization: str = "F32") -> Generate:
    """llama.cpp's own GPT-2, with the tanh GELU in place of the exact one: the same work, nearly the same numbers."""
    from llama_cpp import Llama, llama_get_logits_ith

    from hf_model.formats.gguf import write_file

    args, path = gpt.config, folder / f"{quantization}.gguf"
    if not path.exists():
        write_file(path, twin(gpt), quantization.lower(), vocabulary=None)
    threads = torch.get_num_threads()
    llama = Llama(str(path), n_ctx=args.block_size, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        if len(prompts) > 1 or len(prompts[0]) + new > args.block_size:
            raise NotImplementedError("one sequence within the context, by this binding's simple interface")
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
