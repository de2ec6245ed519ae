"""Our tiny files in GPTQModel: mean KL and top-1 against our logits. usage: loads.py FOLDER(of checkpoints with expected.safetensors)"""
import os, sys, traceback, torch
from safetensors.torch import load_file
from gptqmodel import GPTQModel, BACKEND
for name in sorted(os.listdir(sys.argv[1])):
    d = os.path.join(sys.argv[1], name)
    if not os.path.exists(d + '/expected.safetensors'): continue
    try:
        e = load_file(d + '/expected.safetensors')
        m = GPTQModel.load(d, backend=BACKEND.TORCH, device='cuda:0')
        with torch.inference_mode():
            got = m.model(e['input_ids'].long().unsqueeze(0).cuda()).logits[0].float().cpu().log_softmax(-1)
        want = e['logits'].log_softmax(-1)
        kl = (want.exp() * (want - got)).sum(-1).mean().item(); top = (want.argmax(-1) == got.argmax(-1)).float().mean().item()
        kinds = {type(x).__name__ for x in m.model.modules() if 'Quant' in type(x).__name__ or 'Torch' in type(x).__name__}
        print(f'LOAD {name}: mean KL {kl:.3e}, top-1 {top:.4f}, {sorted(kinds)}', flush=True)
        del m
    except Exception as x:
        print(f'LOAD {name}: {type(x).__name__}: {str(x).strip()[:300]}', flush=True)
        last = traceback.extract_tb(x.__traceback__)[-1]
        print(f'     at {last.filename.split("/site/")[-1]}:{last.lineno} {last.line}', flush=True)
