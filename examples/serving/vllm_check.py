"""Run a converted folder in vLLM, and compare its log-probabilities with those of transformers.

    python -m examples.serving.vllm_check capitals-hf-gpt2
    python -m examples.serving.vllm_check capitals-hf --server
    VLLM_CPU_OMP_THREADS_BIND="0|1" python -m examples.serving.vllm_check capitals-hf --tensor_parallel_size 2

vLLM runs a stock folder (`--format gpt2`) with its own GPT-2, and a folder with custom code with its Transformers
backend. Without `--server`, vLLM computes the log-probabilities of random prompts. With `--server`, `vllm serve`
answers the `openai` client: completions and, if the folder has a chat template, a question and a conversation. Each
answer comes with its ids and their log-probabilities, which are compared too. docs/serving.md tells how to install
vLLM on a CPU.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.serving.process import running

# Settings that vLLM needs on a CPU and ignores on a GPU: the size of its cache in gigabytes, and how workers start.
for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_WORKER_MULTIPROC_METHOD", "spawn")):
    os.environ.setdefault(name, value)

N_PROMPTS = 8
N_NEW = 16
ALLOWED = 1e-4  # of a log-probability: float32 sums in another order
START_SECONDS = 600
CHAT: list[Any] = [
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome"},
    {"role": "user", "content": "What is the capital of Peru?"},
    {"role": "assistant", "content": "Lima"},
    {"role": "user", "content": "What is the capital of France?"},
]


class Reference:
    """The folder in transformers, in float32."""

    def __init__(self, folder: str):
        # Load it before vLLM, which changes the class of a custom model.
        self.is_custom = "auto_map" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=self.is_custom, dtype=torch.float32
        )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.is_custom)
        self.context: int = self.model.config.max_position_embeddings

    @torch.inference_mode()
    def log_probs(self, ids: list[int]) -> list[float]:
        """The log-probability of each token but the first."""
        row = torch.tensor([ids])
        log_probs = self.model(row, use_cache=False).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
        return log_probs.gather(1, row[0, 1:, None])[:, 0].tolist()

    def random_prompts(self, length: int) -> list[list[int]]:
        """Ids that the tokenizer has, so that their text can be sent to a server."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(len(self.tokenizer), (N_PROMPTS, length), generator=generator).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--server", action="store_true", help="by `vllm serve` and the openai client")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    args = parser.parse_args()

    reference = Reference(args.folder)
    if (heads := reference.model.config.num_attention_heads) % args.tensor_parallel_size:
        parser.error(f"argument --tensor_parallel_size: {heads} heads are not shared equally")
    packages = ", ".join(f"{name} {version(name)}" for name in (vllm_package(), "torch", "transformers"))
    backend = "the Transformers backend" if reference.is_custom else "vLLM's own model"
    print(f"{args.folder}: {backend}, {packages}, {args.tensor_parallel_size} of tensor parallel")
    differences = list(by_server(args, reference) if args.server else offline(args, reference))
    print(f"largest difference of a log-probability: {max(differences):.1e} (allowed {ALLOWED:.0e})")
    sys.exit(max(differences) > ALLOWED)


def vllm_package() -> str:
    """The name of the package that installed vLLM."""
    return packages_distributions()["vllm"][0]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def offline(args: argparse.Namespace, reference: Reference) -> Iterator[float]:
    prompts = reference.random_prompts(reference.context - 1)
    expected = [reference.log_probs(prompt) for prompt in prompts]

    from vllm import LLM, SamplingParams

    how = {"model_impl": "transformers", "trust_remote_code": True} if reference.is_custom else {}
    llm = LLM(args.folder, dtype="float32", enforce_eager=True, tensor_parallel_size=args.tensor_parallel_size, **how)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    for prompt, ours, output in zip(prompts, expected, outputs, strict=True):
        rows = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        yield largest_difference(ours, [row[token].logprob for token, row in rows])
    print(f"offline: {len(prompts)} prompts of {reference.context - 1} tokens")


def by_server(args: argparse.Namespace, reference: Reference) -> Iterator[float]:
    import openai

    tokenizer = reference.tokenizer
    more = {"return_token_ids": True, "prompt_logprobs": 0}
    how: dict[str, Any] = {"model": args.folder, "temperature": 0, "max_tokens": N_NEW, "extra_body": more}
    with served(args, reference) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        for prompt in reference.random_prompts(reference.context // 2):
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            # Bytes that are not UTF-8 become several tokens, so the text may be longer than its ids were.
            while text and len(tokenizer(text).input_ids) + N_NEW > reference.context:
                text = text[: len(text) // 2]
            choice: Any = client.completions.create(prompt=text, logprobs=0, **how).choices[0]
            print(f"completion: {choice.text!r} ({choice.finish_reason})")
            yield compare(reference, tokenizer(text).input_ids, choice, choice, choice.logprobs.token_logprobs)
        if tokenizer.chat_template is None:
            return
        for messages in (CHAT[-1:], CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]):
            chat: Any = client.chat.completions.create(messages=messages, logprobs=True, **how)
            choice = chat.choices[0]
            print(f"chat of {len(messages)} messages: {choice.message.content!r} ({choice.finish_reason})")
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
            yield compare(reference, ids, chat, choice, [token.logprob for token in choice.logprobs.content])


def compare(reference: Reference, prompt: list[int], asked: Any, said: Any, log_probs: list[float]) -> float:
    """The largest difference over a prompt and its answer. The prompt's ids must equal ours.

    Args:
        asked: holds the ids of the prompt and their log-probabilities.
        said: holds the ids of the answer, whose log-probabilities are `log_probs`.
    """
    if asked.prompt_token_ids != prompt:
        sys.exit(f"the server's prompt is {asked.prompt_token_ids}, the tokenizer's {prompt}")
    of_prompt = [row[str(token)]["logprob"] for token, row in zip(prompt[1:], asked.prompt_logprobs[1:], strict=True)]
    return largest_difference(reference.log_probs(prompt + said.token_ids), of_prompt + log_probs)


@contextmanager
def served(args: argparse.Namespace, reference: Reference) -> Iterator[str]:
    """The address of a `vllm serve` process on this machine. Its log is vllm_serve.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not the command `vllm serve`: that of vllm-cpu 0.32.0 looks for a package named vllm, and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    command += ["--model-impl", "transformers", "--trust-remote-code"] if reference.is_custom else []
    print("$", *command)
    address = f"http://127.0.0.1:{port}"
    try:
        with running(command, address, Path("vllm_serve.log"), START_SECONDS):
            yield f"{address}/v1"
    except RuntimeError as error:
        sys.exit(f"vllm serve: {error}")


if __name__ == "__main__":
    main()
