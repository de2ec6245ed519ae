#!/usr/bin/env python3
"""Load checkpoints of this project in GPTQModel and compare its logits with ours.

usage: peer_loads.py BACKEND FOLDER...        (needs CUDA, torch and GPTQModel; BACKEND: TORCH, MARLIN, ...)

Each FOLDER holds `expected-NAME-0.safetensors` and so on, made by `gptq verify FOLDER --write ... --ids ...`: one file is one
sequence, and those of one NAME (f32, f16: what our logits were computed in) count together. GPTQModel computes in f16.
Prints a line a folder and NAME: mean KL divergence from our logits, the share of equal top tokens, and the widest gap between
our two largest logits where the top token differs (a tie that half precision can turn). A line passes with KL <= 1e-3 and
99 % equal top tokens. Exit 1 if one does not pass.
"""
import sys
import traceback
from collections import defaultdict
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file


def sequences(folder):
    names = defaultdict(list)
    for file in sorted(Path(folder).glob("expected-*.safetensors")):
        names[file.stem.split("-")[1]].append(file)
    return names


def check(model, files):
    kl, equal, gap, positions = 0.0, 0, 0.0, 0
    for file in files:
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
    return kl / positions, equal / positions, gap, positions


def main():
    backend = getattr(BACKEND, sys.argv[1])
    failed = 0
    for folder in sys.argv[2:]:
        try:
            model = GPTQModel.load(folder, backend=backend, device="cuda:0")
            for name, files in sequences(folder).items():
                kl, top1, gap, positions = check(model, files)
                passed = kl <= 1e-3 and top1 >= 0.99
                failed += not passed
                verdict = "pass" if passed else "FAIL"
                print(f"RESULT {verdict} {folder} {name} {positions} positions KL {kl:.3e} top-1 {top1:.4f} gap {gap:.4f}", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"RESULT FAIL {folder} {type(error).__name__}: {error}", flush=True)
            failed += 1
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
