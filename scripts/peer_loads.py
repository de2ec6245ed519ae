#!/usr/bin/env python3
"""Load checkpoints of this project in GPTQModel and compare its logits with ours.

usage: peer_loads.py BACKEND FOLDER...        (needs CUDA, torch and GPTQModel; BACKEND: TORCH, MARLIN, ...)

Each FOLDER holds `expected.safetensors`, made by `gptq verify FOLDER --write FOLDER/expected.safetensors --ids ...`.
Prints a line a folder: mean KL divergence from our f32 logits, the share of equal top tokens, and the widest gap between
our two largest logits at a position where the top token differs (a tie that half precision can turn). A folder passes with
KL <= 1e-3 and 99 % equal top tokens. Exit 1 if one does not pass.
"""
import sys
import traceback

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file


def check(folder, backend):
    expected = load_file(f"{folder}/expected.safetensors")
    model = GPTQModel.load(folder, backend=backend, device="cuda:0")
    with torch.inference_mode():
        ids = expected["input_ids"].long().unsqueeze(0).cuda()
        got = model.model(ids).logits[0].float().cpu().log_softmax(-1)
    want = expected["logits"].log_softmax(-1)
    kl = (want.exp() * (want - got)).sum(-1).mean().item()
    differs = want.argmax(-1) != got.argmax(-1)
    first, second = want.topk(2, -1).values.unbind(-1)
    gap = (first - second)[differs].max().item() if differs.any() else 0.0
    return kl, 1 - differs.float().mean().item(), gap


def main():
    backend = getattr(BACKEND, sys.argv[1])
    failed = 0
    for folder in sys.argv[2:]:
        try:
            kl, top1, gap = check(folder, backend)
            passed = kl <= 1e-3 and top1 >= 0.99
            print(f"RESULT {'pass' if passed else 'FAIL'} {folder} KL {kl:.3e} top-1 {top1:.4f} gap {gap:.4f}", flush=True)
        except Exception as error:
            traceback.print_exc()
            passed = False
            print(f"RESULT FAIL {folder} {type(error).__name__}: {error}", flush=True)
        failed += not passed
    print(f"RESULT {len(sys.argv) - 2 - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
