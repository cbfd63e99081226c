"""Two processes that share the weights of one model, on the loopback.

`torchrun` runs this file too: as a script it is one of the processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers.distributed import DistributedConfig

from hf_model import CustomGPTConfig, CustomGPTForCausalLM

PROCESSES = 2
SHAPES = {"biases": {"bias": True, "tie_word_embeddings": False}, "tied": {"bias": False, "tie_word_embeddings": True}}
INPUT_IDS = torch.arange(2 * 30).reshape(2, 30) % 97


def run_rank(folder: str) -> None:
    """Load this process's shards of each model and save what it gives. Every process has the whole of the logits."""
    for name in SHAPES:
        model = CustomGPTForCausalLM.from_pretrained(
            f"{folder}/{name}", distributed_config=DistributedConfig(tp_plan="auto")
        ).eval()
        block = model.transformer.h[0]
        with torch.no_grad():
            result = {
                "logits": model(INPUT_IDS).logits,
                "tokens": model.generate(INPUT_IDS[:, :8], max_new_tokens=8, do_sample=False),
                "local_shapes": {
                    name: tuple(parameter.to_local().shape)
                    for name, parameter in block.named_parameters()
                    if hasattr(parameter, "to_local")
                },
            }
        torch.save(result, f"{folder}/{name}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_logits_and_tokens_of_one(tmp_path: Path) -> None:
    models = {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        # 97 rows, so that the vocabulary does not divide by the number of processes.
        config = CustomGPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32, **shape)
        models[name] = CustomGPTForCausalLM(config).eval()
        models[name].save_pretrained(tmp_path / name)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    subprocess.run(
        [*torchrun, "--module", f"tests.{Path(__file__).stem}", tmp_path],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=True,
    )

    for name, model in models.items():
        for rank in range(PROCESSES):
            result = torch.load(tmp_path / f"{name}.{rank}")
            torch.testing.assert_close(result["logits"], model(INPUT_IDS).logits)
            assert torch.equal(result["tokens"], model.generate(INPUT_IDS[:, :8], max_new_tokens=8, do_sample=False))
            assert result["local_shapes"]["attn.c_attn.weight"] == (3 * 32 // PROCESSES, 32)
            assert result["local_shapes"]["attn.c_proj.weight"] == (32, 32 // PROCESSES)
            assert result["local_shapes"]["mlp.c_fc.weight"] == (4 * 32 // PROCESSES, 32)
            assert result["local_shapes"]["mlp.c_proj.weight"] == (32, 4 * 32 // PROCESSES)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
