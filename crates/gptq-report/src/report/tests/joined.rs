//! Scores and runs become rows.

use gptq_types::{BranchEvaluation, BranchRecord, CalibrationRequest, Permutation, Reading};

use super::super::ReportError;
use super::*;

#[test]
fn scores_find_their_runs_by_path_and_by_name() {
    let report = two_branches();
    let names: Vec<&str> = report.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["tiny", "main", "fine"]);
    assert!(report.rows[0].is_reference && !report.rows[1].is_reference);
    assert_eq!(report.texts[0].reference.as_deref(), Some("tiny"));
    assert_eq!(report.rows[2].score(0).unwrap().perplexity, 22.0);
    assert_eq!(report.rows[2].scores[0].against.as_deref(), Some("tiny"));
    assert_eq!(report.date, "2023-11-14 22:13 UTC");

    // Elsewhere the folder had another path, or was a branch on the hub.
    let elsewhere = vec![vec![
        score("tiny", 20.0, None),
        score("/data/main", 25.0, Some(0.2)),
        score("owner/repo:fine", 22.0, Some(0.1)),
        score("owner/other", 30.0, Some(0.3)),
    ]];
    let runs = vec![found("out/main", run(128)), found("out/fine", run(32))];
    let report = self::report(runs, elsewhere);
    let names: Vec<&str> = report.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["tiny", "main", "fine", "other"]);
    assert_eq!(report.rows[1].score(0).unwrap().perplexity, 25.0);
    assert_eq!(report.rows[2].score(0).unwrap().perplexity, 22.0);
    assert!(report.rows[3].run.is_none());
    assert_eq!(report.rows[3].label, "4-bit g64");
}

#[test]
fn a_float_model_in_a_folder_of_the_same_name_is_no_branch() {
    let file = vec![
        score("models/main", 20.0, None),
        score("x/main", 25.0, Some(0.2)),
    ];
    let report = report(vec![found("out/main", run(128))], vec![file]);
    assert_eq!(report.rows.len(), 2);
    assert_eq!(report.rows[1].score(0).unwrap().perplexity, 25.0);
    // Both are `main`, so each goes by its path.
    assert_eq!(report.rows[0].name, "models/main");
    assert_eq!(report.rows[1].name, "out/main");
}

#[test]
fn what_cannot_be_joined_is_refused() {
    let of = |runs: &[&str], models: &[&str]| {
        let runs = runs.iter().map(|place| found(place, run(128))).collect();
        let scores = models.iter().map(|model| score(model, 25.0, Some(0.2)));
        let evaluations = match models.is_empty() {
            true => Vec::new(),
            false => vec![scores.collect()],
        };
        Report::of(Found { runs, evaluations }, &made()).unwrap_err()
    };
    assert!(matches!(of(&[], &[]), ReportError::Empty));
    let twice = of(&["a/main", "./a/main/"], &[]);
    assert_eq!(twice.to_string(), "the run `a/main` was given twice");
    let unclear = of(&["a/main", "b/main"], &["c/main"]);
    let text = "the score of `c/main` could be that of `a/main` or `b/main`";
    assert_eq!(unclear.to_string(), text);
    assert!(unclear.hint().is_some());
    let contested = of(&["a/main"], &["b/main", "c/main"]);
    assert!(matches!(contested, ReportError::Contested(..)));
}

#[test]
fn a_path_that_was_given_leaves_no_room_for_a_name() {
    let file = vec![
        score("out/main", 25.0, Some(0.2)),
        score("b/main", 26.0, Some(0.3)),
    ];
    let report = report(vec![found("out/main", run(128))], vec![file]);
    assert_eq!(report.rows.len(), 2);
    assert_eq!(report.rows[0].score(0).unwrap().perplexity, 25.0);
    assert_eq!(report.rows[1].name, "b/main");
}

/// `gptq eval` of two texts: a run is one row, each text has its reference and its table.
#[test]
fn a_file_may_tell_of_several_texts() {
    let of = |text: &str, record: EvalRecord| EvalRecord {
        text: text.into(),
        token_sha256: text.into(),
        protocol: format!("`{text}`, 8 windows of 64"),
        ..record
    };
    let file = vec![
        of("one", score("models/tiny", 20.0, None)),
        of("one", score("out/main", 25.0, Some(0.2))),
        of("two", score("models/tiny", 10.0, None)),
        of("two", score("out/main", 12.0, Some(0.3))),
    ];
    let report = report(vec![found("out/main", run(128))], vec![file]);
    let names: Vec<&str> = report.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["tiny", "main"]);
    assert_eq!(report.doubts, [""; 0]);
    for (text, perplexity) in [25.0, 12.0].into_iter().enumerate() {
        assert_eq!(report.texts[text].reference.as_deref(), Some("tiny"));
        assert_eq!(report.rows[1].score(text).unwrap().perplexity, perplexity);
        let against = report.rows[1].scores[text].against.as_deref();
        assert_eq!(against, Some("tiny"));
    }
    assert_eq!(report.markdown().matches("| perplexity |").count(), 2);
}

/// A branch of a matrix brings its scores along; a file of `gptq eval` adds what those lack.
#[test]
fn a_branch_and_a_file_tell_of_one_score() {
    let mut branch = found("repo:main", run(128));
    branch.name = "main".into();
    branch.record = Some(BranchRecord {
        permutation: Permutation {
            branch: "main".into(),
            spec: branch.run.spec.clone(),
            calibration: CalibrationRequest {
                dataset: "book.txt".into(),
                column: None,
                samples: 32,
                seq_len: 256,
                seed: 3,
                window_bos: None,
            },
            desc: "4-bit".into(),
        },
        weights_sha256: None,
        weight_bytes: 4_100_000_000,
        bits_per_weight: 4.156,
        readings: vec![
            Reading {
                reader: "one".into(),
                refusal: None,
                run: Some("one 1.0".into()),
            },
            Reading {
                reader: "two".into(),
                refusal: Some("4 bits".into()),
                run: None,
            },
        ],
        evaluation: Some(BranchEvaluation {
            reference: score("Tiny", 20.0, None),
            branch: score("main", 25.0, Some(0.2)),
        }),
    });
    let mut again = score("out/main", 25.0, Some(0.2));
    again.kl_p999 = Some(1.5);
    let file = vec![score("models/tiny", 20.0, None), again];
    let report = report(vec![branch], vec![file]);
    let names: Vec<&str> = report.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(
        names,
        ["tiny", "main"],
        "the reference has two names and is one"
    );
    assert_eq!(report.texts.len(), 1);
    assert_eq!(report.rows[1].score(0).unwrap().kl_p999, Some(1.5));
    assert!(report.doubts.is_empty(), "{:?}", report.doubts);
    let main = cells(&report.markdown(), "main").join(" | ");
    assert!(main.ends_with("4.1 GB | 4.16 | 1 of 2"), "{main}");
    assert!(report.markdown().contains("| yes | no: 4 bits |"));
}

#[test]
fn scores_that_disagree_are_told() {
    let runs = || vec![found("out/main", run(128))];
    let file = |perplexity| {
        vec![
            score("models/tiny", 20.0, None),
            score("out/main", perplexity, Some(0.2)),
        ]
    };
    let report = report(runs(), vec![file(25.0), file(25.5)]);
    assert_eq!(report.doubts.len(), 1);
    assert!(
        report.doubts[0].contains("25.0000 and 25.5000"),
        "{:?}",
        report.doubts
    );
    assert_eq!(report.rows[1].score(0).unwrap().perplexity, 25.0);
    assert!(report.html().unwrap().contains("was scored twice"));

    let mut other = file(25.0);
    other[0] = score("models/large", 18.0, None);
    let report = self::report(runs(), vec![file(25.0)[..1].to_vec(), other]);
    assert!(
        report.doubts[0].contains("compared with `large`"),
        "{:?}",
        report.doubts
    );
}

#[test]
fn a_second_text_has_a_table_of_its_own() {
    let mut other = vec![
        score("models/tiny", 10.0, None),
        score("out/main", 11.0, Some(0.05)),
    ];
    for record in &mut other {
        record.token_sha256 = "0fff".into();
        record.protocol = "c4".into();
    }
    let first = vec![
        score("models/tiny", 20.0, None),
        score("out/main", 25.0, Some(0.2)),
    ];
    let report = report(vec![found("out/main", run(128))], vec![first, other]);
    assert_eq!(report.texts.len(), 2);
    assert_eq!(report.rows.len(), 2);
    let second = after(&report.markdown(), "## Text 2");
    assert_eq!(cells(&second, "main")[1], "11.000 ± 0.110");
    let page = report.html().unwrap();
    assert!(
        page.contains("size-0-t") && page.contains("size-1-t"),
        "{page}"
    );
    for heading in ["<dt>Text 1</dt>", "<dt>Text 2</dt>"] {
        assert!(page.contains(heading), "{heading}: {page}");
    }
}
