"""Every dense family on one GPU: quantized natural and act-order, killed and resumed, evaluated, 40 greedy tokens with the
key-value cache and without. usage: fam.py GPTQ FOLDER_OF_MODELS TOKENIZER TEXT OUT"""
import concurrent.futures as cf, hashlib, json, os, signal, subprocess, sys, time
gptq, models, tokenizer, text, out = sys.argv[1:6]
os.makedirs(out, exist_ok=True)
def sh(*a, **k): return subprocess.run(a, capture_output=True, text=True, timeout=240, **k)
def digest(path):
    h = hashlib.sha256()
    for f in sorted(os.listdir(path)):
        if f.endswith('.safetensors'): h.update(open(os.path.join(path, f), 'rb').read())
    return h.hexdigest()[:12]
def command(model, to, act):
    c = [gptq, 'quantize', model, '-o', to, '--device', 'cuda:0', '--bits', '4', '--group-size', '32', '--dataset', text, '--samples', '32', '--seq-len', '48', '--tokenizer', tokenizer]
    return c + (['--desc-act'] if act else [])
def killed(c, to):
    """Kills the run once its journal has a finished block; then goes on by the same command."""
    p = subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial, name = None, os.path.basename(to)
    end = time.time() + 120
    while p.poll() is None and time.time() < end:
        for f in os.listdir(out):
            if name in f and f != name and os.path.isdir(os.path.join(out, f)):
                for g in os.listdir(os.path.join(out, f)):
                    if 'journal' in g:
                        try:
                            if open(os.path.join(out, f, g), 'rb').read().count(b'\n') >= 2:
                                p.send_signal(signal.SIGKILL)
                        except OSError: pass
    p.wait(); first = p.returncode
    r = sh(*c, '--resume') if first else None
    done = [l for l in (r.stderr if r else '').replace('\r', '\n').split('\n') if 'are done already' in l]
    return first, (r.returncode if r else None), (done or ['ended before the kill'])[0]
def one(name):
    lines, model = [], os.path.join(models, name)
    for act in (False, True):
        kind = 'act-order' if act else 'natural'
        to = os.path.join(out, f'{name}-{kind}')
        r = sh(*command(model, to, act))
        if r.returncode:
            lines.append(f'{name} {kind} FAILED {r.stderr.strip()[-200:]}'); continue
        again = to + '-killed'
        got = killed(command(model, again, act), again)
        same = os.path.isdir(again) and digest(again) == digest(to)
        lines.append(f'{name} {kind}: {digest(to)}; kill: exit {got[0]}, then {got[1]}, {got[2]}; same bytes {same}')
        for which in ([model] if not act else []) + [to]:
            for prompt in ('Once upon a time', 'The little dog', 'Lily said'):
                base = [gptq, 'generate', which, '--device', 'cuda:0', '--prompt', prompt, '--max-new-tokens', '40', '--temperature', '0', '--json', '--tokenizer', tokenizer]
                a, b = sh(*base), sh(*base, '--no-cache')
                try: a, b = json.loads(a.stdout), json.loads(b.stdout)
                except Exception: lines.append(f'{name} {kind} generate FAILED {a.stderr[-150:]} {b.stderr[-150:]}'); continue
                n = next((i for i, (x, y) in enumerate(zip(a['tokens'], b['tokens'])) if x != y), None)
                kindname = 'float' if which == model else kind
                if n is None and len(a['tokens']) == len(b['tokens']): lines.append(f'{name} {kindname} "{prompt}": {len(a["tokens"])} tokens equal')
                else: lines.append(f'{name} {kindname} "{prompt}": differ at {n}: leads {a["leads"][n]:.2e} {b["leads"][n]:.2e}')
    return '\n'.join(lines)
names = sorted(os.listdir(models))
with cf.ThreadPoolExecutor(8) as pool:
    for r in pool.map(one, names): print(r, flush=True)
