use super::*;

/// Seven bits a byte, the lowest first.
fn number(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    [
        number(field << 3 | 2),
        number(content.len() as u64),
        content.to_vec(),
    ]
    .concat()
}

fn flag(field: u64, value: u64) -> Vec<u8> {
    [number(field << 3), number(value)].concat()
}

fn piece(text: &str, score: f32, kind: u64) -> Vec<u8> {
    let score = [number(2 << 3 | 5), score.to_le_bytes().to_vec()].concat();
    bytes(
        1,
        &[bytes(1, text.as_bytes()), score, flag(3, kind)].concat(),
    )
}

fn model(kind: u64, pieces: &[(&str, f32, u64)], fallback: u64, extra: u64) -> Vec<u8> {
    let mut file: Vec<u8> = (pieces.iter())
        .flat_map(|&(text, score, kind)| piece(text, score, kind))
        .collect();
    file.extend(bytes(2, &[flag(3, kind), flag(35, fallback)].concat()));
    file.extend(bytes(3, &[flag(3, 1), flag(4, extra)].concat()));
    file
}

const MARKS: [(&str, f32, u64); 3] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)];

fn unigram() -> Vec<u8> {
    let normal = [
        ("▁", -4.0),
        ("a", -3.0),
        ("b", -3.5),
        ("ab", -4.0),
        ("▁a", -3.0),
        ("▁ab", -5.0),
        ("bb", -9.0),
    ];
    let mut pieces = MARKS.to_vec();
    pieces.extend(normal.map(|(text, score)| (text, score, 1)));
    pieces.push(("[x]", 0.0, USER_DEFINED));
    model(1, &pieces, 0, 1)
}

fn bpe() -> Vec<u8> {
    let names: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut pieces = MARKS.to_vec();
    pieces.extend(names.iter().map(|name| (name.as_str(), 0.0, BYTE)));
    for (text, score) in [("ab", -0.0), ("▁ab", -1.0), ("ba", -2.0), ("bab", -3.0)] {
        pieces.push((text, score, 1));
    }
    for (index, text) in ["▁", "a", "b", "c", "d"].into_iter().enumerate() {
        pieces.push((text, -20.0 - index as f32, 1));
    }
    model(2, &pieces, 1, 0)
}

fn encode(file: &[u8], around: &Surroundings, text: &str) -> Vec<u32> {
    let json = tokenizer_json(file, around).unwrap().to_string();
    let tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
    tokenizer
        .encode_fast(text, true)
        .unwrap()
        .get_ids()
        .to_vec()
}

/// The ids are those of the sentencepiece package (0.2.3) for the same bytes.
#[test]
fn ids_are_those_of_sentencepiece() {
    let plain = Surroundings::default();
    let want: [(&str, &[u32]); 8] = [
        ("ab abb", &[8, 8, 5]),
        ("  a  b ", &[7, 3, 5]),
        ("ba[x]ab", &[3, 5, 4, 10, 6]),
        ("aéza", &[7, 0, 4]),
        ("", &[]),
        ("▁a", &[3, 7]),
        ("abab bab", &[8, 6, 3, 5, 6]),
        ("a\nb", &[7, 0, 5]),
    ];
    for (text, ids) in want {
        assert_eq!(encode(&unigram(), &plain, text), ids, "{text}");
    }
    let want: [(&str, &[u32]); 8] = [
        ("ab abb", &[260, 260, 265]),
        ("  a  b ", &[263, 263, 263, 264, 263, 263, 265, 263]),
        ("ba[x]ab", &[263, 261, 94, 123, 96, 259]),
        ("aéza", &[263, 264, 198, 172, 125, 264]),
        ("", &[]),
        ("▁a", &[263, 263, 264]),
        ("abab bab", &[260, 259, 263, 262]),
        ("a\nb", &[263, 264, 13, 265]),
    ];
    for (text, ids) in want {
        assert_eq!(encode(&bpe(), &plain, text), ids, "{text}");
    }
}

#[test]
fn marks_and_added_tokens_come_from_the_files_beside_it() {
    let around = Surroundings {
        begins: true,
        ends: false,
        added: vec![(1, "<s>".into(), true), (268, "<|end|>".into(), true)],
    };
    assert_eq!(encode(&bpe(), &around, "ab<|end|>"), [1, 260, 268]);
    let gap = Surroundings {
        added: vec![(300, "<|end|>".into(), true)],
        ..around
    };
    let error = tokenizer_json(&bpe(), &gap).unwrap_err();
    assert!(error.contains("300") && error.contains("268"), "{error}");
}

/// Lengths are checked against what the file holds before anything is made of them.
#[test]
fn a_file_that_breaks_off_or_lies_is_an_error() {
    let file = unigram();
    for end in 0..file.len() {
        let _ = tokenizer_json(&file[..end], &Surroundings::default());
    }
    let long = [number(1 << 3 | 2), number(u64::MAX)].concat();
    let endless = vec![0xff; 40];
    let twice = [
        piece("a", 0.0, 1),
        piece("a", 0.0, 1),
        bytes(2, &flag(3, 2)),
    ]
    .concat();
    let broken: [(&[u8], &str); 6] = [
        (b"", "no pieces"),
        (&long, "does not fit"),
        (&endless, "ten bytes"),
        (&piece(&"a".repeat(2000), 0.0, 1), "more than 1024 bytes"),
        (&piece("a", f32::NAN, 1), "not finite"),
        (&twice, "one text"),
    ];
    for (file, named) in broken {
        let error = tokenizer_json(file, &Surroundings::default()).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}
