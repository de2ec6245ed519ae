//! Inputs of `eval` (texts, passages, questions) and the records of their scores.

use std::collections::BTreeSet;

use gptq_calibration::{EvaluationWindows, Passages, Questions, Tokenizer};
use gptq_inference::{
    EvaluationError, OpenedModel, Passage, Question, Scores, accuracy, choice_accuracy,
};
use gptq_types::EvalRecord;

use crate::args::EvalArgs;
use crate::datasets::{HubFiles, public_name};
use crate::failure::Failure;
use crate::models::Model;
use crate::scoring::{ScoringText, check_same_vocabulary, record};

/// Name of the last words in records and tables.
const LAMBADA: &str = "lambada";

/// Everything, in tokens.
pub struct Scored {
    /// At least one.
    pub texts: Vec<Text>,
    pub lambada: Option<Passages>,
    pub tasks: Vec<Task>,
}

/// A text.
pub struct Text {
    /// Empty where it is alone.
    name: String,
    pub windows: EvaluationWindows,
}

/// Questions and the name of their results.
pub struct Task {
    name: String,
    pub questions: Questions,
}

impl Scored {
    /// In the tokens of `model`.
    pub fn read(args: &EvalArgs, model: &Model, opened: &OpenedModel) -> Result<Self, Failure> {
        check_names(args)?;
        let texts = (args.dataset.iter().zip(text_names(&args.dataset)))
            .map(|(dataset, name)| {
                let text = ScoringText {
                    dataset: dataset.clone(),
                    column: args.column.clone(),
                    seq_len: args.seq_len,
                    max_windows: args.max_windows,
                    window_bos: args.window_bos.choice(),
                };
                let windows = text.read(model, &opened.spec, &args.hub)?;
                Ok(Text { name, windows })
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        check_texts(&texts)?;
        let mut scored = Scored {
            texts,
            lambada: None,
            tasks: Vec::new(),
        };
        if args.lambada.is_none() && args.task.is_empty() {
            return Ok(scored);
        }
        let tokenizer = Tokenizer::open(model.tokenizer_dir())?;
        if let Some(given) = &args.lambada {
            let files = HubFiles::new(&args.hub);
            let found = Passages::read(given, args.lambada_examples, &tokenizer, &files)?;
            scored.lambada = Some(found);
        }
        let positions = opened.spec.max_position_embeddings;
        for task in &args.task {
            let questions = Questions::read(&task.file, args.task_examples, &tokenizer, positions)?;
            let name = task.name.clone();
            scored.tasks.push(Task { name, questions });
        }
        Ok(scored)
    }

    /// Refuses tokens outside a model's vocabulary; warns of inputs longer than its trained positions.
    pub fn check(&self, args: &EvalArgs, opened: &[OpenedModel]) -> Result<(), Failure> {
        let vocabulary = |index: usize| {
            let name = args.models[index].as_str();
            (name, opened[index].spec.vocab_size)
        };
        for index in 1..opened.len() {
            check_same_vocabulary(vocabulary(0), vocabulary(index))?;
        }
        let (_, vocab_size) = vocabulary(0);
        for text in &self.texts {
            text.windows.check_vocabulary(vocab_size)?;
        }
        if let Some(lambada) = &self.lambada {
            lambada.check_vocabulary(vocab_size)?;
        }
        for task in &self.tasks {
            task.questions.check_vocabulary(vocab_size)?;
        }
        self.warn_of_lengths(opened[0].spec.max_position_embeddings);
        Ok(())
    }

    fn warn_of_lengths(&self, positions: usize) {
        let windows = self.texts.iter().flat_map(|text| &text.windows.ids);
        let passages = self.lambada.iter().flat_map(|found| &found.passages);
        let longest = [
            ("windows", windows.map(Vec::len).max()),
            ("passages", passages.map(|passage| passage.ids.len()).max()),
        ];
        for (what, tokens) in longest {
            if let Some(tokens) = tokens.filter(|&tokens| tokens > positions) {
                eprintln!(
                    "warning: {what} of {tokens} tokens exceed the model's {positions} positions"
                );
            }
        }
        for Task { name, questions } in &self.tasks {
            if questions.cut > 0 {
                eprintln!(
                    "warning: {name}: the text before {} of {} choices lost its start, since the model \
                     has {positions} positions",
                    questions.cut,
                    questions.choices().count()
                );
            }
        }
    }

    /// Windows of all texts, in their order.
    pub fn windows(&self) -> Vec<Vec<u32>> {
        let windows = self.texts.iter().flat_map(|text| &text.windows.ids);
        windows.cloned().collect()
    }

    /// Passages whose last words are guessed.
    pub fn passages(&self) -> Vec<Passage> {
        let passages = self.lambada.iter().flat_map(|found| &found.passages);
        passages
            .map(|passage| Passage {
                ids: passage.ids.clone(),
                answer: passage.answer,
            })
            .collect()
    }

    /// Choices of all tasks, in their order.
    pub fn choices(&self) -> Vec<Passage> {
        let choices = self.tasks.iter().flat_map(|task| task.questions.choices());
        choices
            .map(|choice| Passage {
                ids: choice.ids.clone(),
                answer: choice.answer,
            })
            .collect()
    }

    /// With the window of its text, where there are several.
    pub fn placed(&self, error: EvaluationError) -> Failure {
        match error {
            EvaluationError::NotFinite { place, mut window } if self.texts.len() > 1 => {
                let text = self.texts.iter().find(|text| {
                    let count = text.windows.ids.len();
                    let is_here = window < count;
                    window -= if is_here { 0 } else { count };
                    is_here
                });
                let name = text.map_or("", |text| &text.name);
                Failure::new(format!(
                    "{place}: the likelihood of window {window} of {name} is not finite"
                ))
            }
            other => other.into(),
        }
    }

    /// A record for each text and checkpoint, ordered by text. Scores that do not depend on a text are in
    /// the records of the first text.
    pub fn records(
        &self,
        args: &EvalArgs,
        models: &[Model],
        opened: &[OpenedModel],
        scores: &[Scores],
    ) -> Result<Vec<EvalRecord>, Failure> {
        let mut records = Vec::new();
        let mut start = 0;
        for text in &self.texts {
            let range = start..start + text.windows.ids.len();
            start = range.end;
            for (index, own) in scores.iter().enumerate() {
                let which = (&models[index], &opened[index]);
                let windows = &own.windows[range.clone()];
                let first = &scores[0].windows[range.clone()];
                let name = &args.models[index];
                let mut record = record(name, which, &text.windows, windows, first)?;
                record.text = text.name.clone();
                if range.start == 0 {
                    self.complete(&mut record, own);
                }
                records.push(record);
            }
        }
        Ok(records)
    }

    fn complete(&self, record: &mut EvalRecord, own: &Scores) {
        record.seconds = own.seconds;
        if let Some(lambada) = &self.lambada {
            record.accuracy = Some(accuracy(LAMBADA, &own.answers));
            record.protocol += &format!("; {LAMBADA}: {}", lambada.protocol);
        }
        let mut weighed = own.choices.as_slice();
        for Task { name, questions } in &self.tasks {
            let (here, rest) = weighed.split_at(questions.choices().count());
            weighed = rest;
            let asked = as_asked(questions);
            let found = choice_accuracy(name, &asked, here, questions.has_acc_norm);
            record.tasks.push(found);
            record.protocol += &format!("; {name}: {}", questions.protocol);
        }
    }
}

fn as_asked(questions: &Questions) -> Vec<Question> {
    let questions = questions.questions.iter();
    questions
        .map(|question| Question {
            right: question.right,
            characters: (question.choices.iter())
                .map(|choice| choice.characters)
                .collect(),
        })
        .collect()
}

/// Refuses two results by one name.
fn check_names(args: &EvalArgs) -> Result<(), Failure> {
    let mut names: BTreeSet<&str> = args.lambada.iter().map(|_| LAMBADA).collect();
    for task in &args.task {
        if !names.insert(&task.name) {
            return Err(Failure::with_hint(
                format!("two tasks are called `{}`", task.name),
                "the NAME of --task NAME=FILE is free",
            ));
        }
    }
    Ok(())
}

/// Names of the texts in tables: the public name, or the one given where several share a public name.
fn text_names(given: &[String]) -> Vec<String> {
    if given.len() == 1 {
        return vec![String::new()];
    }
    let public: Vec<String> = given.iter().map(|dataset| public_name(dataset)).collect();
    let is_one = |name: &String| public.iter().filter(|other| *other == name).count() == 1;
    (given.iter().zip(&public))
        .map(|(given, name)| match is_one(name) {
            true => name.clone(),
            false => given.clone(),
        })
        .collect()
}

/// Refuses a text that was given twice: two columns would have the same name and numbers.
fn check_texts(texts: &[Text]) -> Result<(), Failure> {
    for (index, text) in texts.iter().enumerate() {
        let hash = &text.windows.token_sha256;
        let mut before = texts[..index].iter();
        if let Some(first) = before.find(|first| first.windows.token_sha256 == *hash) {
            return Err(Failure::new(format!(
                "the texts `{}` and `{}` have the same tokens",
                first.name, text.name
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_go_by_the_shortest_name_that_tells_them_apart() {
        let names = |given: &[&str]| {
            let given: Vec<String> = given.iter().map(|name| name.to_string()).collect();
            text_names(&given)
        };
        assert_eq!(names(&["a/b.txt"]), [""]);
        assert_eq!(
            names(&["a/b.txt", "wikitext2=x.raw", "c/b.txt"]),
            ["a/b.txt", "wikitext2", "c/b.txt"]
        );
    }
}
