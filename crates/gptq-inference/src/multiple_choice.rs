//! Multiple choice: the likelihood of each choice after its text, and which one that makes the
//! answer, as lm-evaluation-harness has it.

use gptq_model::{Decoder, ModelError};
use gptq_types::{Accuracy, Share};

use crate::passage::{Passage, ask};
use crate::summary::accuracy;

/// A question whose choices were weighed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Index of the right choice.
    pub right: usize,
    /// Characters of each choice.
    pub characters: Vec<usize>,
}

/// Log-likelihood of each passage's answer, nats: the sum over its tokens, each after the true tokens
/// before it.
///
/// `progress` hears of each block, and of the head as one more.
pub fn weigh_choices(
    decoder: &mut dyn Decoder,
    passages: &[Passage],
    progress: &mut dyn FnMut(),
) -> Result<Vec<f64>, ModelError> {
    let mut weighed = vec![0.0; passages.len()];
    ask(decoder, passages, progress, &mut |input, asked| {
        let targets: Vec<(usize, u32)> = (asked.iter())
            .flat_map(|asked| {
                let answer = passages[asked.passage].answer().iter().copied();
                asked.rows.clone().zip(answer)
            })
            .collect();
        let mut scores = input.score(&targets, None)?.into_iter();
        for asked in asked {
            let tokens = scores.by_ref().take(asked.rows.len());
            weighed[asked.passage] = -tokens.map(|token| token.nll).sum::<f64>();
        }
        Ok(())
    })?;
    Ok(weighed)
}

/// Share of questions whose right choice is the likeliest; with `has_acc_norm` also of those where it
/// is likeliest for its number of characters. `weighed` holds the log-likelihoods of all choices,
/// question after question.
pub fn choice_accuracy(
    task: &str,
    questions: &[Question],
    weighed: &[f64],
    has_acc_norm: bool,
) -> Accuracy {
    let (mut plain, mut normed) = (Vec::new(), Vec::new());
    let mut rest = weighed;
    for question in questions {
        let (own, others) = rest.split_at(question.characters.len());
        rest = others;
        let by_length = own.iter().zip(&question.characters);
        let by_length: Vec<f64> = by_length.map(|(ll, &count)| ll / count as f64).collect();
        plain.push(largest(own) == question.right);
        normed.push(largest(&by_length) == question.right);
    }
    let acc_norm = has_acc_norm.then(|| {
        let found = accuracy(task, &normed);
        Share {
            share: found.share,
            stderr: found.stderr,
        }
    });
    Accuracy {
        acc_norm,
        ..accuracy(task, &plain)
    }
}

/// Index of the largest; of equals the first, as numpy has it.
fn largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(right: usize, characters: &[usize]) -> Question {
        Question {
            right,
            characters: characters.to_vec(),
        }
    }

    /// By hand: the largest of -4, -3, -6 is the second, and of -4/2, -3/1, -6/6 the third; of equals
    /// the first counts; a choice without characters is never the likeliest for them.
    #[test]
    fn the_right_choice_is_the_likeliest_or_the_likeliest_by_length() {
        let weighed = [-4.0, -3.0, -6.0, -5.0, -5.0, -0.5, -2.0];
        let questions = |right: [usize; 3]| {
            [
                question(right[0], &[2, 1, 6]),
                question(right[1], &[1, 1]),
                question(right[2], &[0, 4]),
            ]
        };
        let share = |right| {
            let found = choice_accuracy("t", &questions(right), &weighed, true);
            (found.share, found.acc_norm.unwrap().share)
        };
        assert_eq!(share([1, 0, 0]), (1.0, 1.0 / 3.0));
        assert_eq!(share([2, 0, 1]), (1.0 / 3.0, 1.0));
        assert_eq!(share([0, 1, 1]), (0.0, 1.0 / 3.0));
        let found = choice_accuracy("t", &questions([1, 0, 1]), &weighed, false);
        assert_eq!((found.task.as_str(), found.examples), ("t", 3));
        assert_eq!(found.acc_norm, None);
        assert!((found.share - 2.0 / 3.0).abs() < 1e-12);
        // sqrt(p (1 - p) / (n - 1))
        assert!((found.stderr - (2.0f64 / 9.0 / 2.0).sqrt()).abs() < 1e-12);
    }
}
