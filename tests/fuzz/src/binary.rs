//! Binary seeds that are made here: safetensors in shards, GGUF, SentencePiece models.

use crate::layout::varint;

/// A tensor of a safetensors file.
pub struct Tensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// `"dtype":"F16","shape":[2,3]`
    pub kind: &'a str,
    /// Its bytes.
    pub data: &'a [u8],
}

/// The tensors of a file that the project wrote: no spaces in its header, no brackets in names.
pub fn tensors(file: &[u8]) -> Vec<Tensor<'_>> {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let header = std::str::from_utf8(&file[8..8 + length]).expect("a header is text");
    let data = &file[8 + length..];
    let entries = header.split(",\"data_offsets\":[");
    let entries: Vec<&str> = entries.collect();
    let pairs = entries.windows(2).map(|pair| {
        let start = pair[0].rfind(":{\"dtype\"").expect("a tensor has a type");
        let name = &pair[0][..start].trim_end_matches('"');
        let name = &name[name.rfind('"').expect("a name in quotes") + 1..];
        let offsets = &pair[1][..pair[1].find(']').expect("two offsets")];
        let (from, to) = offsets.split_once(',').expect("two offsets");
        let number = |text: &str| text.trim().parse::<usize>().expect("a number");
        let kind = &pair[0][start + 2..];
        Tensor {
            name,
            kind,
            data: &data[number(from)..number(to)],
        }
    });
    pairs.collect()
}

/// A safetensors file.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut offset = 0;
    let entries = tensors.iter().map(|tensor| {
        let from = offset;
        offset += tensor.data.len();
        format!(
            "\"{}\":{{{},\"data_offsets\":[{from},{offset}]}}",
            tensor.name, tensor.kind
        )
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    tensors.iter().for_each(|tensor| file.extend(tensor.data));
    file
}

/// A GGUF file in the making.
#[derive(Default)]
struct Gguf {
    keys: Vec<u8>,
    key_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Gguf {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.bytes());
    }

    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        Self::text(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
    }

    fn word(&mut self, key: &str, value: u32) {
        self.key(key, 4, &value.to_le_bytes());
    }

    fn number(&mut self, key: &str, value: f32) {
        self.key(key, 6, &value.to_le_bytes());
    }

    fn string(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, value);
        self.key(key, 8, &bytes);
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        let mut bytes = [
            &8u32.to_le_bytes()[..],
            &(values.len() as u64).to_le_bytes(),
        ]
        .concat();
        values
            .iter()
            .for_each(|value| Self::text(&mut bytes, value));
        self.key(key, 9, &bytes);
    }

    fn words(&mut self, key: &str, kind: u32, values: &[[u8; 4]]) {
        let head = [
            &kind.to_le_bytes()[..],
            &(values.len() as u64).to_le_bytes(),
        ]
        .concat();
        self.key(key, 9, &[head, values.concat()].concat());
    }

    /// A tensor of `bytes` a block of `block` values, all bytes the same; `shape` innermost first.
    fn tensor(&mut self, name: &str, shape: &[u64], (kind, block, bytes): (u32, u64, u64)) {
        Self::text(&mut self.infos, name);
        self.infos.extend((shape.len() as u32).to_le_bytes());
        shape
            .iter()
            .for_each(|size| self.infos.extend(size.to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        let length = shape.iter().product::<u64>() / block * bytes;
        let end = self.data.len() + length as usize;
        self.data.resize(end, 0x11);
        self.data.resize(end.next_multiple_of(32), 0);
        self.tensor_count += 1;
    }

    fn file(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.key_count.to_le_bytes());
        file.extend(&self.keys);
        file.extend(&self.infos);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(&self.data);
        file
    }
}

const F32: (u32, u64, u64) = (0, 1, 4);
const F16: (u32, u64, u64) = (1, 1, 2);

/// Sizes of a GGUF model.
struct Shape {
    hidden: u64,
    ffn: u64,
    layers: u32,
    heads: u32,
    vocab: u64,
}

fn decoder(shape: &Shape, kinds: &[(u32, u64, u64)]) -> Gguf {
    let mut file = Gguf::default();
    file.string("general.architecture", "llama");
    file.string("general.name", "seed");
    file.word("llama.block_count", shape.layers);
    file.word("llama.context_length", 256);
    file.word("llama.embedding_length", shape.hidden as u32);
    file.word("llama.feed_forward_length", shape.ffn as u32);
    file.word("llama.attention.head_count", shape.heads);
    file.word("llama.attention.head_count_kv", shape.heads);
    file.number("llama.attention.layer_norm_rms_epsilon", 1e-5);
    file.number("llama.rope.freq_base", 10_000.0);
    let (hidden, ffn) = (shape.hidden, shape.ffn);
    file.tensor("token_embd.weight", &[hidden, shape.vocab], F16);
    file.tensor("output_norm.weight", &[hidden], F32);
    let mut kinds = kinds.iter().cycle();
    for layer in 0..shape.layers {
        for norm in ["attn_norm", "ffn_norm"] {
            file.tensor(&format!("blk.{layer}.{norm}.weight"), &[hidden], F32);
        }
        for (linear, inputs, outputs) in [
            ("attn_q", hidden, hidden),
            ("attn_k", hidden, hidden),
            ("attn_v", hidden, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", hidden, ffn),
            ("ffn_up", hidden, ffn),
            ("ffn_down", ffn, hidden),
        ] {
            let name = format!("blk.{layer}.{linear}.weight");
            file.tensor(
                &name,
                &[inputs, outputs],
                *kinds.next().expect("a circle has no end"),
            );
        }
    }
    file
}

/// A Llama with the vocabulary of SentencePiece and old block types.
pub fn llama_gguf() -> Vec<u8> {
    let pieces = pieces();
    let shape = Shape {
        hidden: 64,
        ffn: 96,
        layers: 2,
        heads: 4,
        vocab: pieces.len() as u64,
    };
    let kinds = [
        (8, 32, 34),
        (2, 32, 18),
        (3, 32, 20),
        (6, 32, 22),
        (7, 32, 24),
        F16,
        F32,
    ];
    let mut file = decoder(&shape, &kinds);
    file.string("tokenizer.ggml.model", "llama");
    let texts: Vec<String> = pieces.iter().map(|(text, ..)| text.clone()).collect();
    file.strings("tokenizer.ggml.tokens", &texts);
    let scores: Vec<[u8; 4]> = pieces
        .iter()
        .map(|(_, score, _)| score.to_le_bytes())
        .collect();
    file.words("tokenizer.ggml.scores", 6, &scores);
    let types: Vec<[u8; 4]> = pieces
        .iter()
        .map(|(.., kind)| u32::from(*kind).to_le_bytes())
        .collect();
    file.words("tokenizer.ggml.token_type", 5, &types);
    file.word("tokenizer.ggml.bos_token_id", 1);
    file.word("tokenizer.ggml.eos_token_id", 2);
    file.word("tokenizer.ggml.unknown_token_id", 0);
    file.string(
        "tokenizer.chat_template",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    );
    file.file()
}

/// A Llama with byte-level BPE and the newer block types.
pub fn gpt2_gguf() -> Vec<u8> {
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_sign(byte).to_string()).collect();
    let merges = ["t h", "th e", "a n", "an d", "o u", "i n", "Ġ a", "Ġ the"];
    tokens.extend(merges.map(|merge| merge.replace(' ', "")));
    tokens.push("<|endoftext|>".to_string());
    let shape = Shape {
        hidden: 256,
        ffn: 256,
        layers: 1,
        heads: 4,
        vocab: tokens.len() as u64,
    };
    let kinds = [(12, 256, 144), (13, 256, 176), (14, 256, 210)];
    let mut file = decoder(&shape, &kinds);
    file.string("tokenizer.ggml.model", "gpt2");
    file.string("tokenizer.ggml.pre", "gpt-2");
    file.strings("tokenizer.ggml.tokens", &tokens);
    let types: Vec<[u8; 4]> = (0..tokens.len())
        .map(|id| if id + 1 == tokens.len() { 3u32 } else { 1 }.to_le_bytes())
        .collect();
    file.words("tokenizer.ggml.token_type", 5, &types);
    file.strings("tokenizer.ggml.merges", &merges.map(str::to_string));
    file.word("tokenizer.ggml.bos_token_id", tokens.len() as u32 - 1);
    file.word("tokenizer.ggml.eos_token_id", tokens.len() as u32 - 1);
    file.file()
}

/// The sign that stands for a byte in byte-level BPE.
fn byte_sign(byte: u8) -> char {
    let is_itself = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    match is_itself(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|&b| !is_itself(b)).count() as u32;
            char::from_u32(256 + before).expect("a letter of Latin Extended")
        }
    }
}

/// Text, score, and type: 1 a word, 2 unknown, 3 a mark, 6 a byte.
fn pieces() -> Vec<(String, f32, u8)> {
    let mut pieces = vec![
        ("<unk>".to_string(), 0.0, 2),
        ("<s>".to_string(), 0.0, 3),
        ("</s>".to_string(), 0.0, 3),
    ];
    pieces.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    let words = [
        "▁",
        "a",
        "r",
        "o",
        "u",
        "n",
        "d",
        "ou",
        "nd",
        "ar",
        "ound",
        "▁ar",
        "▁around",
        "e",
        "t",
        "h",
        "th",
        "the",
    ];
    let scored = words.iter().enumerate();
    pieces.extend(scored.map(|(rank, word)| (word.to_string(), -(rank as f32) - 1.0, 1)));
    pieces
}

/// A `tokenizer.model`; `model_type` 1 is unigram, 2 is BPE.
pub fn sentencepiece(model_type: u8) -> Vec<u8> {
    let mut file = Vec::new();
    for (text, score, kind) in pieces() {
        let mut piece = Vec::new();
        part(&mut piece, 0x0a, text.as_bytes());
        piece.push(0x15);
        piece.extend(score.to_le_bytes());
        piece.extend([0x18, kind]);
        part(&mut file, 0x0a, &piece);
    }
    // trainer: model_type, vocab_size, byte_fallback, ids of unk, bos, eos and no pad
    let mut trainer = vec![0x18, model_type, 0x20, 0x95, 0x02, 0x98, 0x02, 0x01];
    trainer.extend([0xc0, 0x02, 0x00, 0xc8, 0x02, 0x01, 0xd0, 0x02, 0x02]);
    part(&mut file, 0x12, &trainer);
    // normalizer: name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    let mut normalizer = Vec::new();
    part(&mut normalizer, 0x0a, b"identity");
    normalizer.extend([0x18, 0x01, 0x20, 0x00, 0x28, 0x01]);
    part(&mut file, 0x1a, &normalizer);
    file
}

fn part(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
    out.push(tag);
    varint(out, body.len());
    out.extend(body);
}
