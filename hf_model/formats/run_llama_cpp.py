"""A program of its own: logits of ids and the ids of texts by llama.cpp. It imports nothing of this package."""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    llama = llama_cpp.Llama(
        request["path"],
        n_ctx=len(request["ids"]),
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # keys and values are rounded to half precision otherwise
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llama.eval(request["ids"])
    np.save(answer_path, llama.scores[: len(request["ids"])][-request["keep"] :])
    print(json.dumps([llama.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
