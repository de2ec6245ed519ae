#!/usr/bin/env python3
"""Checkpoints that GPTQModel writes, for reading them with this project.

usage: peer_quantize.py MODEL_FOLDER WINDOWS.safetensors OUT_FOLDER NAME=JSON...      (needs CUDA, torch and GPTQModel)

WINDOWS: input_ids [samples, tokens]. JSON: arguments of GPTQModel's QuantizeConfig; the result goes to OUT_FOLDER/NAME with the
model's tokenizer beside it.
"""
import gc
import json
import os
import shutil
import sys

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast


def main():
    folder, windows, out = sys.argv[1:4]
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", **special).save_pretrained(folder)
    ids = load_file(windows)["input_ids"].tolist()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    for setting in sys.argv[4:]:
        name, given = setting.split("=", 1)
        model = GPTQModel.load(folder, QuantizeConfig(**json.loads(given)))
        model.quantize(data, batch_size=8)
        model.save(f"{out}/{name}")
        shutil.copy(f"{folder}/tokenizer.json", f"{out}/{name}/tokenizer.json")
        print("RESULT wrote", name, os.listdir(f"{out}/{name}"), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
