#!/usr/bin/env python3
"""Checkpoints of the model of tests/fixtures as GPTQModel writes them, with the logits that each must give.

usage: fixture_checkpoints.py FIXTURES_FOLDER [NAME...]      (needs CUDA, torch, transformers and GPTQModel 7.7.0)

FIXTURES_FOLDER as fixture_model.py leaves it. NAME: BITSbit-GROUPg-(v1|v2)-(sym|asym)[-act], by default all of CHECKPOINTS; `float`
scores the model itself and nothing else. Each goes to FIXTURES_FOLDER/gptqmodel/NAME with

    logits.safetensors    input_ids i32 [16], logits f32 [16, vocab]
    scores.json           nll of the held-out text

both computed in f64 by transformers from the tensors of the file, which this script unpacks by the rule of docs/FORMAT.md and not
with GPTQModel. What GPTQModel's own Torch kernel makes of the file is printed beside it.
"""
import gc
import json
import os
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fixture_model import nll

CHECKPOINTS = [
    "4bit-32g-v1-sym", "4bit-64g-v1-sym-act", "4bit-64g-v1-asym", "4bit-32g-v1-asym-act",
    "4bit-64g-v2-sym", "4bit-32g-v2-sym-act", "4bit-32g-v2-asym", "4bit-64g-v2-asym-act",
    "3bit-32g-v1-sym", "3bit-32g-v1-asym-act", "3bit-32g-v2-sym-act", "3bit-32g-v2-asym",
    "2bit-32g-v1-asym-act", "2bit-32g-v2-sym", "8bit-64g-v1-sym-act", "8bit-32g-v2-asym",
]
WINDOWS, WINDOW = 64, 128
POSITIONS = 16
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def settings(name):
    bits, group, version, grid, *act = name.split("-")
    return {
        "bits": int(bits.removesuffix("bit")), "group_size": int(group.removesuffix("g")), "sym": grid == "sym", "desc_act": bool(act),
        "act_group_aware": False, "format": "gptq" if version == "v1" else "gptq_v2",
    }


def fields(words, bits, count):
    """Fields of `bits` bits from streams of 32-bit words: [words, streams] to [count, streams]."""
    words = words.long() & 0xFFFFFFFF
    at = torch.arange(count) * bits
    low, shift = at // 32, (at % 32)[:, None]
    next_word = torch.cat([words, torch.zeros_like(words[:1])])[low + 1]
    return ((words[low] >> shift) | (next_word << (32 - shift))) & (2**bits - 1)


def dequantized(tensors, module, bits, version):
    """Weight [outputs, inputs] in f64."""
    qweight, qzeros, scales, g_idx = (tensors[f"{module}.{suffix}"] for suffix in SUFFIXES)
    codes = fields(qweight, bits, g_idx.numel())
    zeros = fields(qzeros.t().contiguous(), bits, scales.shape[1]).t()
    if version == "v1":
        zeros = (zeros + 1) & (2**bits - 1)
    group = g_idx.long()
    return (scales.double()[group] * (codes - zeros[group])).t().contiguous()


def exact_model(folder, name):
    """The model of a folder in f64. Built from its config each time: a model that was ever in f16 keeps rotary frequencies of f16."""
    tensors = load_file(f"{folder}/model.safetensors")
    bits, version = (0, "") if name == "float" else (settings(name)["bits"], name.split("-")[2])
    state = {}
    for key, tensor in tensors.items():
        module, suffix = key.rsplit(".", 1)
        if suffix == "qweight":
            state[f"{module}.weight"] = dequantized(tensors, module, bits, version)
        elif suffix not in SUFFIXES:
            state[key] = tensor.double()
    config = LlamaConfig.from_pretrained("/tmp/fixture-model")
    model = LlamaForCausalLM(config).double()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def score(folder, name, test):
    """Writes logits.safetensors and scores.json; returns both."""
    exact = exact_model(folder, name)
    with torch.no_grad():
        logits = exact(test[None, :POSITIONS]).logits[0].float().contiguous()
    save_file({"input_ids": test[:POSITIONS].int(), "logits": logits}, f"{folder}/logits.safetensors")
    scores = nll(exact, test)
    json.dump(scores, open(f"{folder}/scores.json", "w"))
    return logits, scores


def copy_config(source, target):
    """Without the folder in which GPTQModel kept tensors meanwhile."""
    config = json.load(open(source))
    for settings in (config, config.get("quantization_config", {})):
        settings.get("meta", {}).pop("offload_to_disk_path", None)
    json.dump(config, open(target, "w"), indent=2)


def main():
    fixtures = sys.argv[1]
    names = [name for name in sys.argv[2:] if name != "float"] if sys.argv[2:] else CHECKPOINTS
    work = "/tmp/fixture-model"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(f"{fixtures}/verne", work)
    PreTrainedTokenizerFast(tokenizer_file=f"{work}/tokenizer.json", bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(work)
    tokenizer = Tokenizer.from_file(f"{work}/tokenizer.json")
    ids = tokenizer.encode(open(f"{fixtures}/verne-calibration.txt").read()).ids
    data = [{"input_ids": ids[at : at + WINDOW], "attention_mask": [1] * WINDOW} for at in range(0, WINDOWS * WINDOW, WINDOW)]
    test = torch.tensor(tokenizer.encode(open(f"{fixtures}/verne-held-out.txt").read()).ids)
    print("RESULT float", score(f"{fixtures}/verne", "float", test)[1], flush=True)
    if not names:
        return
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    for name in names:
        out, raw = f"{fixtures}/gptqmodel/{name}", f"/tmp/fixture-raw/{name}"
        try:
            model = GPTQModel.load(work, QuantizeConfig(**settings(name)))
            model.quantize(data, batch_size=8)
            model.save(raw)
            del model
            gc.collect()
            torch.cuda.empty_cache()
        except Exception as error:  # one setting that this version refuses is no reason to lose the others
            print("RESULT", name, "refused:", type(error).__name__, str(error)[:200], flush=True)
            continue
        os.makedirs(out, exist_ok=True)
        shutil.copy(f"{raw}/model.safetensors", out)
        for file in ("config.json", "quantize_config.json"):
            copy_config(f"{raw}/{file}", f"{out}/{file}")
        logits, scores = score(out, name, test)
        theirs = "not run"
        try:
            model = GPTQModel.load(raw, backend=BACKEND.TORCH, device="cuda:0")
            with torch.no_grad():
                found = model(test[None, :POSITIONS].cuda()).logits[0].float().cpu()
            theirs = f"{(found - logits).abs().max().item():.4f}"
            del model
        except Exception as error:
            theirs = f"{type(error).__name__}: {str(error)[:100]}"
        size = os.path.getsize(f"{out}/model.safetensors")
        print("RESULT", name, size, "bytes, nll", round(scores["nll"], 5), "largest difference of GPTQModel's Torch kernel:", theirs, flush=True)


if __name__ == "__main__":
    main()
