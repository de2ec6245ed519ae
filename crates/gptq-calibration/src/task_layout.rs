//! Multiple choice out of rows: in four layouts of columns, as the tasks of lm-evaluation-harness
//! 0.4.13 word it (`arc_easy`, `piqa`, `winogrande`, `hellaswag`).

use gptq_types::outside_name::shown;
use serde_json::Value;

use crate::layout::no_text;

/// Choices that a question may have. Each repeats the text before it.
const CHOICES: std::ops::RangeInclusive<usize> = 2..=64;
/// A longer text is part of no question.
const MAX_CELL_BYTES: usize = 1 << 20;
/// Characters of a label that an error repeats.
const SHOWN_LABEL: usize = 30;

/// The task of a question: its columns and its wording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskLayout {
    Arc,
    Piqa,
    WinoGrande,
    HellaSwag,
}

/// A question in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Worded {
    pub(crate) choices: Vec<WordedChoice>,
    /// Index of the right one.
    pub(crate) right: usize,
}

/// The text whose likelihood counts, and what stands before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WordedChoice {
    pub(crate) context: String,
    pub(crate) continuation: String,
    /// Characters of the choice itself, as Python counts them.
    pub(crate) characters: usize,
}

impl TaskLayout {
    pub(crate) const ALL: [TaskLayout; 4] = [
        TaskLayout::Arc,
        TaskLayout::Piqa,
        TaskLayout::WinoGrande,
        TaskLayout::HellaSwag,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            TaskLayout::Arc => "ARC",
            TaskLayout::Piqa => "PIQA",
            TaskLayout::WinoGrande => "WinoGrande",
            TaskLayout::HellaSwag => "HellaSwag",
        }
    }

    /// The columns that are read; a row with all of them is of this layout.
    pub(crate) fn columns(self) -> &'static [&'static str] {
        match self {
            TaskLayout::Arc => &["question", "choices", "answerKey"],
            TaskLayout::Piqa => &["goal", "sol1", "sol2", "label"],
            TaskLayout::WinoGrande => &["sentence", "option1", "option2", "answer"],
            TaskLayout::HellaSwag => &["activity_label", "ctx_a", "ctx_b", "endings", "label"],
        }
    }

    /// Whether likelihoods are also normalized by the length of choices. WinoGrande's choices are part of
    /// the context, and the scored continuation is the same for both.
    pub(crate) fn has_acc_norm(self) -> bool {
        self != TaskLayout::WinoGrande
    }

    /// The layout whose columns are all there.
    pub(crate) fn among(names: &[&str]) -> Option<Self> {
        let has_all = |layout: &Self| layout.columns().iter().all(|name| names.contains(name));
        Self::ALL.into_iter().find(has_all)
    }

    /// All layouts with their columns, for an error.
    pub(crate) fn known() -> String {
        let words = Self::ALL.map(|layout| {
            let columns = layout.columns().join("`, `");
            format!("{}: `{columns}`", layout.name())
        });
        words.join("; ")
    }

    /// The question of a row by the cells of [`TaskLayout::columns`]; the error is what is wrong with
    /// the row.
    pub(crate) fn question(self, cells: &[Option<Value>]) -> Result<Worded, String> {
        let row = Row {
            columns: self.columns(),
            cells,
        };
        let question = match self {
            TaskLayout::Arc => arc(&row),
            TaskLayout::Piqa => piqa(&row),
            TaskLayout::WinoGrande => winogrande(&row),
            TaskLayout::HellaSwag => hellaswag(&row),
        }?;
        match question.choices.len() {
            count if CHOICES.contains(&count) => Ok(question),
            1 => Err("has 1 choice, expected 2 or more".to_string()),
            count => Err(format!("has {count} choices, expected 2 to 64")),
        }
    }
}

/// The cells of a row by their names.
struct Row<'a> {
    columns: &'static [&'static str],
    cells: &'a [Option<Value>],
}

impl Row<'_> {
    fn cell(&self, column: &str) -> Result<&Value, String> {
        let place = self.columns.iter().position(|name| *name == column);
        let cell = place.and_then(|place| self.cells.get(place)?.as_ref());
        cell.ok_or_else(|| format!("has no column `{column}`"))
    }

    fn text(&self, column: &str) -> Result<&str, String> {
        text_of(self.cell(column)?, column)
    }

    fn texts(&self, column: &str) -> Result<Vec<&str>, String> {
        texts_of(self.cell(column)?, column)
    }

    /// A string as it is, a whole number in digits: files of one data set differ in that.
    fn label(&self, column: &str) -> Result<String, String> {
        match self.cell(column)? {
            Value::Number(number) => Ok(number.to_string()),
            cell => text_of(cell, column).map(str::to_string),
        }
    }

    /// The place among `count` choices that a number says; `first` is the number of the first one.
    fn place(&self, column: &str, first: usize, count: usize) -> Result<usize, String> {
        let label = self.label(column)?;
        let place = (label.trim().parse::<usize>().ok()).and_then(|label| label.checked_sub(first));
        place.filter(|&place| place < count).ok_or_else(|| {
            format!(
                "has the answer `{}` in column `{column}`, expected {first} to {}",
                shown(&label, SHOWN_LABEL),
                (first + count).saturating_sub(1)
            )
        })
    }
}

fn text_of<'a>(cell: &'a Value, column: &str) -> Result<&'a str, String> {
    match cell {
        Value::String(text) if text.len() > MAX_CELL_BYTES => Err(format!(
            "holds {} bytes in column `{column}`, the limit is {MAX_CELL_BYTES}",
            text.len()
        )),
        Value::String(text) => Ok(text),
        cell => Err(no_text(column, cell)),
    }
}

fn texts_of<'a>(cell: &'a Value, column: &str) -> Result<Vec<&'a str>, String> {
    match cell {
        Value::Array(cells) => cells.iter().map(|cell| text_of(cell, column)).collect(),
        _ => Err(format!("holds no list of strings in column `{column}`")),
    }
}

/// `Question: ...`, and a choice behind one space.
fn asked(question: &str, choices: &[&str]) -> Vec<WordedChoice> {
    let context = format!("Question: {question}\nAnswer:");
    (choices.iter())
        .map(|choice| choice_after(context.clone(), choice))
        .collect()
}

fn choice_after(context: String, choice: &str) -> WordedChoice {
    WordedChoice {
        context,
        continuation: format!(" {choice}"),
        characters: choice.chars().count(),
    }
}

fn arc(row: &Row<'_>) -> Result<Worded, String> {
    let (labels, choices) = labelled_choices(row.cell("choices")?)?;
    check_count(choices.len())?;
    let key = row.label("answerKey")?;
    let right = labels.iter().position(|label| *label == key);
    Ok(Worded {
        choices: asked(row.text("question")?, &choices),
        right: right.ok_or_else(|| {
            format!(
                "has the answer `{}` in column `answerKey`, which is the label of no choice",
                shown(&key, SHOWN_LABEL)
            )
        })?,
    })
}

/// Labels and texts: as two lists, which is how the hub has them, or as a list of pairs.
fn labelled_choices(cell: &Value) -> Result<(Vec<&str>, Vec<&str>), String> {
    let column = "choices";
    match cell {
        Value::Object(_) if cell.get("label").is_some() && cell.get("text").is_some() => {
            let labels = texts_of(&cell["label"], column)?;
            let texts = texts_of(&cell["text"], column)?;
            match labels.len() == texts.len() {
                true => Ok((labels, texts)),
                false => Err(format!(
                    "has {} labels and {} texts in column `{column}`",
                    labels.len(),
                    texts.len()
                )),
            }
        }
        Value::Array(pairs) => (pairs.iter())
            .map(|pair| {
                Ok((
                    text_of(&pair["label"], column)?,
                    text_of(&pair["text"], column)?,
                ))
            })
            .collect(),
        _ => Err(format!(
            "holds no `label` and `text` of choices in column `{column}`"
        )),
    }
}

/// Before the text in front is repeated so often.
fn check_count(count: usize) -> Result<(), String> {
    match count > *CHOICES.end() {
        true => Err(format!("has {count} choices, expected 2 to 64")),
        false => Ok(()),
    }
}

fn piqa(row: &Row<'_>) -> Result<Worded, String> {
    let choices = [row.text("sol1")?, row.text("sol2")?];
    Ok(Worded {
        right: row.place("label", 0, choices.len())?,
        choices: asked(row.text("goal")?, &choices),
    })
}

/// The blank is filled with each option; scored is what follows it ("partial" scoring: Trinh and Le
/// 2018, arXiv:1806.02847).
fn winogrande(row: &Row<'_>) -> Result<Worded, String> {
    let sentence = row.text("sentence")?;
    let (before, after) = (sentence.split_once('_'))
        .ok_or_else(|| "has no blank `_` in column `sentence`".to_string())?;
    let filled = |option: &str| {
        let context = format!("{before}{option}");
        WordedChoice {
            characters: context.chars().count(),
            context,
            continuation: format!(" {}", after.trim_matches(is_python_space)),
        }
    };
    Ok(Worded {
        right: row.place("answer", 1, 2)?,
        choices: vec![filled(row.text("option1")?), filled(row.text("option2")?)],
    })
}

fn hellaswag(row: &Row<'_>) -> Result<Worded, String> {
    let endings = row.texts("endings")?;
    check_count(endings.len())?;
    let context = cleaned(&format!(
        "{}: {} {}",
        row.text("activity_label")?,
        row.text("ctx_a")?,
        capitalized(row.text("ctx_b")?)
    ));
    Ok(Worded {
        right: row.place("label", 0, endings.len())?,
        choices: (endings.iter())
            .map(|ending| choice_after(context.clone(), &cleaned(ending)))
            .collect(),
    })
}

/// Without the marks that WikiHow's pages left: ` [title]` ends a sentence, other brackets go with
/// what is in them, and of two spaces one stays.
fn cleaned(text: &str) -> String {
    let text = text.trim_matches(is_python_space).replace(" [title]", ". ");
    without_brackets(&text).replace("  ", " ")
}

/// Brackets that close in their line; a second one that opens inside belongs to the first.
fn without_brackets(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        kept.push_str(&rest[..open]);
        let from = &rest[open..];
        let line = &from[..from.find('\n').unwrap_or(from.len())];
        let gone = line.find(']').map(|close| close + 1);
        if gone.is_none() {
            kept.push_str(line);
        }
        rest = &from[gone.unwrap_or(line.len())..];
    }
    kept + rest
}

/// The first letter large, all others small, as Python's `str.capitalize`; two letters in one, which
/// have a third form there (`ǆ`), become two large ones.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let Some(first) = letters.next() else {
        return String::new();
    };
    let mut large = first.to_uppercase();
    let head: String = large.next().into_iter().collect();
    let rest: String = large.chain(letters).collect();
    head + &rest.to_lowercase()
}

/// Characters that `str.strip` removes: white space, and four separators that Unicode does not count.
pub(crate) fn is_python_space(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The question of a row that a JSON object holds.
    fn question(row: Value) -> Result<Worded, String> {
        let names: Vec<&str> = (row.as_object().unwrap().keys())
            .map(String::as_str)
            .collect();
        let layout = TaskLayout::among(&names).unwrap();
        let cells = layout.columns().iter().map(|name| row.get(name).cloned());
        layout.question(&cells.collect::<Vec<_>>())
    }

    fn texts(question: &Worded) -> Vec<(&str, &str, usize)> {
        let choices = question.choices.iter();
        choices
            .map(|choice| {
                let (before, after) = (&choice.context, &choice.continuation);
                (before.as_str(), after.as_str(), choice.characters)
            })
            .collect()
    }

    #[test]
    fn columns_tell_the_layout() {
        for layout in TaskLayout::ALL {
            let mut names = [&["id"], layout.columns()].concat();
            assert_eq!(TaskLayout::among(&names), Some(layout));
            names.remove(2);
            assert_eq!(TaskLayout::among(&names), None);
        }
    }

    #[test]
    fn arc_is_a_question_with_a_choice_behind_a_space() {
        let of_the_hub = json!({
            "id": 7, "question": "Which floats? ", "answerKey": "2",
            "choices": {"label": ["1", "2", "3"], "text": ["iron", "ölig wood", ""]}});
        let found = question(of_the_hub).unwrap();
        let context = "Question: Which floats? \nAnswer:";
        assert_eq!(
            texts(&found),
            [
                (context, " iron", 4),
                (context, " ölig wood", 9),
                (context, " ", 0)
            ]
        );
        assert_eq!(found.right, 1);
        let in_pairs = json!({
            "question": "q", "answerKey": 4,
            "choices": [{"text": "a", "label": "3"}, {"text": "b", "label": "4"}]});
        let found = question(in_pairs).unwrap();
        assert_eq!((found.right, texts(&found)[1].1), (1, " b"));
    }

    #[test]
    fn piqa_has_two_solutions() {
        let row = |label: Value| json!({"goal": "open it", "sol1": "pull", "sol2": "eat", "label": label});
        let context = "Question: open it\nAnswer:";
        let found = question(row(json!(1))).unwrap();
        assert_eq!(texts(&found), [(context, " pull", 4), (context, " eat", 3)]);
        assert_eq!(found.right, 1);
        assert_eq!(question(row(json!("0"))).unwrap().right, 0);
    }

    /// One text is scored twice, after each option: what stands before the blank and the option is
    /// the context.
    #[test]
    fn winogrande_scores_what_follows_the_blank() {
        let row = json!({
            "sentence": "The cup did not fit the bag as _  was too _ large. ",
            "option1": "the cup", "option2": "it", "answer": "1"});
        let found = question(row).unwrap();
        let after = " was too _ large.";
        assert_eq!(
            texts(&found),
            [
                ("The cup did not fit the bag as the cup", after, 38),
                ("The cup did not fit the bag as it", after, 33)
            ]
        );
        assert_eq!(found.right, 0);
        assert!(!TaskLayout::WinoGrande.has_acc_norm());
    }

    /// By hand, after `preprocess` of the harness: strip, ` [title]`, brackets, double spaces once.
    #[test]
    fn hellaswag_is_cleaned_of_its_marks() {
        let row = json!({
            "ind": 4, "activity_label": "Baking", "label": "1",
            "ctx_a": "[header] How to bake [title] Mix it. [step] Stir.", "ctx_b": "the Cook",
            "endings": [" opens [a] it.", "sleeps   now\n"]});
        let found = question(row).unwrap();
        let context = "Baking: How to bake. Mix it. Stir. The cook";
        assert_eq!(
            texts(&found),
            [(context, " opens it.", 9), (context, " sleeps  now", 11)]
        );
        assert_eq!(found.right, 1);
    }

    #[test]
    fn brackets_close_in_their_line() {
        for (text, want) in [
            ("a [b] c", "a  c"),
            ("a [b [c] d] e", "a  d] e"),
            ("[x][y]z", "z"),
            ("a [b\nc] d [e] f", "a [b\nc] d  f"),
            ("a ] b [", "a ] b ["),
            ("", ""),
        ] {
            assert_eq!(without_brackets(text), want, "{text:?}");
        }
    }

    #[test]
    fn letters_and_spaces_are_pythons() {
        for (text, want) in [
            ("", ""),
            ("a Man, A Plan", "A man, a plan"),
            ("[Title] X", "[title] x"),
            ("ßa", "Ssa"),
            ("éCOLE", "École"),
        ] {
            assert_eq!(capitalized(text), want);
        }
        assert_eq!(cleaned("\u{1f}\u{a0} a \n"), "a");
    }

    #[test]
    fn a_row_without_a_right_choice_says_why() {
        let error = |row: Value| question(row).unwrap_err();
        let piqa = |label: Value| json!({"goal": "g", "sol1": "a", "sol2": "b", "label": label});
        for label in [json!(-1), json!(2), json!("x"), json!("")] {
            let told = error(piqa(label.clone()));
            assert!(
                told.contains("in column `label`, expected 0 to 1"),
                "{told}"
            );
        }
        assert_eq!(error(piqa(Value::Null)), "holds no text in column `label`");
        let arc = |choices: Value| json!({"question": "q", "choices": choices, "answerKey": "C"});
        for (choices, reason) in [
            (
                json!({"label": ["A", "B"], "text": ["a", "b"]}),
                "has the answer `C` in column `answerKey`, which is the label of no choice",
            ),
            (
                json!({"label": ["A"], "text": ["a", "b"]}),
                "has 1 labels and 2 texts in column `choices`",
            ),
            (
                json!({"label": ["C"], "text": ["c"]}),
                "has 1 choice, expected 2 or more",
            ),
            (
                json!({"label": vec!["C"; 65], "text": vec!["c"; 65]}),
                "has 65 choices, expected 2 to 64",
            ),
            (
                json!("abc"),
                "holds no `label` and `text` of choices in column `choices`",
            ),
            (
                json!([{"label": "C", "text": 3}]),
                "holds a number in column `choices`, expected a string",
            ),
        ] {
            assert_eq!(error(arc(choices)), reason);
        }
        let blank = json!({"sentence": "no", "option1": "a", "option2": "b", "answer": "2"});
        assert_eq!(error(blank), "has no blank `_` in column `sentence`");
        let long =
            json!({"goal": "g".repeat(MAX_CELL_BYTES + 1), "sol1": "a", "sol2": "b", "label": 0});
        assert!(error(long).starts_with("holds 1048577 bytes in column `goal`"));
    }
}
