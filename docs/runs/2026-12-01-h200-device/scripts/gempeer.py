"""Gemma in transformers and GPTQModel on stored windows (bf16). usage: gempeer.py MODEL CALIB WINDOWS OUR_FILE"""
import sys, math, time, tempfile, torch, gc
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, calib, windows, ours = sys.argv[1:5]
W = load_file(windows)['input_ids'].long()
def score(m):
    nll = 0.0
    with torch.inference_mode():
        for x in W:
            x = x[None].cuda(); l = m(x).logits[0, :-1].float()
            nll += torch.nn.functional.cross_entropy(l, x[0, 1:]).item()
    return math.exp(nll / len(W))
m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
print('PEER transformers bf16', round(score(m), 4), len(W), 'windows', flush=True); del m
from gptqmodel import GPTQModel, QuantizeConfig, BACKEND
try:
    m = GPTQModel.load(ours, backend=BACKEND.TORCH, device='cuda:0', dtype=torch.bfloat16)
    print('PEER GPTQModel reads ours', round(score(m.model), 4), flush=True); del m
except Exception as e: print('PEER GPTQModel load of ours:', type(e).__name__, str(e)[:300], flush=True)
C = load_file(calib)['input_ids'].long()
data = [{'input_ids': x.tolist(), 'attention_mask': [1] * len(x)} for x in C]
for act in (False, True):
    try:
        gc.collect(); torch.cuda.empty_cache(); t = time.time()
        m = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64, desc_act=act, sym=True, damp_percent=0.05))
        m.quantize(data, batch_size=8); t = time.time() - t
        out = tempfile.mkdtemp(); m.save(out); del m; gc.collect(); torch.cuda.empty_cache()
        m = GPTQModel.load(out, backend=BACKEND.TORCH, device='cuda:0', dtype=torch.bfloat16)
        print(f'PEER GPTQModel 4-bit g64 sym desc_act={act}: {score(m.model):.4f}, {t:.1f} s', flush=True); del m
    except Exception as e: print('PEER GPTQModel quantize:', type(e).__name__, str(e)[:300], flush=True)
