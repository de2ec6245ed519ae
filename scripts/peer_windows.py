#!/usr/bin/env python3
"""Calibration windows drawn as GPTQModel is given them in the comparison: 128 of 2048 tokens, torch's generator, seed 0.

usage: peer_windows.py MODEL_FOLDER TEXT OUT.safetensors        (needs torch; `gptq quantize --dataset OUT.safetensors`)
"""
import sys

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

WINDOW, COUNT = 2048, 128


def main():
    folder, text, out = sys.argv[1:4]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    ids = tokenizer(open(text).read(), return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randint(0, ids.numel() - WINDOW - 1, (1,), generator=generator).item() for _ in range(COUNT)]
    save_file({"input_ids": torch.stack([ids[start : start + WINDOW] for start in starts]).to(torch.int32)}, out)


if __name__ == "__main__":
    main()
