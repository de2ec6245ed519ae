#!/usr/bin/env python3
"""Tiny checkpoints of many decoder families in settings of many kinds, with the logits that each must give.

usage: fixture_archs.py OUT_FOLDER [NAME...]      (needs torch, transformers 5.17 and safetensors; no GPU)

OUT_FOLDER/NAME gets

    config.json              as MODELS has it, in the spelling of published files where they differ from what transformers writes
    model.safetensors        random weights in f16
    expected.safetensors     input_ids i32 [40], logits f32 [40, 64]

The logits are those of transformers in f32 with eager attention, after it has loaded the folder. Windows and first trained lengths
are shorter than the text, so that they show.
"""
import json
import math
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, TOKENS = 64, 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
SLIDING, FULL = "sliding_attention", "full_attention"

# Settings beside SIZES.
MODELS = {
    "gemma": {"head_dim": 12, "num_key_value_heads": 1},
    "gemma2": {
        "num_key_value_heads": 4, "head_dim": 12, "attention_bias": True, "query_pre_attn_scalar": 20, "sliding_window": 8,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": None, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 5000.0,
    },
    "gemma2-untied": {
        "head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": False, "query_pre_attn_scalar": 8, "sliding_window": 8,
        "layer_types": [FULL, SLIDING], "attn_logit_softcapping": None,
    },
    "gemma3": {
        "model_type": "gemma3_text", "num_hidden_layers": 3, "hidden_size": 24, "head_dim": 12, "num_key_value_heads": 1, "query_pre_attn_scalar": 20,
        "sliding_window": 8, "sliding_window_pattern": 3, "rope_theta": 100000.0, "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 5.0, "attn_logit_softcapping": None,
    },
    "gemma4": {
        "model_type": "gemma4_text", "num_hidden_layers": 3, "hidden_size": 24, "head_dim": 8, "global_head_dim": 16,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "attention_bias": True, "sliding_window": 8,
        "layer_types": [SLIDING, FULL, FULL], "hidden_size_per_layer_input": 0,
    },
    "gemma4-shared": {
        "model_type": "gemma4_text", "num_hidden_layers": 5, "hidden_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 12, "sliding_window": 8, "num_kv_shared_layers": 3,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL], "hidden_size_per_layer_input": 4, "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 10.0, "tie_word_embeddings": False,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            FULL: {"rope_type": "proportional", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
        },
    },
    "phi3": {"head_dim": 12, "num_key_value_heads": 4, "sliding_window": 8, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "phi3-su": {
        "original_max_position_embeddings": 64, "rope_scaling": {
            "type": "su", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0],
            "original_max_position_embeddings": 64,
        },
    },
    "phi3-apart": {
        "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75, "head_dim": 16, "num_attention_heads": 2, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 4.0, 8.0, 12.0, 16.0],
        },
    },
    "glm4": {"hidden_size": 24, "head_dim": 16, "partial_rotary_factor": 0.25, "attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "ministral3": {
        "head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True, "sliding_window": 24, "rope_parameters": {
            **YARN, "type": "yarn", "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3,
        },
    },
    "olmo2": {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True, "rope_theta": 500000.0},
    "olmo3": {
        "num_hidden_layers": 4, "hidden_size": 24, "sliding_window": 8, "rope_theta": 500000, "rope_scaling": YARN,
    },
    "smollm3": {
        "num_hidden_layers": 4, "hidden_size": 24, "no_rope_layer_interval": 2, "use_sliding_window": True,
        "sliding_window": 8, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_theta": 5000.0,
    },
    "smollm3-llama3": {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 1], "num_key_value_heads": 1, "rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "granite": {
        "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.4,
        "attention_multiplier": 0.2, "num_key_value_heads": 4, "rope_theta": 5000.0,
    },
    "cohere": {"num_key_value_heads": 1, "logit_scale": 0.3},
    "cohere2": {
        "head_dim": 12, "attention_bias": True, "tie_word_embeddings": False, "sliding_window": 8, "sliding_window_pattern": 2,
        "position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_parallel_block": True, "use_gated_activation": True,
        "rope_theta": 50000, "logit_scale": 0.25,
    },
    "seed_oss": {
        "head_dim": 12, "num_key_value_heads": 1, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True, "rope_theta": 1000.0,
    },
    "exaone4": {"sliding_window": None, "layer_types": [FULL, FULL], "tie_word_embeddings": True, "rope_scaling": LLAMA3, "rope_theta": 1000000},
    "exaone4-pattern": {"num_hidden_layers": 3, "hidden_size": 24, "sliding_window": 8, "sliding_window_pattern": 2, "num_key_value_heads": 4},
    "starcoder2": {
        "use_bias": False, "tie_word_embeddings": False, "sliding_window": 8, "num_key_value_heads": 1, "norm_type": "layer_norm",
        "mlp_type": "default", "norm_epsilon": 1e-4, "rope_theta": 999999.4420358813,
    },
    "hunyuan": {
        "model_type": "hunyuan_v1_dense", "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True, "use_qk_norm": True,
        "use_cla": False, "cla_share_factor": 2, "rope_scaling": {
            "type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
}


def randomize(model, generator):
    """Weights about as large as trained ones, norms near one, biases that show."""
    def normal(tensor, scale):
        return scale * torch.randn(tensor.shape, generator=generator)

    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    for name, tensor in [*model.named_parameters(), *buffers]:
        with torch.no_grad():
            if name.endswith("bias"):
                tensor.copy_(normal(tensor, 0.2))
            elif tensor.dim() == 1:
                # Gemma stores differences from one, so its norms begin at zero.
                tensor.add_(normal(tensor, 0.2))
            elif "embed" in name:
                tensor.copy_(normal(tensor, 1.0))
            else:
                tensor.copy_(normal(tensor, 1.3 / math.sqrt(tensor.shape[1])))


def split_fused(tensors, settings):
    """The names that GPTQModel gives Phi-3."""
    queries, keys = (settings[key] * settings["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    parts = {
        "qkv_proj": (["q_proj", "k_proj", "v_proj"], [queries, keys, keys]),
        "gate_up_proj": (["gate_proj", "up_proj"], [settings["intermediate_size"]] * 2),
    }
    apart = {}
    for name, tensor in tensors.items():
        fused = next((fused for fused in parts if fused in name), None)
        names, rows = parts.get(fused, ([fused], [len(tensor)]))
        for part, values in zip(names, tensor.split(rows)):
            apart[name.replace(fused, part) if fused else name] = values.contiguous()
    return apart


def make(folder, name, settings):
    family = name.split("-")[0]
    settings = {"model_type": family, **SIZES, **settings}
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/config.json", "w") as file:
        file.write(json.dumps(settings, indent=1) + "\n")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    randomize(model, generator)
    model.half().save_pretrained(folder + "/saved")
    tensors = load_file(f"{folder}/saved/model.safetensors")
    for file in os.listdir(folder + "/saved"):
        os.remove(f"{folder}/saved/{file}")
    os.rmdir(folder + "/saved")
    if name == "gemma4-shared":
        # Published files hold keys and values that no block reads.
        for block, width in [(2, 8), (4, 12)]:
            for module, shape in [("k_proj", (width, 16)), ("v_proj", (width, 16)), ("k_norm", (width,))]:
                tensors[f"model.layers.{block}.self_attn.{module}.weight"] = torch.full(shape, 9.0).half()
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(3, VOCAB, (1, TOKENS), generator=generator)
    ids[0, 0] = SIZES["bos_token_id"]
    with torch.no_grad():
        logits = loaded(input_ids=ids, use_cache=False).logits[0].float().contiguous()
    assert torch.isfinite(logits).all()
    save_file({"input_ids": ids[0].int().contiguous(), "logits": logits}, f"{folder}/expected.safetensors")
    if name == "phi3-apart":
        save_file(split_fused(tensors, settings), f"{folder}/model.safetensors", metadata={"format": "pt"})
    size = sum(os.path.getsize(f"{folder}/{file}") for file in os.listdir(folder))
    print(f"{name:16} {size:6} bytes, logits to {logits.abs().max():.2f}, deviation {logits.std():.2f}", flush=True)


def main():
    out, only = sys.argv[1], sys.argv[2:]
    for name, settings in MODELS.items():
        if not only or name in only:
            make(f"{out}/{name}", name, settings)


if __name__ == "__main__":
    main()
