//! Files of multiple choice to tokens, by the rules of lm-evaluation-harness 0.4.13.
#![allow(clippy::print_stderr, missing_docs)]

#[path = "../../../tests/support/data.rs"]
mod data;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{Array, ArrayRef, Int64Array, RecordBatch, StringArray, StructArray};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::Field;
use gptq_calibration::{CalibrationError, Choice, Questions, Tokenizer};
use parquet::arrow::ArrowWriter;

const POSITIONS: usize = 256;

/// A token a letter: `a` to `z` are 1 to 26, 28 is the mark `<s>` where the text holds it, and 27 is
/// all else, a run of blanks and line feeds at once. With `special`, 28 is put in front of a text.
fn letters(folder: &Path, special: bool) -> Tokenizer {
    let vocab: Vec<String> = ('a'..='z')
        .chain([' '])
        .zip(1..)
        .map(|(letter, id)| format!("\"{letter}\": {id}"))
        .collect();
    let front = match special {
        true => r#"{"SpecialToken": {"id": "<s>", "type_id": 0}}, "#,
        false => "",
    };
    let json = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{{"id": 28, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}],
        "normalizer": {{"type": "Replace", "pattern": {{"Regex": "\\s+"}}, "content": " "}},
        "pre_tokenizer": {{"type": "Split", "pattern": {{"Regex": "."}}, "behavior": "Isolated", "invert": false}},
        "post_processor": {{"type": "TemplateProcessing",
            "single": [{front}{{"Sequence": {{"id": "A", "type_id": 0}}}}],
            "pair": [{{"Sequence": {{"id": "A", "type_id": 0}}}}, {{"Sequence": {{"id": "B", "type_id": 1}}}}],
            "special_tokens": {{"<s>": {{"id": "<s>", "ids": [28], "tokens": ["<s>"]}}}}}},
        "decoder": null,
        "model": {{"type": "WordLevel", "vocab": {{{}, "<s>": 28}}, "unk_token": " "}}}}"#,
        vocab.join(", ")
    );
    fs::write(folder.join("tokenizer.json"), json).unwrap();
    fs::write(
        folder.join("tokenizer_config.json"),
        r#"{"bos_token": "<s>"}"#,
    )
    .unwrap();
    Tokenizer::open(folder).unwrap()
}

/// The ids of [`letters`] for a text without special tokens and without two blanks in a row.
fn ids(text: &str) -> Vec<u32> {
    (text.chars())
        .map(|letter| match letter {
            'a'..='z' => letter as u32 - 'a' as u32 + 1,
            _ => 27,
        })
        .collect()
}

struct Place {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Place {
    fn new(special: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = letters(folder.path(), special);
        Place { folder, tokenizer }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn read(&self, path: &Path) -> Result<Questions, CalibrationError> {
        Questions::read(path, None, &self.tokenizer, POSITIONS)
    }

    fn lines(&self, text: &str) -> Result<Questions, CalibrationError> {
        self.read(&self.file("q.jsonl", text))
    }
}

const PIQA: &str = r#"{"goal": "open it", "sol1": "pull", "sol2": "eat it", "label": 1}"#;

#[test]
fn text_and_choice_are_one_string() {
    for special in [false, true] {
        let place = Place::new(special);
        let found = place.lines(PIQA).unwrap();
        let front = if special { vec![28] } else { vec![] };
        let choice = |text: &str, characters| Choice {
            ids: [
                front.clone(),
                ids("Question: open it\nAnswer:"),
                ids(" "),
                ids(text),
            ]
            .concat(),
            answer: text.len() + 1,
            characters,
        };
        let question = &found.questions[0];
        assert_eq!(question.choices, [choice("pull", 4), choice("eat it", 6)]);
        assert_eq!((question.right, found.cut), (1, 0));
        assert!(found.has_acc_norm);
        let added = if special { "1" } else { "no" };
        assert_eq!(
            found.protocol,
            format!(
                "multiple choice of PIQA: `q.jsonl`, all 1 questions without examples, {added} special \
                 token added, acc: the choice with the largest log-likelihood is right, acc_norm: that \
                 with the largest over its characters"
            )
        );
        assert!(found.check_vocabulary(29).is_ok());
        assert_eq!(found.check_vocabulary(28).is_ok(), !special);
    }
}

/// `_encode_pair`: blanks at the end of the text are scored with what follows them. Here the two are
/// one token, which without the rule would belong to the text.
#[test]
fn blanks_before_the_choice_belong_to_it() {
    let row = r#"{"sentence": "x _ c", "option1": "ab \u001c ", "option2": "ab", "answer": "2"}"#;
    let found = Place::new(false).lines(row).unwrap();
    let [spaced, plain] = found.questions[0].choices.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!(plain.ids, ids("x ab c"));
    assert_eq!(plain.answer, 2);
    assert_eq!(spaced.ids, [ids("x ab "), vec![27], ids(" c")].concat());
    assert_eq!(spaced.answer, 4);
    assert!(!found.has_acc_norm);
    assert!(!found.protocol.contains("acc_norm"), "{}", found.protocol);
}

/// `tok_encode`: who writes the mark at the start of a text does not get another one.
#[test]
fn a_text_with_the_mark_gets_no_second_one() {
    let row = |sentence: &str| {
        format!(r#"{{"sentence": "{sentence}", "option1": "a", "option2": "b", "answer": "1"}}"#)
    };
    let place = Place::new(true);
    let ids_of = |sentence: &str| {
        let found = place.lines(&row(sentence)).unwrap();
        found.questions[0].choices[0].ids.clone()
    };
    assert_eq!(ids_of("<s>x_ c"), [vec![28], ids("xa c")].concat());
    assert_eq!(ids_of("x_ c"), [vec![28], ids("xa c")].concat());
}

/// A model of n positions sees n tokens, and the last token needs none.
#[test]
fn a_long_text_loses_its_start() {
    let place = Place::new(false);
    let path = place.file("q.jsonl", PIQA);
    let whole = ids("Question: open it\nAnswer: eat it");
    let read = |positions| Questions::read(&path, None, &place.tokenizer, positions);
    let longest = whole.len() - 1;
    assert_eq!(read(longest).unwrap().cut, 0);
    let found = read(longest - 1).unwrap();
    assert_eq!(found.cut, 1);
    assert_eq!(found.questions[0].choices[1].ids, whole[1..]);
    let found = read(7).unwrap();
    assert_eq!(found.cut, 2);
    let choice = &found.questions[0].choices[1];
    assert_eq!((choice.ids.len(), choice.answer), (8, 7));
    let error = read(6).unwrap_err().to_string();
    assert!(
        error.ends_with("row 1: choice 2 has 7 tokens, the model has 6 positions"),
        "{error}"
    );
}

#[test]
fn as_many_questions_as_were_asked_for() {
    let place = Place::new(false);
    let path = place.file("q.json", &format!("[{PIQA}, {PIQA}, {PIQA}]"));
    let read = |most| Questions::read(&path, most, &place.tokenizer, POSITIONS);
    let (all, two) = (read(None).unwrap(), read(Some(2)).unwrap());
    assert_eq!((all.questions.len(), two.questions.len()), (3, 2));
    assert_eq!(all.choices().count(), 6);
    assert!(two.protocol.contains("the first 2 of 3 questions"));
    assert_ne!(all.sha256, two.sha256);
    let error = read(Some(0)).unwrap_err().to_string();
    assert_eq!(error, "`task_examples` is 0, expected at least 1");
    let other = place
        .lines(&PIQA.replace("\"label\": 1", "\"label\": 0"))
        .unwrap();
    assert_ne!(place.lines(PIQA).unwrap().sha256, other.sha256);
}

fn strings(texts: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(texts.to_vec()))
}

fn lists(rows: &[&[&str]]) -> ArrayRef {
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in rows {
        row.iter()
            .for_each(|text| lists.values().append_value(text));
        lists.append(true);
    }
    Arc::new(lists.finish())
}

fn fields(columns: &[(&str, ArrayRef)]) -> ArrayRef {
    let fields = columns.iter().map(|(name, column)| {
        let field = Field::new(*name, column.data_type().clone(), true);
        (Arc::new(field), column.clone())
    });
    Arc::new(StructArray::from(fields.collect::<Vec<_>>()))
}

/// The columns that the hub has of each task, twice, and what they give as JSON lines.
fn tables() -> Vec<(Vec<(&'static str, ArrayRef)>, String)> {
    let whole = |numbers: [i64; 2]| Arc::new(Int64Array::from(numbers.to_vec())) as ArrayRef;
    let arc = vec![
        ("id", whole([3, 4])),
        ("question", strings(&["what", "who"])),
        (
            "choices",
            fields(&[
                ("text", lists(&[&["a", "b", "c"], &["d", "e"]])),
                ("label", lists(&[&["A", "B", "C"], &["1", "2"]])),
            ]),
        ),
        ("answerKey", strings(&["C", "1"])),
    ];
    let arc_lines = r#"{"question": "what", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}
        {"question": "who", "choices": [{"text": "d", "label": "1"}, {"text": "e", "label": "2"}], "answerKey": 1}"#;
    let piqa = vec![
        ("goal", strings(&["go", "come"])),
        ("sol1", strings(&["a", "b"])),
        ("sol2", strings(&["c", "d"])),
        ("label", whole([1, 0])),
    ];
    let piqa_lines = r#"{"goal": "go", "sol1": "a", "sol2": "c", "label": "1"}
        {"goal": "come", "sol1": "b", "sol2": "d", "label": 0}"#;
    let hellaswag = vec![
        ("activity_label", strings(&["Act", "Sit"])),
        ("ctx_a", strings(&["a man", "a dog"])),
        ("ctx_b", strings(&["he", ""])),
        ("endings", lists(&[&["runs", "stops"], &["sits", "naps"]])),
        ("label", strings(&["0", "1"])),
    ];
    let hellaswag_lines = r#"{"activity_label": "Act", "ctx_a": "a man", "ctx_b": "he", "endings": ["runs", "stops"], "label": 0}
        {"activity_label": "Sit", "ctx_a": "a dog", "ctx_b": "", "endings": ["sits", "naps"], "label": 1}"#;
    vec![
        (arc, arc_lines.to_string()),
        (piqa, piqa_lines.to_string()),
        (hellaswag, hellaswag_lines.to_string()),
    ]
}

#[test]
fn every_container_gives_the_same_questions() {
    let place = Place::new(false);
    for (columns, lines) in tables() {
        let want = place.lines(&lines).unwrap();
        assert_eq!(want.questions.len(), 2);
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let parquet = place.file("q.parquet", "");
        let mut writer =
            ArrowWriter::try_new(File::create(&parquet).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let arrow = place.file("q.arrow", "");
        let mut writer =
            StreamWriter::try_new(File::create(&arrow).unwrap(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        for path in [parquet, arrow] {
            let found = place.read(&path).unwrap();
            assert_eq!(found.questions, want.questions, "{}", path.display());
            assert_eq!(found.sha256, want.sha256);
        }
    }
}

#[test]
fn files_that_hold_no_questions_are_refused() {
    let place = Place::new(false);
    let refused = |name: &str, text: &str| {
        let path = place.file(name, text);
        let error = place.read(&path).unwrap_err().to_string();
        error.replace(&path.display().to_string(), name)
    };
    assert_eq!(
        refused("q.jsonl", r#"{"goal": "g", "sol1": "a", "sol2": "b"}"#),
        "row 1 of q.jsonl has the columns of no task that is known (ARC: `question`, `choices`, \
         `answerKey`; PIQA: `goal`, `sol1`, `sol2`, `label`; WinoGrande: `sentence`, `option1`, \
         `option2`, `answer`; HellaSwag: `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`), it \
         has `goal`, `sol1`, `sol2`"
    );
    let second = format!("{PIQA}\n\n{}", PIQA.replace("\"label\": 1", "\"label\": 7"));
    assert_eq!(
        refused("q.jsonl", &second),
        "row 2 (line 3) of q.jsonl has the answer `7` in column `label`, expected 0 to 1"
    );
    let lacking = format!("{PIQA}\n{}", PIQA.replace("sol2", "sol3"));
    assert_eq!(
        refused("q.jsonl", &lacking),
        "row 2 of q.jsonl has no column `sol2`"
    );
    for (name, text, reason) in [
        (
            "q.jsonl",
            "\"a\"",
            "row 1 of q.jsonl is a string, expected columns",
        ),
        ("q.jsonl", "", "q.jsonl holds no text"),
        ("q.json", "[]", "q.json holds no text"),
        (
            "q.txt",
            "a",
            "the rule of `task` needs a row per question, and q.txt is a text file",
        ),
    ] {
        assert_eq!(refused(name, text), reason);
    }
    assert!(refused("q.csv", "a").starts_with("q.csv ends with none of"));
    assert!(refused("q.parquet", "a").starts_with("q.parquet: "));
    let empty = r#"{"sentence": "_ c", "option1": " ", "option2": "b", "answer": "1"}"#;
    let told = refused("q.jsonl", empty);
    assert!(
        told.ends_with("row 1: choice 1 has no text before it"),
        "{told}"
    );
}

/// All questions of the two files that published figures are of.
#[test]
fn the_validation_splits_are_read_whole() {
    let place = Place::new(false);
    for (file, questions, choices) in [
        ("arc_easy.validation.arrow", 570, 2281),
        ("piqa.validation.arrow", 1838, 3676),
    ] {
        let Some(path) = data::shared(&format!("data/tasks/{file}")) else {
            return;
        };
        let found = Questions::read(&path, None, &place.tokenizer, 8192).unwrap();
        assert_eq!(found.questions.len(), questions);
        assert_eq!(found.choices().count(), choices, "{file}");
    }
}
