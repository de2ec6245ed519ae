use std::collections::BTreeMap;

use gptq_types::{
    Figures, Inputs, LayerFigures, LayerLoss, LayerName, Overall, Tolerance, Tolerances,
};

use super::*;

const OVERALL: Overall = Overall {
    reference_nll: 1.4,
    nll: 1.5,
    perplexity: 4.4817,
    kl: 0.05,
    top1_agreement: 0.9,
};

fn loss(error: f64) -> LayerLoss {
    LayerLoss {
        error,
        rtn_error: 2.0 * error,
        signal: 100.0 * error,
        damp_used: 0.1,
        ..LayerLoss::default()
    }
}

fn tensors(qweight: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("qweight".to_string(), qweight.to_string())])
}

fn figures() -> Figures {
    let limit = |value| Tolerance {
        value,
        reason: String::new(),
    };
    let layer = |name: &str, error| LayerFigures {
        layer: LayerName(name.to_string()),
        loss: loss(error),
        content: format!("content of {name}"),
        tensors: tensors(name),
    };
    Figures {
        tool: "t".to_string(),
        processor: "one".to_string(),
        inputs: Inputs {
            model: BTreeMap::new(),
            calibration_tokens: String::new(),
            evaluation_tokens: String::new(),
        },
        overall: OVERALL,
        tolerances: Tolerances {
            layer_error: limit(0.01),
            file_error: limit(1e-4),
            reference_nll: limit(1e-4),
            nll: limit(0.02),
            kl: limit(0.02),
            top1_agreement: limit(0.004),
        },
        layers: vec![layer("a", 2.0), layer("b", 4.0), layer("c", 8.0)],
    }
}

/// The outcome that the figures were taken from.
fn outcome() -> Outcome {
    let layers = figures().layers.into_iter();
    Outcome {
        processor: "one".to_string(),
        layers: layers
            .map(|layer| LayerOutcome {
                layer: layer.layer,
                file_error: layer.loss.error,
                recorded: Some(layer.loss),
                content: layer.content,
                tensors: layer.tensors,
            })
            .collect(),
        overall: Some(OVERALL),
        unfaithful: None,
    }
}

/// Another solution of linear `index`: other codes, with the error that the solver reports.
fn solved_otherwise(found: &mut Outcome, index: usize, error: f64) {
    let layer = &mut found.layers[index];
    layer.file_error = error;
    layer.recorded = Some(loss(error));
    layer.content = "other".to_string();
    layer.tensors = tensors("other");
}

fn verdict(change: impl FnOnce(&mut Outcome)) -> Verdict {
    let mut found = outcome();
    change(&mut found);
    judge("base.json", "a run", &figures(), &found)
}

/// Subject and measure of everything that got worse.
fn worse(verdict: &Verdict) -> Vec<(&str, Measure)> {
    let of = |case: &Case| {
        let found = case.findings.iter().filter(|finding| finding.worse);
        found.map(|f| f.measure).collect::<Vec<_>>()
    };
    let cases = verdict.cases.iter();
    cases
        .flat_map(|case| of(case).into_iter().map(|m| (case.subject.as_str(), m)))
        .collect()
}

#[test]
fn the_same_is_as_good() {
    let verdict = verdict(|_| {});
    assert!(!verdict.is_red());
    assert_eq!(verdict.count(Standing::Within), 3 + 4);
    assert_eq!(
        regression(&verdict),
        "a run against base.json: as good\n\nall 3 linears have the baseline's bytes\n\
         perplexity 4.4817 (baseline 4.4817, float model 4.0552), KL 0.050000 nats (0.050000), \
         same top token 90.00 % (90.00 %)\n"
    );
    assert_eq!(annotations(&verdict), "");
}

/// Its inputs may be those behind a damaged linear.
#[test]
fn the_same_bytes_pass_whatever_was_measured() {
    let verdict = verdict(|found| found.layers[2].file_error = 80.0);
    assert!(!verdict.is_red());
}

#[test]
fn other_bytes_are_judged_by_their_error() {
    let within = verdict(|found| solved_otherwise(found, 1, 4.039));
    assert!(!within.is_red());
    let text = regression(&within);
    assert!(text.contains("1 of 3 linears have other bytes"), "{text}");
    assert!(text.contains("same kind of processor"), "{text}");
    assert!(text.contains("the first is b"), "{text}");

    let beyond = verdict(|found| solved_otherwise(found, 1, 4.044));
    assert_eq!(worse(&beyond), [("b", Measure::OutputError)]);
    let text = regression(&beyond);
    let row = "| b | output error | 4.0000 | 4.0440 | +1.10 % | 1 % |";
    assert!(text.contains(row), "{text}");

    let undefined = verdict(|found| solved_otherwise(found, 1, f64::NAN));
    assert_eq!(worse(&undefined)[0].0, "b");
}

#[test]
fn another_kind_of_processor_is_said() {
    let verdict = verdict(|found| {
        solved_otherwise(found, 0, 2.001);
        found.processor = "two".to_string();
    });
    let text = regression(&verdict);
    assert!(text.contains("made on one, this is two"), "{text}");
}

#[test]
fn what_got_better_is_green_and_told() {
    let verdict = verdict(|found| solved_otherwise(found, 0, 1.9));
    assert!(!verdict.is_red());
    assert_eq!(verdict.count(Standing::Better), 1);
    let text = regression(&verdict);
    assert!(text.contains("--update"), "{text}");
    assert!(text.contains("| a | output error | 2.0000 | 1.9000 | -5.00 % | 1 % |"));
    let notice = annotations(&verdict);
    assert!(notice.starts_with("::notice file=base.json,title=gptq regress%3A a::"));
}

/// A packer and a reader that agree on a wrong order of codes.
#[test]
fn another_layout_of_the_same_codes_is_worse() {
    let verdict = verdict(|found| found.layers[1].tensors = tensors("swapped"));
    assert_eq!(worse(&verdict), [("b", Measure::Layout)]);
}

/// The error of `b` is inside its tolerance, but not the one that the solver reported. `c` has
/// other bytes too, and inputs that its solver never saw.
#[test]
fn files_that_do_not_hold_what_was_solved_are_named_first() {
    let verdict = verdict(|found| {
        solved_otherwise(found, 1, 4.0);
        found.layers[1].file_error = 4.001;
        solved_otherwise(found, 2, 8.0);
        found.layers[2].file_error = 8.01;
    });
    assert_eq!(worse(&verdict), [("b", Measure::FileError)]);
}

#[test]
fn damping_and_dead_channels_have_no_tolerance() {
    let verdict = verdict(|found| {
        let damped = found.layers[0].recorded.as_mut().unwrap();
        damped.damp_used = 0.11;
        let dead = found.layers[1].recorded.as_mut().unwrap();
        dead.dead_channels = 1;
    });
    let expected = [("a", Measure::Damping), ("b", Measure::DeadChannels)];
    assert_eq!(worse(&verdict), expected);
    let text = regression(&verdict);
    assert!(
        text.contains("| a | damping | 0.1 | 0.11 |  | none |"),
        "{text}"
    );
}

#[test]
fn the_whole_model_is_judged_too() {
    let changed = |change: fn(&mut Overall)| {
        let verdict = verdict(|found| change(found.overall.as_mut().unwrap()));
        let found = worse(&verdict);
        found
            .into_iter()
            .map(|(_, measure)| measure)
            .collect::<Vec<_>>()
    };
    assert_eq!(changed(|now| now.nll += 0.021), [Measure::Nll]);
    assert_eq!(changed(|now| now.nll += 0.019), []);
    assert_eq!(changed(|now| now.nll -= 0.1), []);
    assert_eq!(changed(|now| now.kl *= 1.03), [Measure::Kl]);
    assert_eq!(changed(|now| now.kl = f64::NAN), [Measure::Kl]);
    let agreement = [Measure::Top1Agreement];
    assert_eq!(changed(|now| now.top1_agreement -= 0.005), agreement);
    assert_eq!(changed(|now| now.top1_agreement += 0.005), []);
    // The float model has the same weights: a better score of it is a broken measure.
    assert_eq!(
        changed(|now| now.reference_nll -= 0.001),
        [Measure::ReferenceNll]
    );
}

#[test]
fn a_linear_that_is_missing_or_new_is_worse() {
    let verdict = verdict(|found| found.layers[0].layer = LayerName("d".to_string()));
    let expected = [("a", Measure::Presence), ("d", Measure::Presence)];
    assert_eq!(worse(&verdict), expected);
}

#[test]
fn a_run_that_stopped_names_the_linear_and_skips_the_rest() {
    let verdict = verdict(|found| {
        found.layers.clear();
        found.overall = None;
        found.unfaithful = Some((
            LayerName("b".to_string()),
            "code is 3 & not <4>".to_string(),
        ));
    });
    assert_eq!(worse(&verdict), [("b", Measure::Packing)]);
    assert_eq!(verdict.count(Standing::NotRun), 2 + 4);
    assert_eq!(
        annotations(&verdict),
        "::error file=base.json,title=gptq regress%3A b::code is 3 & not <4>\n"
    );
    let counts = "tests=\"7\" failures=\"1\" errors=\"0\" skipped=\"6\" time=\"1.500\"";
    let skipped = |name: &str| {
        format!(
            "    <testcase classname=\"base.json\" name=\"{name}\">\n      <skipped message=\"the \
             run stopped before it\"/>\n    </testcase>\n"
        )
    };
    let expected = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"gptq regress\" {counts}>\n  \
         <testsuite name=\"base.json\" {counts}>\n{}    <testcase classname=\"base.json\" \
         name=\"b\">\n      <failure type=\"packing\" message=\"code is 3 &amp; not \
         &lt;4&gt;\">code is 3 &amp; not &lt;4&gt;</failure>\n    </testcase>\n{}{}{}{}{}  \
         </testsuite>\n</testsuites>\n",
        skipped("a"),
        skipped("c"),
        skipped("float model&apos;s log-likelihood, nats"),
        skipped("log-likelihood, nats"),
        skipped("KL divergence, nats"),
        skipped("share of equal top tokens"),
    );
    assert_eq!(junit(&verdict, 1.5), expected);
}

#[test]
fn a_tolerance_follows_the_noise() {
    let scored = gptq_types::EvalRecord {
        windows: 10,
        seq_len: 101,
        top1_agreement: Some(0.9),
        nll_stderr: 0.3,
        nll_difference: Some(gptq_types::PairedDifference {
            mean: 0.1,
            low: 0.08,
            high: 0.12,
        }),
        ..gptq_types::EvalRecord::default()
    };
    let first = outcome();
    let mut noisy = outcome();
    let quiet = tolerances(&first, &noisy, &scored);
    assert_eq!((quiet.layer_error.value, quiet.kl.value), (0.01, 0.02));
    assert_eq!(quiet.nll.value, 0.02);
    // sqrt(0.9 * 0.1 / 1000) = 0.00949
    assert_eq!(quiet.top1_agreement.value, 0.0095);

    noisy.layers[1].file_error = 4.02;
    noisy.overall.as_mut().unwrap().kl = 0.051;
    let wide = tolerances(&first, &noisy, &scored);
    assert_eq!((wide.layer_error.value, wide.kl.value), (0.02, 0.08));
    assert!(
        wide.layer_error.reason.contains("(0.5 %)"),
        "{}",
        wide.layer_error.reason
    );
}
