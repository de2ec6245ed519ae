"""Experiments side by side. usage: xp.py GPTQ MODEL JOBS.json OUT WORKERS"""
import concurrent.futures as cf, json, os, shutil, subprocess, sys, time
gptq, model, jobs, out, workers = sys.argv[1:6]
os.makedirs(out, exist_ok=True)
texts = [('wiki', 'wiki.test.raw', '148'), ('c4', 'test-c4.safetensors', '60')]
def one(job):
    name, win, flags, env = job
    d = os.path.join(out, name); t = time.time()
    r = subprocess.run([gptq, 'quantize', model, '-o', d, '--device', 'cuda:0', '--dataset', win, '--samples', '128', '--seq-len', '2048', *flags.split()], capture_output=True, text=True, env={**os.environ, **env})
    if r.returncode: return f'{name} FAILED {r.stderr[-300:]}'
    t = time.time() - t
    rec = json.load(open(d + '/gptq_run.json'))
    line = f'{name:26s} {t:6.1f} s'
    for text, path, n in texts:
        e = subprocess.run([gptq, 'eval', model, d, '--device', 'cuda:0', '--dataset', path, '--seq-len', '2048', '--max-windows', n, '--json'], capture_output=True, text=True)
        try:
            rows = json.loads(e.stdout); rows = rows if isinstance(rows, list) else rows.get('records', rows.get('evals', rows))
            q = rows[-1]; a = q
            line += f' | {text} {q["perplexity"]:.3f} KL {q["kl"] if "kl" in q else q.get("accuracy", {}).get("kl", 0):.4f}'
        except Exception as x: line += f' | {text} ? {x} {e.stderr[-200:]} {e.stdout[:200]}'
    tr = rec.get('training', [])
    if tr:
        ratios = [b['errors'][b['kept']] / b['errors'][0] for b in tr]
        kept = {}
        for b in tr: kept[b['kept']] = kept.get(b['kept'], 0) + 1
        line += f' | ratio {sum(ratios)/len(ratios):.3f} ({min(ratios):.3f} {max(ratios):.3f}) kept {kept} train {sum(b["seconds"] for b in tr):.1f} s'
    line += f' | {win} {flags} {env} peak {rec.get("gpu_memory_peak")}'
    import hashlib; line += ' sha256 ' + hashlib.sha256(open(d + '/model.safetensors', 'rb').read()).hexdigest()[:16]
    shutil.copy(d + '/gptq_run.json', os.path.join(out, name + '.json')); shutil.rmtree(d)
    return line
todo = json.load(open(jobs))
with cf.ThreadPoolExecutor(int(workers)) as p:
    for r in p.map(one, todo): print(r, flush=True)
