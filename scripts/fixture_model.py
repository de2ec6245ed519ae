#!/usr/bin/env python3
"""The model of tests/fixtures: a Llama of a quarter of a million parameters that has learned one novel.

usage: fixture_model.py NOVEL OUT_FOLDER        (needs torch, transformers, tokenizers, safetensors; a minute on a GPU)

NOVEL: Around the World in Eighty Days as scripts/quickstart.sh finds it (public domain, Project Gutenberg 103). Chapters I to
XXIV train the model, the rest is held out. OUT_FOLDER gets

    verne/{config.json,model.safetensors,tokenizer.json}      f16
    verne-calibration.txt, verne-held-out.txt                 the end of the first part, the beginning of the second
"""
import json
import math
import os
import re
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, WINDOW = 512, 128
# Eleven times through the text: with sixty the held-out text was no better known than by an untrained model.
STEPS, BATCH, RATE = 300, 32, 4e-3
# Characters that are committed: enough for 128 windows, small enough for a clone.
CALIBRATION_CHARACTERS, HELD_OUT_CHARACTERS = 120_000, 60_000


def chapters(path):
    """The story as scripts/quickstart.sh cuts it: a line for each paragraph, in two parts."""
    text = open(path, encoding="utf-8", errors="replace").read().replace("\r", "")
    story = text.split("\nChapter I\n", 1)[1].split("End of Project Gutenberg", 1)[0]
    paragraphs = [re.sub(r"\n *", " ", part).strip() for part in re.split(r"\n\n+", story)]
    story = "\n\n".join(part for part in paragraphs if part)
    learned, rest = story.split("\n\nChapter XXV\n", 1) if "\n\nChapter XXV\n" in story else re.split(r"\n\nChapter XXV ?", story, maxsplit=1)
    return learned, rest.strip()


def train_tokenizer(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def train(model, ids, held_out, device):
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(rate, 0.01)
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + WINDOW + 1] for start in starts]).to(device)
        loss = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(loss.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: {loss.item():.4f}, held out {nll(model, held_out)['nll']:.4f}", flush=True)


def nll(model, ids, windows=64):
    """Mean over all predicted tokens of windows that do not overlap; a window's first token is given."""
    device = next(model.parameters()).device
    windows = min(windows, len(ids) // WINDOW)
    batch = ids[: windows * WINDOW].view(windows, WINDOW).to(device)
    with torch.no_grad():
        scores = model(batch).logits[:, :-1].double().log_softmax(-1)
    picked = scores.gather(-1, batch[:, 1:, None])
    return {"windows": windows, "seq_len": WINDOW, "nll": -picked.mean().item()}


def main():
    novel, out = sys.argv[1:]
    os.makedirs(f"{out}/verne", exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learned, rest = chapters(novel)
    calibration, held_out = learned[-CALIBRATION_CHARACTERS:], rest[:HELD_OUT_CHARACTERS]
    # Whole words, so that both ends read as text.
    calibration, held_out = calibration.split(" ", 1)[1], held_out.rsplit(" ", 1)[0]
    open(f"{out}/verne-calibration.txt", "w").write(calibration)
    open(f"{out}/verne-held-out.txt", "w").write(held_out)
    tokenizer = train_tokenizer(learned)
    tokenizer.save(f"{out}/verne/tokenizer.json")
    ids = torch.tensor(tokenizer.encode(learned).ids)
    test = torch.tensor(tokenizer.encode(held_out).ids)
    print(f"{len(learned)} characters, {len(ids)} tokens; held out {len(test)} tokens", flush=True)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(device)
    print(sum(parameter.numel() for parameter in model.parameters()), "parameters", flush=True)
    train(model, ids, test, device)

    model = model.half().cpu()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, f"{out}/verne/model.safetensors", metadata={"format": "pt"})
    # The keys that readers of all versions know, and no version of a tool.
    kept = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float16",
    }
    json.dump(kept, open(f"{out}/verne/config.json", "w"), indent=2)


if __name__ == "__main__":
    main()
