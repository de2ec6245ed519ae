//! Scores against plain f64 arithmetic, on a model whose every answer is known.

use std::ops::Range;
use std::sync::Arc;

use gptq_inference::{
    Passage, guess_last_words, score_reference, score_windows, summarize, weigh_choices,
};
use gptq_model::{
    ActivationSink, Decoder, DeviceContext, HeadInput, ModelError, ModelSpec, Tap, Weight,
};
use gptq_types::LayerName;

const VOCAB: usize = 11;

/// Single-precision logits and exponentials against double ones.
const TOLERANCE: f64 = 1e-5;

/// A table of next-token logits: a token's hidden state is its one-hot row, and the head's
/// transpose holds what follows it. Its one block changes nothing.
struct Bigrams {
    spec: ModelSpec,
    head: Arc<Vec<f32>>, // [next, token]
    batches: Vec<Vec<Vec<u32>>>,
    broken: Option<u32>, // a token whose state is not a number
}

impl Bigrams {
    fn new(logit: impl Fn(usize, usize) -> f32) -> Self {
        let config = format!(
            r#"{{"model_type": "llama", "hidden_size": {VOCAB}, "intermediate_size": 4,
                "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": {VOCAB},
                "head_dim": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0, "hidden_act": "silu"}}"#
        );
        let of = |next: usize| (0..VOCAB).map(move |token| (token, next));
        let cells = (0..VOCAB).flat_map(of);
        Bigrams {
            spec: ModelSpec::parse(&config).unwrap(),
            head: Arc::new(cells.map(|(token, next)| logit(token, next)).collect()),
            batches: Vec::new(),
            broken: None,
        }
    }

    /// The likeliest token after `token` is `3 token + 1`.
    fn chain() -> Self {
        Bigrams::new(|token, next| if next == after(token) { 2.0 } else { 1.0 })
    }

    fn probabilities(&self, token: u32) -> Vec<f64> {
        let logits = (0..VOCAB).map(|next| f64::from(self.head[next * VOCAB + token as usize]));
        let powers: Vec<f64> = logits.map(f64::exp).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }
}

fn after(token: usize) -> usize {
    (3 * token + 1) % VOCAB
}

impl Decoder for Bigrams {
    fn device(&self) -> &DeviceContext {
        &DeviceContext::Cpu
    }

    fn leave_room(&mut self, _: usize) {}

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Two windows of one length to a batch, as a decoder cuts them.
    fn embed(&mut self, windows: &[Vec<u32>]) -> Result<(), ModelError> {
        let same = windows.chunk_by(|a, b| a.len() == b.len());
        let cut = same.flat_map(|same| same.chunks(2)).map(<[_]>::to_vec);
        self.batches = cut.collect();
        Ok(())
    }

    fn load_block(&mut self, _: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn capture(&mut self, _: Tap, _: &mut dyn ActivationSink) -> Result<(), ModelError> {
        Ok(())
    }

    fn finish_block(&mut self) -> Result<(), ModelError> {
        Ok(())
    }

    fn forward_block(&mut self) -> Result<(), ModelError> {
        Ok(())
    }

    fn weight(&self, layer: &LayerName) -> Result<Weight<'_>, ModelError> {
        Err(ModelError::NotResident(layer.clone()))
    }

    fn replace_weight(&mut self, layer: &LayerName, _: Vec<f32>) -> Result<(), ModelError> {
        Err(ModelError::NotResident(layer.clone()))
    }

    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn head_input(&mut self, batch: usize) -> Result<HeadInput, ModelError> {
        let mut states = Vec::new();
        for &token in self.batches[batch].iter().flatten() {
            let one = if self.broken == Some(token) {
                f32::NAN
            } else {
                1.0
            };
            let state = |at| if at == token as usize { one } else { 0.0 };
            states.extend((0..VOCAB).map(state));
        }
        Ok(HeadInput::on_host(states, self.head.clone(), VOCAB))
    }

    fn batch_windows(&self, batch: usize) -> &[Vec<u32>] {
        &self.batches[batch]
    }
}

fn wave(step: f32) -> impl Fn(usize, usize) -> f32 {
    move |token, next| 3.0 * (step * (token * VOCAB + next) as f32).sin()
}

fn windows(range: Range<u32>, tokens: u32) -> Vec<Vec<u32>> {
    range
        .map(|seed| {
            (0..tokens)
                .map(|at| (seed * 7 + at * at * 3) % VOCAB as u32)
                .collect()
        })
        .collect()
}

#[test]
fn divergence_by_position_is_that_of_plain_softmaxes() {
    let (mut first, mut second) = (Bigrams::new(wave(0.37)), Bigrams::new(wave(0.39)));
    let windows = windows(0..5, 41);
    let quiet = &mut || {};
    let (of_first, hidden) = score_reference(&mut first, &windows, quiet).unwrap();
    let scored = score_windows(&mut second, &windows, Some(&hidden), quiet);
    let of_second = scored.unwrap();
    let found = summarize(&of_second, &of_first);
    let compared = found.comparison.unwrap();

    let mut all = Vec::new();
    let (mut nll, mut agreeing) = (0.0, 0);
    let mut parts = vec![Vec::new(); 32];
    for window in &windows {
        for at in 0..40 {
            let (p, q) = (
                first.probabilities(window[at]),
                second.probabilities(window[at]),
            );
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            let top = |values: &[f64]| {
                (0..VOCAB)
                    .max_by(|&a, &b| values[a].total_cmp(&values[b]))
                    .unwrap()
            };
            agreeing += usize::from(top(&p) == top(&q));
            nll -= q[window[at + 1] as usize].ln();
            parts[at * 32 / 40].push(kl);
            all.push(kl);
        }
    }
    let close = |found: f64, want: f64| {
        assert!((found - want).abs() < TOLERANCE, "{found} against {want}");
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!(mean(&all) > 0.01, "the models must differ");
    close(found.nll, nll / 200.0);
    close(compared.kl, mean(&all));
    close(compared.top1_agreement, agreeing as f64 / 200.0);
    assert_eq!(compared.kl_by_position.len(), 32);
    for (found, part) in compared.kl_by_position.iter().zip(&parts) {
        close(*found, mean(part));
    }
    all.sort_by(f64::total_cmp);
    // 0.999 of 199 steps is 198.801
    close(compared.kl_p999, all[198] + 0.801 * (all[199] - all[198]));
    let difference = compared.nll_difference.unwrap();
    let direct = found.nll - summarize(&of_first, &[]).nll;
    close(difference.mean, direct);
    assert!(difference.low < direct && direct < difference.high);
}

#[test]
fn a_model_with_itself_differs_by_nothing() {
    let mut model = Bigrams::new(wave(0.37));
    let windows = windows(0..4, 20);
    let (first, hidden) = score_reference(&mut model, &windows, &mut || {}).unwrap();
    let again = score_windows(&mut model, &windows, Some(&hidden), &mut || {});
    let compared = summarize(&again.unwrap(), &first).comparison.unwrap();
    assert!(compared.kl.abs() < 1e-9 && compared.kl_p999.abs() < 1e-6);
    assert_eq!(compared.top1_agreement, 1.0);
    let difference = compared.nll_difference.unwrap();
    assert_eq!((difference.mean, difference.noise_floor()), (0.0, 0.0));
}

#[test]
fn a_likelihood_that_is_not_finite_is_an_error() {
    let mut broken = Bigrams::chain();
    broken.broken = Some(5);
    let windows = vec![vec![1, 2, 3], vec![4, 5, 6]];
    let error = score_windows(&mut broken, &windows, None, &mut || {}).err();
    let said = error.unwrap().to_string();
    assert_eq!(said, "the likelihood of window 1 is not finite");
}

/// Context of `length` tokens and the model's own next `answer` tokens.
fn own_words(first: usize, length: usize, answer: usize) -> Passage {
    let mut ids: Vec<u32> = (0..length as u32)
        .map(|at| (first as u32 + at) % 11)
        .collect();
    for _ in 0..answer {
        let last = ids[ids.len() - 1] as usize;
        ids.push(after(last) as u32);
    }
    Passage { ids, answer }
}

#[test]
fn the_models_own_words_are_right_and_no_others() {
    let mut model = Bigrams::chain();
    // lengths mixed, so that batches are not in the order of the passages
    let right: Vec<Passage> = (0..9)
        .map(|index| own_words(index, 1 + index * 5 % 4, 1 + index % 3))
        .collect();
    let told = guess_last_words(&mut model, &right, &mut || {}).unwrap();
    assert_eq!(told, vec![true; 9]);

    // each wrong at one place of its word: the first, a middle or the last token
    let wrong: Vec<Passage> = (right.iter().enumerate())
        .map(|(index, passage)| {
            let mut passage = passage.clone();
            let place = passage.ids.len() - 1 - index % passage.answer;
            passage.ids[place] = (passage.ids[place] + 1) % VOCAB as u32;
            passage
        })
        .collect();
    let told = guess_last_words(&mut model, &wrong, &mut || {}).unwrap();
    assert_eq!(told, vec![false; 9]);

    let mixed: Vec<Passage> = (right.iter().zip(&wrong).enumerate())
        .map(|(index, (right, wrong))| if index % 4 == 1 { right } else { wrong }.clone())
        .collect();
    let told = guess_last_words(&mut model, &mixed, &mut || {}).unwrap();
    let want: Vec<bool> = (0..9).map(|index| index % 4 == 1).collect();
    assert_eq!(told, want);
}

/// A context that the model would not have written does not count: only the word does.
#[test]
fn the_context_is_given() {
    let mut model = Bigrams::chain();
    let passage = Passage {
        ids: vec![9, 9, 2, after(2) as u32],
        answer: 1,
    };
    let told = guess_last_words(&mut model, &[passage], &mut || {}).unwrap();
    assert_eq!(told, [true]);
}

#[test]
fn choices_are_weighed_as_by_plain_softmaxes() {
    let mut model = Bigrams::new(wave(0.37));
    let of = |ids: &[u32], answer| Passage {
        ids: ids.to_vec(),
        answer,
    };
    let mut passages = vec![of(&[4, 2, 7, 7, 1], 3), of(&[9, 9], 1)];
    // choices of one token after one text: the model sees them alike
    passages.extend((0..5).map(|choice| of(&[4, 2, choice], 1)));
    // and so does it where the text ends earlier
    passages.push(of(&[4, 2, 3], 2));
    let weighed = weigh_choices(&mut model, &passages, &mut || {}).unwrap();
    let want = |passage: &Passage| -> f64 {
        let first = passage.ids.len() - passage.answer;
        (first..passage.ids.len())
            .map(|at| model.probabilities(passage.ids[at - 1])[passage.ids[at] as usize].ln())
            .sum()
    };
    for (passage, weighed) in passages.iter().zip(&weighed) {
        let want = want(passage);
        assert!((weighed - want).abs() < TOLERANCE, "{weighed}, {want}");
    }
    let seen: usize = model.batches.iter().map(Vec::len).sum();
    assert_eq!(seen, 3);
    assert!(
        weigh_choices(&mut model, &[], &mut || {})
            .unwrap()
            .is_empty()
    );
}
