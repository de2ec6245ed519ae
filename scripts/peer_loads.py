#!/usr/bin/env python3
"""Load checkpoints of this project in GPTQModel and compare its logits with ours.

usage: peer_loads.py BACKEND DTYPE FOLDER...     (needs CUDA, torch and GPTQModel; BACKEND: TORCH, MARLIN, ...; DTYPE: the
                                                 type GPTQModel computes in, float16, bfloat16 or float32)

Each FOLDER holds `expected-*.safetensors`, made by `gptq verify FOLDER --write FOLDER/expected-0.safetensors --ids ...`; one
is a sequence, and all of them count together. Prints a line a folder: mean KL divergence from our logits, the share of equal
top tokens, and the widest gap between our two largest logits where the top token differs (a tie that half precision can
turn). A folder passes with KL <= 1e-3 and 99 % equal top tokens. Exit 1 if one does not pass.
"""
import sys
import traceback
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file


def check(folder, backend, dtype):
    model = GPTQModel.load(folder, backend=backend, device="cuda:0", dtype=dtype)
    computes_in = next(model.model.parameters()).dtype
    kl, equal, gap, positions = 0.0, 0, 0.0, 0
    for file in sorted(Path(folder).glob("expected-*.safetensors")):
        expected = load_file(file)
        with torch.inference_mode():
            ids = expected["input_ids"].long().unsqueeze(0).cuda()
            got = model.model(ids).logits[0].double().cpu().log_softmax(-1)
        want = expected["logits"].double().log_softmax(-1)
        kl += (want.exp() * (want - got)).sum().item()
        differs = want.argmax(-1) != got.argmax(-1)
        equal += (~differs).sum().item()
        first, second = want.topk(2, -1).values.unbind(-1)
        gap = max([gap] + (first - second)[differs].tolist())
        positions += len(want)
    return computes_in, kl / positions, equal / positions, gap, positions


def main():
    backend, dtype = getattr(BACKEND, sys.argv[1]), getattr(torch, sys.argv[2])
    folders = sys.argv[3:]
    failed = 0
    for folder in folders:
        try:
            computes_in, kl, top1, gap, positions = check(folder, backend, dtype)
            passed = kl <= 1e-3 and top1 >= 0.99
            verdict = "pass" if passed else "FAIL"
            print(f"RESULT {verdict} {folder} {computes_in} {positions} positions KL {kl:.3e} top-1 {top1:.4f} gap {gap:.4f}", flush=True)
        except Exception as error:
            traceback.print_exc()
            passed = False
            print(f"RESULT FAIL {folder} {type(error).__name__}: {error}", flush=True)
        failed += not passed
    print(f"RESULT {len(folders) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
