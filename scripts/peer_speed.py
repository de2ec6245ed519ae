#!/usr/bin/env python3
"""Speed of Marlin and of torch in f16, beside `gpu_linear` and `gptq eval --speed`.

usage: peer_speed.py FOLDER      (needs CUDA, torch and GPTQModel; FOLDER: a 4-bit g128 checkpoint of a Llama-2-7B shape)

Kernels: medians of triton's do_bench, which clears the second-level cache before each launch; then in a row, one CUDA graph
over eight weights that together do not fit into that cache. Then generate of transformers
with Marlin's linears: tokens a second at batch 1 and 16 behind a prompt of 16, and a prompt of 2048. The first run compiles Marlin.
"""
import sys
import time

import torch
from gptqmodel import BACKEND, GPTQModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from triton.testing import do_bench

ROWS = [1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
LINEARS = ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]


def microseconds(work):
    return 1e3 * do_bench(work, warmup=20, rep=60, return_mode="median")


def shown(name, layer, columns):
    times = []
    for rows in ROWS:
        x = torch.randn(rows, columns, dtype=torch.float16, device="cuda")
        times.append(f"{rows}: {microseconds(lambda: layer(x)):.1f}")
    print(f"RESULT {name}:", " ".join(times), "us", flush=True)


def in_a_row(name, layers, columns, runs=8):
    times = []
    for rows in [1, 4, 8, 16, 32, 64]:
        x = torch.randn(rows, columns, dtype=torch.float16, device="cuda")
        for layer in layers:
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(runs):
                for layer in layers:
                    layer(x)
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(runs):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(f"{rows}: {1e3 * begin.elapsed_time(end) / (runs * runs * len(layers)):.1f}")
    print(f"RESULT in a row, {name}:", " ".join(times), "us", flush=True)


def tokenizer(folder):
    """Random weights have none, and GPTQModel asks for one."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def rate(model, batch, tokens=64):
    x = torch.randint(3, 30000, (batch, 16), device="cuda")

    def generate(count):
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()

    generate(16)
    start = time.time()
    generate(tokens)
    return tokens * batch / (time.time() - start)


def main():
    folder = sys.argv[1]
    tokenizer(folder)
    loaded = GPTQModel.load(folder, backend=BACKEND.MARLIN, device="cuda:0")
    modules = dict(loaded.model.named_modules())
    with torch.inference_mode():
        for name in LINEARS:
            layer = modules[f"model.layers.0.{name}"]
            k, n = layer.in_features, layer.out_features
            shown(f"{type(layer).__name__} {k} x {n}", layer, k)
            weight = torch.randn(n, k, dtype=torch.float16, device="cuda")
            shown(f"torch f16 {k} x {n}", lambda x: torch.nn.functional.linear(x, weight), k)
            try:
                in_a_row(f"{type(layer).__name__} {k} x {n}", [modules[f"model.layers.{i}.{name}"] for i in range(8)], k)
            except RuntimeError as error:
                print(f"RESULT in a row, {type(layer).__name__} {k} x {n}: not in a CUDA graph ({error})"[:200], flush=True)
        for batch in (1, 16):
            print(f"RESULT generate, batch {batch}: {rate(loaded.model, batch):.1f} tokens/s", flush=True)
        x = torch.randint(3, 30000, (1, 2048), device="cuda")
        print(f"RESULT prompt of 2048: {microseconds(lambda: loaded.model(x)) / 1e3:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
