import json, torch, sys
from transformers import PreTrainedTokenizerFast
from safetensors.torch import save_file
d='smollm2'; D='data'; S=2048
tok=PreTrainedTokenizerFast(tokenizer_file=d+'/tokenizer.json')
ids=lambda p: tok(p,return_tensors='pt').input_ids
val=ids(open(D+'/wikitext2/wiki.valid.raw').read()); c4=ids('\n\n'.join(json.loads(l)['text'] for l in open(D+'/c4/c4_en_sample.jsonl')))
n4=c4.numel()//2
def draw(t, n, seed):
    g=torch.Generator().manual_seed(seed)
    return torch.cat([t[:,s:s+S] for s in [torch.randint(0,n-S-1,(1,),generator=g).item() for _ in range(128)]]).int()
for seed in (0,1,2): save_file({'input_ids':draw(val,val.numel(),seed)},f'win-{seed}.safetensors')
save_file({'input_ids':draw(c4,n4,0)},'win-c4.safetensors')
t=c4[0,n4:]; n=min(t.numel()//S,60)
save_file({'input_ids':t[:n*S].reshape(n,S).int()},'test-c4.safetensors'); print(n, val.numel(), n4)
