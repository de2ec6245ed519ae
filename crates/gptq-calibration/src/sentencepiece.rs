//! `tokenizer.model`, a SentencePiece model, as the `tokenizer.json` that gives the same ids.
//!
//! The file is a protobuf message, `ModelProto` of `sentencepiece_model.proto`; the few fields that
//! matter are read here by hand. Unigram and BPE models are known; what would change ids and has no
//! counterpart in `tokenizer.json` is refused by name.

use std::collections::HashMap;

use serde_json::{Value, json};

mod message;

use message::{Fields, Wire};

/// Kinds of pieces, as the file numbers them.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// Longer pieces are refused: each is cut at every place, and each cut is looked up.
const MAX_PIECE_BYTES: usize = 1024;
/// Margin by which a user-defined piece is below the best score of its length, in SentencePiece.
const USER_DEFINED_SCORE: f64 = 0.1;

/// BOS and EOS around every text, and added tokens, from the folder's other files.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    /// Whether BOS is added.
    pub begins: bool,
    /// Whether EOS is added.
    pub ends: bool,
    /// Tokens beyond the pieces with their ids, and whether they are special.
    pub added: Vec<(u64, String, bool)>,
}

/// The `tokenizer.json` of a SentencePiece model; an error describes a flaw of the model.
pub(crate) fn tokenizer_json(bytes: &[u8], around: &Surroundings) -> Result<Value, String> {
    let model = Model::read(bytes)?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": model.added_tokens(around)?,
        "normalizer": model.normalizer(),
        "pre_tokenizer": model.pre_tokenizer(),
        "post_processor": model.post_processor(around),
        "decoder": model.decoder(),
        "model": match model.is_bpe {
            true => model.bpe()?,
            false => model.unigram()?,
        },
    }))
}

struct Piece<'a> {
    text: &'a str,
    score: f64,
    kind: u64,
}

struct Model<'a> {
    pieces: Vec<Piece<'a>>,
    is_bpe: bool,
    byte_fallback: bool,
    bos: Option<usize>,
    eos: Option<usize>,
    charsmap: &'a [u8],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

impl<'a> Model<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut model = Model {
            pieces: Vec::new(),
            is_bpe: false,
            byte_fallback: false,
            bos: Some(1),
            eos: Some(2),
            charsmap: &[],
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
        };
        for field in Fields::of(bytes) {
            match field? {
                (1, Wire::Bytes(piece)) => {
                    let id = model.pieces.len();
                    let piece = Piece::read(piece).map_err(|why| format!("piece {id}: {why}"))?;
                    model.pieces.push(piece);
                }
                (2, Wire::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Wire::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("it holds no pieces, so it is no SentencePiece model".to_string());
        }
        let count = model.pieces.len();
        for mark in [&mut model.bos, &mut model.eos] {
            *mark = mark.filter(|&id| id < count);
        }
        Ok(model)
    }

    fn read_trainer(&mut self, trainer: &[u8]) -> Result<(), String> {
        // Negative: there is none.
        let id = |value: u64| usize::try_from(value as i32).ok();
        for field in Fields::of(trainer) {
            match field? {
                (3, Wire::Number(1)) => self.is_bpe = false,
                (3, Wire::Number(2)) => self.is_bpe = true,
                (3, Wire::Number(kind)) => {
                    return Err(format!(
                        "model type {kind} is neither unigram (1) nor BPE (2)"
                    ));
                }
                (24, Wire::Number(1..)) => {
                    return Err("treat_whitespace_as_suffix is not supported".to_string());
                }
                (35, Wire::Number(on)) => self.byte_fallback = on != 0,
                (41, Wire::Number(value)) => self.bos = id(value),
                (42, Wire::Number(value)) => self.eos = id(value),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, normalizer: &'a [u8]) -> Result<(), String> {
        for field in Fields::of(normalizer) {
            match field? {
                (2, Wire::Bytes(charsmap)) => self.charsmap = charsmap,
                (3, Wire::Number(on)) => self.add_dummy_prefix = on != 0,
                (4, Wire::Number(on)) => self.remove_extra_whitespaces = on != 0,
                (5, Wire::Number(0)) => {
                    return Err("escape_whitespaces=false is not supported".to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn unknown(&self) -> Option<usize> {
        self.pieces.iter().position(|piece| piece.kind == UNKNOWN)
    }

    /// Pieces that no text becomes by itself, and tokens that other files add.
    fn added_tokens(&self, around: &Surroundings) -> Result<Vec<Value>, String> {
        let token = |id: u64, text: &str, special: bool| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": special})
        };
        let mut tokens: Vec<Value> = (self.pieces.iter().enumerate())
            .filter_map(|(id, piece)| match piece.kind {
                UNKNOWN | CONTROL => Some(token(id as u64, piece.text, true)),
                // Unigram models choose them by their score.
                USER_DEFINED if self.is_bpe => Some(token(id as u64, piece.text, false)),
                _ => None,
            })
            .collect();
        let mut next = self.pieces.len() as u64;
        for (id, text, special) in &around.added {
            if *id < self.pieces.len() as u64 {
                continue;
            }
            if *id != next {
                return Err(format!(
                    "an added token has id {id}, where {next} comes next"
                ));
            }
            tokens.push(token(*id, text, *special));
            next += 1;
        }
        Ok(tokens)
    }

    fn has_user_defined_cuts(&self) -> bool {
        self.is_bpe && self.pieces.iter().any(|piece| piece.kind == USER_DEFINED)
    }

    /// SentencePiece's normalization before it splits a text.
    fn normalizer(&self) -> Value {
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let mut steps = Vec::new();
        if !self.charsmap.is_empty() {
            let map = base64(self.charsmap);
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        if self.remove_extra_whitespaces {
            steps.push(replace(json!({"Regex": "^ +| +$"}), ""));
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        // The pre-tokenizer does it where tokens cut a text, so that it is done once.
        if !self.has_user_defined_cuts() {
            if self.add_dummy_prefix {
                steps.push(json!({"type": "Prepend", "prepend": "▁"}));
            }
            steps.push(replace(json!({"String": " "}), "▁"));
        }
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn pre_tokenizer(&self) -> Value {
        let scheme = match self.add_dummy_prefix {
            true => "first",
            false => "never",
        };
        match self.has_user_defined_cuts() {
            true => {
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
            }
            false => Value::Null,
        }
    }

    fn decoder(&self) -> Value {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_dummy_prefix {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }

    fn post_processor(&self, around: &Surroundings) -> Value {
        let marks = [
            self.bos.filter(|_| around.begins),
            self.eos.filter(|_| around.ends),
        ];
        if marks == [None, None] {
            return Value::Null;
        }
        let sides = |name: &str, sequence: u8| -> Vec<Value> {
            let mark = |id: usize| json!({"SpecialToken": {"id": self.pieces[id].text, "type_id": sequence}});
            let text = json!({"Sequence": {"id": name, "type_id": sequence}});
            let parts = [marks[0].map(mark), Some(text), marks[1].map(mark)];
            parts.into_iter().flatten().collect()
        };
        let pair = [sides("A", 0), sides("B", 1)].concat();
        let special: serde_json::Map<String, Value> = (marks.into_iter().flatten())
            .map(|id| {
                let text = self.pieces[id].text;
                (
                    text.to_string(),
                    json!({"id": text, "ids": [id], "tokens": [text]}),
                )
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": sides("A", 0),
            "pair": pair,
            "special_tokens": special,
        })
    }

    fn unigram(&self) -> Result<Value, String> {
        let normal = (self.pieces.iter()).filter(|piece| piece.kind == 1);
        let best = normal.map(|piece| piece.score).fold(f64::MIN, f64::max);
        let vocabulary: Vec<Value> = (self.pieces.iter())
            .map(|piece| match piece.kind {
                USER_DEFINED => {
                    let score = piece.text.len() as f64 * best - USER_DEFINED_SCORE;
                    json!([piece.text, score])
                }
                _ => json!([piece.text, piece.score]),
            })
            .collect();
        let unknown = self
            .unknown()
            .ok_or("it has no piece for what is unknown")?;
        Ok(json!({
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": vocabulary,
            "byte_fallback": self.byte_fallback,
        }))
    }

    /// Two pieces merge where their whole is a piece, those of the best score first; ways to cut one
    /// piece are ordered by the ids of their parts.
    fn bpe(&self) -> Result<Value, String> {
        let ids: HashMap<&str, usize> = (self.pieces.iter().enumerate())
            .map(|(id, piece)| (piece.text, id))
            .collect();
        let merged = |piece: &Piece<'_>| matches!(piece.kind, 1 | USER_DEFINED);
        let mut merges: Vec<(usize, usize, usize)> = Vec::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            if !merged(piece) {
                continue;
            }
            let cuts = piece.text.char_indices().skip(1).filter_map(|(at, _)| {
                let (left, right) = piece.text.split_at(at);
                let (left, right) = (*ids.get(left)?, *ids.get(right)?);
                let both = merged(&self.pieces[left]) && merged(&self.pieces[right]);
                both.then_some((id, left, right))
            });
            let start = merges.len();
            merges.extend(cuts);
            merges[start..].sort_unstable();
        }
        merges.sort_by(|a, b| self.pieces[b.0].score.total_cmp(&self.pieces[a.0].score));
        let text = |id: usize| self.pieces[id].text;
        let merges: Vec<[&str; 2]> = (merges.into_iter())
            .map(|(_, left, right)| [text(left), text(right)])
            .collect();
        let vocabulary: serde_json::Map<String, Value> = (self.pieces.iter().enumerate())
            .map(|(id, piece)| (piece.text.to_string(), json!(id)))
            .collect();
        if vocabulary.len() != self.pieces.len() {
            return Err("two pieces have one text".to_string());
        }
        Ok(json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": self.unknown().map(text),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": self.byte_fallback,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges,
        }))
    }
}

impl<'a> Piece<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut piece = Piece {
            text: "",
            score: 0.0,
            kind: 1,
        };
        for field in Fields::of(bytes) {
            match field? {
                (1, Wire::Bytes(text)) => {
                    piece.text = std::str::from_utf8(text).map_err(|_| "it is not UTF-8")?;
                }
                (2, Wire::Fixed(bits)) => piece.score = f64::from(f32::from_bits(bits)),
                (3, Wire::Number(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        match piece.kind {
            _ if piece.text.is_empty() => Err("it is empty".to_string()),
            _ if piece.text.len() > MAX_PIECE_BYTES => {
                Err(format!("it has more than {MAX_PIECE_BYTES} bytes"))
            }
            _ if !piece.score.is_finite() => Err("its score is not finite".to_string()),
            UNUSED => Err("it is marked unused, which is not supported".to_string()),
            1..=BYTE => Ok(piece),
            other => Err(format!("its kind {other} is not known")),
        }
    }
}

/// `tokenizer.json` holds bytes so.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let byte = |index: usize| u32::from(part.get(index).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = (group >> (18 - 6 * digit)) & 63;
            let is_padding = digit > part.len();
            text.push(if is_padding {
                '='
            } else {
                DIGITS[value as usize] as char
            });
        }
    }
    text
}

#[cfg(test)]
mod tests;
