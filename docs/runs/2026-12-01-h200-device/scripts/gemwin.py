"""Windows of 2048 tokens that begin with BOS, as `gptq eval --window-bos` cuts them. usage: gemwin.py GEMMA TEXT OUT"""
import sys, json, torch
from tokenizers import Tokenizer
from safetensors.torch import save_file
t = Tokenizer.from_file(sys.argv[1] + '/tokenizer.json')
ids = t.encode(open(sys.argv[2]).read(), add_special_tokens=False).ids
bos = json.load(open(sys.argv[1] + '/config.json'))['bos_token_id']
n = len(ids) // 2047
w = torch.tensor([[bos] + ids[i * 2047:(i + 1) * 2047] for i in range(n)], dtype=torch.int32)
print('windows', n); save_file({'input_ids': w}, sys.argv[3])
