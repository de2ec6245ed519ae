#!/usr/bin/env python3
"""Perplexity of checkpoints of this project as GPTQModel reads and runs them.

usage: peer_perplexity.py TEXT FOLDER...        (needs CUDA, torch and GPTQModel)

TEXT is tokenized as one string with the first folder's tokenizer.json, no special tokens, cut into windows of 2048 without
overlap; each counts its mean over 2047 predictions. A line a folder.
"""
import gc
import math
import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import PreTrainedTokenizerFast

WINDOW = 2048


def perplexity(folder, ids):
    model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cuda:0").model
    losses = []
    with torch.inference_mode():
        for window in ids[: ids.numel() // WINDOW * WINDOW].view(-1, 1, WINDOW).cuda():
            logits = model(window).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def main():
    text, folders = sys.argv[1], sys.argv[2:]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folders[0]}/tokenizer.json")
    ids = tokenizer(open(text).read(), return_tensors="pt").input_ids[0]
    for folder in folders:
        print(f"RESULT {folder} {perplexity(folder, ids):.3f}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
