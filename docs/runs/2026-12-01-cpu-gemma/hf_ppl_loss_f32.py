#!/usr/bin/env python3
"""Perplexity of stored windows by transformers, on the CPU in float32, as `gptq eval` counts: exp of the mean over windows of the mean
over all tokens but the first (BOS is context and never predicted; the token behind it is predicted and counts).

usage: hf_ppl.py MODEL_FOLDER WINDOWS.safetensors COUNT ATTENTION(eager|sdpa) OUT.json
"""
import hashlib, json, math, sys, time
import numpy as np, torch, transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

torch.cuda.is_current_stream_capturing = torch.cuda.graphs.is_current_stream_capturing = lambda: False  # no CUDA here (libraries are stand-ins)
folder, stored, count, attention, out = sys.argv[1:6]
count = int(count)
ids = load_file(stored)["input_ids"][:count]
print("torch", torch.__version__, "transformers", transformers.__version__, "threads", torch.get_num_threads(), "ids", ids.shape,
      "sha256 of ids as u32:", hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest(), "first ids", ids[0, :6].tolist(), flush=True)
begin = time.time()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
print("loaded in", round(time.time() - begin, 1), "s;", type(model).__name__, {str(p.dtype) for p in model.parameters()}, model.config._attn_implementation, flush=True)
print(model.config)
for name, buffer in model.named_buffers():
    print("buffer", name, buffer.dtype, buffer.flatten()[:3].tolist())
means, first = [], []
with torch.inference_mode():
    for i, row in enumerate(ids):
        t = time.time()
        x = torch.from_numpy(row.astype(np.int64))[None]
        hidden = model.model(input_ids=x, use_cache=False).last_hidden_state[0]
        cap = getattr(model.config, "final_logit_softcapping", None)
        nll = []
        for a in range(0, x.shape[1] - 1, 256):
            b = min(a + 256, x.shape[1] - 1)
            logits = model.lm_head(hidden[a:b])
            if cap: logits = torch.tanh(logits / cap) * cap
            nll.append(torch.nn.functional.cross_entropy(logits.float(), x[0, a + 1 : b + 1], reduction="none").double())
        nll = torch.cat(nll)
        assert nll.numel() == x.shape[1] - 1
        means.append(nll.mean().item()); first.append(nll[0].item())
        if i == 0:  # the whole model's own logits say the same
            whole = model(input_ids=x[:, :256]).logits[0]
            want = torch.nn.functional.cross_entropy(whole[:-1].float(), x[0, 1:256], reduction="none").double()
            print("head by pieces against model(): largest difference of a token's loss in the first 255:", (want - nll[:255]).abs().max().item())
        print(f"window {i}: mean nll {means[-1]:.6f}, of the token behind BOS {first[-1]:.4f}, {time.time() - t:.1f} s", flush=True)
ppl = math.exp(sum(means) / len(means))
print("PERPLEXITY", ppl, "windows", len(means), "wall s", round(time.time() - begin, 1), flush=True)
json.dump(dict(perplexity=ppl, means=means, first=first, attention=attention, torch=torch.__version__, transformers=transformers.__version__), open(out, "w"))
