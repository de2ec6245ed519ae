//! Scores find their runs.
//!
//! A score belongs to the run at the path that `gptq eval` was given, else to the one run whose
//! folder or branch has its last name. Scores of unquantized models belong to no run.

use gptq_types::{BranchRecord, EvalRecord, RunRecord};

use super::data::{Found, FoundRun, Made, REPORT_SCHEMA, Report, ReportError, Row, Score, Text};
use super::date::utc;
use super::degraded::Degraded;
use super::labels::{UNQUANTIZED, branch_of, name_rows, plain_path, tail};

/// Two measurements of one checkpoint on one text differ by more than rounding.
const SAME_NLL: f64 = 1e-6;

/// A row while scores are still looking for it.
pub(super) struct Open {
    /// The place as given, of the run or of the scored model.
    pub(super) place: String,
    pub(super) name: String,
    pub(super) run: Option<RunRecord>,
    record: Option<BranchRecord>,
    scores: Vec<OpenScore>,
    is_reference: bool,
}

impl Open {
    /// Packing of a scored checkpoint; `None` of a float model.
    pub(super) fn kind(&self) -> Option<&str> {
        let kind = self.scores.first()?.record.kind.as_str();
        (kind != UNQUANTIZED).then_some(kind)
    }
}

struct OpenScore {
    text: usize,
    against: Option<usize>,
    record: EvalRecord,
}

#[derive(Default)]
struct Joiner {
    rows: Vec<Open>,
    texts: Vec<Text>,
    /// Row of each text's reference.
    references: Vec<Option<usize>>,
    doubts: Vec<String>,
}

impl Report {
    /// Joins runs and scores.
    pub fn of(found: Found, made: &Made) -> Result<Self, ReportError> {
        let mut joiner = Joiner::default();
        for run in found.runs {
            joiner.add_run(run)?;
        }
        let runs = joiner.rows.len();
        for file in found.evaluations {
            for of_text in file.chunk_by(|a, b| a.text == b.text) {
                joiner.add_file(of_text.to_vec(), runs)?;
            }
        }
        for row in 0..runs {
            joiner.add_own_scores(row);
        }
        match joiner.rows.is_empty() {
            true => Err(ReportError::Empty),
            false => Ok(joiner.finish(made)),
        }
    }
}

impl Joiner {
    fn add_run(&mut self, found: FoundRun) -> Result<(), ReportError> {
        let place = plain_path(&found.place).to_string();
        if self.rows.iter().any(|row| row.place == place) {
            return Err(ReportError::Twice(place));
        }
        self.rows.push(Open {
            place,
            name: found.name,
            run: Some(found.run),
            record: found.record,
            scores: Vec::new(),
            is_reference: false,
        });
        Ok(())
    }

    /// The scores of one file on one text.
    fn add_file(&mut self, file: Vec<EvalRecord>, runs: usize) -> Result<(), ReportError> {
        let owners = self.owners(&file, runs)?;
        // A single packed checkpoint is not a reference for others.
        let compared = file.len() > 1 || file.iter().any(|record| record.kind == UNQUANTIZED);
        let mut first = None;
        for (record, owner) in file.into_iter().zip(owners) {
            let row = owner.unwrap_or_else(|| self.stranger(&record));
            let text = self.text(&record);
            if compared && first.is_none() {
                self.refer(text, row);
            }
            let against = first.filter(|&first| first != row);
            first.get_or_insert(row);
            self.add_score(row, text, against, record);
        }
        Ok(())
    }

    /// The run that owns each score, where one does.
    fn owners(&self, file: &[EvalRecord], runs: usize) -> Result<Vec<Option<usize>>, ReportError> {
        let mut owners: Vec<Option<usize>> = (file.iter())
            .map(|record| {
                let place = plain_path(&record.model);
                let here = (0..runs).find(|&row| self.rows[row].place == place);
                here.filter(|_| record.kind != UNQUANTIZED)
            })
            .collect();
        // A run whose path was given owns that score and no other of the file.
        let free: Vec<usize> = (0..runs)
            .filter(|row| !owners.contains(&Some(*row)))
            .collect();
        for (index, record) in file.iter().enumerate() {
            if owners[index].is_none() && record.kind != UNQUANTIZED {
                let owner = self.named(record, &free)?;
                if let Some(other) = owner.and_then(|_| owners.iter().position(|o| *o == owner)) {
                    let models = (file[other].model.clone(), record.model.clone());
                    return Err(ReportError::Contested(models.0, models.1));
                }
                owners[index] = owner;
            }
        }
        Ok(owners)
    }

    /// The only run of `free` with the name of the scored model.
    fn named(&self, record: &EvalRecord, free: &[usize]) -> Result<Option<usize>, ReportError> {
        let scored = [tail(&record.model), branch_of(&record.model)];
        let same = |row: &&usize| {
            let row = &self.rows[**row];
            let names = [row.name.as_str(), tail(&row.place)];
            names.iter().any(|name| scored.contains(name))
        };
        let found: Vec<usize> = free.iter().filter(same).copied().collect();
        match found.as_slice() {
            [] => Ok(None),
            [row] => Ok(Some(*row)),
            several => {
                let places: Vec<String> = (several.iter())
                    .map(|&row| format!("`{}`", self.rows[row].place))
                    .collect();
                Err(ReportError::Ambiguous {
                    model: record.model.clone(),
                    runs: places.join(" or "),
                })
            }
        }
    }

    /// The scores that a branch of a matrix brings along.
    fn add_own_scores(&mut self, row: usize) {
        let record = self.rows[row].record.as_mut();
        let Some(evaluation) = record.and_then(|record| record.evaluation.take()) else {
            return;
        };
        let text = self.text(&evaluation.reference);
        let reference = self.stranger(&evaluation.reference);
        self.refer(text, reference);
        self.add_score(reference, text, None, evaluation.reference);
        self.add_score(row, text, Some(reference), evaluation.branch);
    }

    /// The row of a checkpoint without a run; the same scores under two names are one checkpoint.
    fn stranger(&mut self, record: &EvalRecord) -> usize {
        let same = |score: &OpenScore| {
            let other = &score.record;
            is_same_text(other, record)
                && (other.nll, other.weight_bytes) == (record.nll, record.weight_bytes)
                && other.kind == record.kind
        };
        let known = self.rows.iter().position(|row| {
            row.run.is_none() && (row.place == record.model || row.scores.iter().any(same))
        });
        known.unwrap_or_else(|| {
            self.rows.push(Open {
                place: record.model.clone(),
                name: tail(&record.model).to_string(),
                run: None,
                record: None,
                scores: Vec::new(),
                is_reference: false,
            });
            self.rows.len() - 1
        })
    }

    fn text(&mut self, record: &EvalRecord) -> usize {
        let key = |text: &Text| (text.token_sha256.clone(), text.windows, text.seq_len);
        let wanted = (record.token_sha256.clone(), record.windows, record.seq_len);
        let known = self.texts.iter().position(|text| key(text) == wanted);
        known.unwrap_or_else(|| {
            self.texts.push(Text {
                protocol: record.protocol.clone(),
                token_sha256: record.token_sha256.clone(),
                windows: record.windows,
                seq_len: record.seq_len,
                reference: None,
            });
            self.references.push(None);
            self.texts.len() - 1
        })
    }

    /// Makes a row the reference of a text, if that has none yet.
    fn refer(&mut self, text: usize, row: usize) {
        self.references[text].get_or_insert(row);
        if self.rows[row].run.is_none() {
            self.rows[row].is_reference = true;
        }
    }

    fn add_score(&mut self, row: usize, text: usize, against: Option<usize>, record: EvalRecord) {
        let place = self.rows[row].place.clone();
        let scores = &mut self.rows[row].scores;
        let Some(first) = scores.iter_mut().find(|score| score.text == text) else {
            scores.push(OpenScore {
                text,
                against,
                record,
            });
            return;
        };
        if (first.record.nll - record.nll).abs() > SAME_NLL * first.record.nll.abs() {
            self.doubts.push(format!(
                "`{place}` was scored twice on the same text, with perplexities {:.4} and {:.4}; \
                 the first counts",
                first.record.perplexity, record.perplexity
            ));
            return;
        }
        complete(&mut first.record, record, first.against == against);
    }

    fn finish(self, made: &Made) -> Report {
        let names = name_rows(&self.rows);
        let mut doubts = self.doubts;
        let mut texts = self.texts;
        for (text, reference) in texts.iter_mut().zip(&self.references) {
            text.reference = reference.map(|row| names[row].0.clone());
        }
        let mut rows: Vec<Row> = (self.rows.into_iter().zip(&names))
            .map(|(row, (name, label))| closed(row, name, label, &names))
            .collect();
        for row in &rows {
            doubts.extend(row.scores.iter().filter_map(|score| {
                let usual = texts[score.text].reference.as_ref()?;
                let against = score.against.as_ref().filter(|name| *name != usual)?;
                Some(format!(
                    "`{}` was compared with `{against}`, others with `{usual}`",
                    row.name
                ))
            }));
        }
        let mut models: Vec<String> = Vec::new();
        for row in &rows {
            let model = row.run.as_ref().map(|run| run.model.clone());
            models.extend(model.filter(|model| !models.contains(model)));
        }
        rows.sort_by_key(|row| !row.is_reference);
        Report {
            schema: REPORT_SCHEMA,
            tool: made.tool.clone(),
            date: utc(made.seconds),
            models,
            texts,
            rows,
            doubts,
        }
    }
}

fn is_same_text(one: &EvalRecord, other: &EvalRecord) -> bool {
    let key = |r: &EvalRecord| (r.token_sha256.clone(), r.windows, r.seq_len);
    key(one) == key(other)
}

/// Fills what `first` lacks; what is relative to a reference only where that is the same.
fn complete(first: &mut EvalRecord, later: EvalRecord, same_reference: bool) {
    first.accuracy = first.accuracy.take().or(later.accuracy);
    for task in later.tasks {
        if !first.tasks.iter().any(|known| known.task == task.task) {
            first.tasks.push(task);
        }
    }
    first.speed = first.speed.take().or(later.speed);
    if same_reference || first.kl.is_none() {
        first.kl = first.kl.or(later.kl);
        first.kl_p999 = first.kl_p999.or(later.kl_p999);
        first.top1_agreement = first.top1_agreement.or(later.top1_agreement);
        first.nll_difference = first.nll_difference.or(later.nll_difference);
        if first.kl_by_position.is_empty() {
            first.kl_by_position = later.kl_by_position;
        }
    }
}

fn closed(row: Open, name: &str, label: &str, names: &[(String, String)]) -> Row {
    let scores: Vec<Score> = (row.scores.into_iter())
        .map(|score| Score {
            text: score.text,
            against: score.against.map(|row| names[row].0.clone()),
            record: score.record,
        })
        .collect();
    let scored = scores.iter().map(|score| score.record.weight_bytes);
    let known = row.record.as_ref().map(|record| record.weight_bytes);
    Row {
        name: name.to_string(),
        label: label.to_string(),
        is_reference: row.is_reference,
        kind: (scores.first()).map(|score| score.record.kind.clone()),
        desc: row.record.as_ref().map(|r| r.permutation.desc.clone()),
        weight_bytes: known.into_iter().chain(scored).find(|&bytes| bytes > 0),
        bits_per_weight: row.record.as_ref().map(|record| record.bits_per_weight),
        readings: row.record.map_or(Vec::new(), |record| record.readings),
        scores,
        degraded: row.run.as_ref().map(Degraded::of),
        run: row.run,
    }
}
