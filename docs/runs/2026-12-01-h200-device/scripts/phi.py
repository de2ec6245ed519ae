"""A small Phi-3 (4 blocks, fused qkv_proj and gate_up_proj) trained on the bytes of WikiText-2's validation text for a minute, so
that a perplexity means something. Writes phi3/ (f16), calib.safetensors, windows.safetensors."""
import sys, torch, time
from safetensors.torch import save_file
from transformers import Phi3Config, Phi3ForCausalLM
valid, test = (torch.tensor(list(open(p, 'rb').read())) for p in sys.argv[1:3])
torch.manual_seed(0)
c = Phi3Config(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
               original_max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=None, tie_word_embeddings=False)
m = Phi3ForCausalLM(c).cuda(); o = torch.optim.AdamW(m.parameters(), lr=2e-3, betas=(0.9, 0.95)); begin = time.time()
for step in range(1200):
    if time.time() - begin > 40: break
    at = torch.randint(0, len(valid) - 513, (32,)); x = torch.stack([valid[a:a + 512] for a in at]).cuda()
    with torch.autocast('cuda', torch.bfloat16): loss = m(x, labels=x).loss
    loss.backward(); torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0); o.step(); o.zero_grad(set_to_none=True)
    for g in o.param_groups: g['lr'] = 2e-3 * min(1, (step + 1) / 50) * max(0.02, 1 - (time.time() - begin) / 40)
print('trained', step, 'steps, loss', loss.item())
m.half().save_pretrained('phi3')
save_file({'input_ids': valid[:2048 * 64].view(64, 2048).int()}, 'calib.safetensors')
save_file({'input_ids': test[:2048 * 64].view(64, 2048).int()}, 'windows.safetensors')
