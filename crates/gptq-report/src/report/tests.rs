//! Reports of made-up records: what they join, what they leave out, what they say.

use gptq_types::{
    Accuracy, BranchEvaluation, BranchRecord, CalibrationRecord, CalibrationRequest, ColumnOrder,
    EvalRecord, GroupSize, LayerLoss, LayerName, LayerRecord, Method, PairedDifference,
    Permutation, QuantSpec, Reading, RunRecord, Speed, Warning,
};

use super::{Found, FoundRun, Made, Report, ReportError};

const HOSTILE: &str = "<script>alert(\"x\")</script>'&";

fn made() -> Made {
    Made {
        tool: "gptq-rs:test".into(),
        seconds: 1_700_000_000,
    }
}

fn loss(error: f64, rtn_error: f64, signal: f64) -> LayerLoss {
    LayerLoss {
        error,
        rtn_error,
        signal,
        damp_used: 0.1,
        damp_escalations: 0,
        dead_channels: 0,
    }
}

fn layer(block: usize, path: &str, loss: Option<LayerLoss>) -> LayerRecord {
    LayerRecord {
        layer: LayerName(format!("model.layers.{block}.{path}")),
        in_features: 64,
        out_features: 64,
        tokens: 8192,
        token_share: 1.0,
        loss,
        solve_seconds: 0.0,
    }
}

/// Two blocks, two modules: errors of 0.5 and 0.25 of rounding, of 10 and 5 % of the output.
fn run(group: usize) -> RunRecord {
    let layers = (0..2).flat_map(|block| {
        [
            layer(block, "self_attn.q_proj", Some(loss(1.0, 2.0, 100.0))),
            layer(block, "mlp.down_proj", Some(loss(0.25, 1.0, 100.0))),
        ]
    });
    RunRecord {
        schema: 1,
        tool: "gptq-rs:test".into(),
        model: "owner/tiny".into(),
        spec: QuantSpec {
            group_size: GroupSize::Channels(group),
            ..QuantSpec::published()
        },
        calibration: Some(CalibrationRecord {
            dataset: "texts/book.txt".into(),
            rule: "drawn at random".into(),
            seed: 3,
            samples: 32,
            seq_len: 256,
            tokens: 8192,
            token_sha256: "ca11b".into(),
        }),
        device: "cpu".into(),
        gpu_memory_peak: None,
        layers: layers.collect(),
        warnings: Vec::new(),
        shared_hessian: false,
        seconds: 12.5,
        phases: Default::default(),
    }
}

fn found(place: &str, run: RunRecord) -> FoundRun {
    FoundRun {
        place: place.into(),
        name: place.rsplit('/').next().unwrap_or(place).into(),
        run,
        record: None,
    }
}

fn score(model: &str, perplexity: f64, kl: Option<f64>) -> EvalRecord {
    EvalRecord {
        model: model.into(),
        kind: if kl.is_some() {
            "4-bit g64 sym"
        } else {
            "unquantised"
        }
        .into(),
        protocol: "`held.txt`, 8 windows of 64".into(),
        token_sha256: "0e1d".into(),
        windows: 8,
        seq_len: 64,
        nll: perplexity.ln(),
        nll_stderr: 0.01,
        perplexity,
        kl,
        top1_agreement: kl.map(|_| 0.875),
        weight_bytes: if kl.is_some() {
            4_000_000_000
        } else {
            14_000_000_000
        },
        ..EvalRecord::default()
    }
}

fn report(runs: Vec<FoundRun>, evaluations: Vec<Vec<EvalRecord>>) -> Report {
    Report::of(Found { runs, evaluations }, &made()).unwrap()
}

fn two_branches() -> Report {
    report(
        vec![found("out/main", run(128)), found("out/fine", run(32))],
        vec![vec![
            score("models/tiny", 20.0, None),
            score("out/main", 25.0, Some(0.2)),
            score("./out/fine/", 22.0, Some(0.1)),
        ]],
    )
}

/// Cells of the row whose name is `name`, in a Markdown report.
fn cells(markdown: &str, name: &str) -> Vec<String> {
    let begin = format!("| `{name}` |");
    let line = markdown.lines().find(|line| line.starts_with(&begin));
    let line = line.unwrap_or_else(|| panic!("no row {name}: {markdown}"));
    let cells = line.trim_matches('|').split(" | ");
    cells.map(|cell| cell.trim().to_string()).collect()
}

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

#[test]
fn columns_without_a_value_are_left_out_and_gaps_are_dashes() {
    let mut report = two_branches();
    let markdown = report.markdown();
    for absent in [
        "99.9",
        "LAMBADA",
        "decode",
        "noise floor",
        "bits per weight",
        "loads in",
    ] {
        assert!(!markdown.contains(absent), "{absent}: {markdown}");
    }
    // The reference has no settings and no divergence.
    let is = cells(&markdown, "tiny");
    assert_eq!(is, ["`tiny`", "–", "–", "–", "–", "–", "–", "14.0 GB"]);
    let is = cells(&markdown, "main");
    assert_eq!(
        is,
        [
            "`main`", "4", "128", "no", "yes", "0.1", "book.txt", "4.0 GB"
        ]
    );
    let worth = after(&markdown, "| perplexity |");
    assert_eq!(
        cells(&worth, "tiny"),
        ["`tiny`", "20.000 ± 0.200", "–", "–"]
    );
    assert_eq!(
        cells(&worth, "main"),
        ["`main`", "25.000 ± 0.250", "0.2000", "87.5 %"]
    );

    let measured = &mut report.rows[2].scores[0].record;
    measured.kl_p999 = Some(1.25);
    measured.nll_difference = Some(PairedDifference {
        mean: 0.0953,
        low: 0.0903,
        high: 0.1003,
    });
    measured.accuracy = Some(Accuracy {
        task: "lambada".into(),
        examples: 500,
        share: 0.612,
        stderr: 0.0218,
    });
    measured.speed = Some(Speed {
        device: "cpu, 2 threads".into(),
        prompt_tokens: 128,
        prefill_tokens_per_second: 1234.4,
        batch: 1,
        decode_tokens_per_second: 61.26,
        peak_memory: 123_000_000,
    });
    let markdown = report.markdown();
    let worth = after(&markdown, "| perplexity |");
    let fine = cells(&worth, "fine");
    let want = [
        "`fine`",
        "22.000 ± 0.220",
        "+0.0953 \\[+0.0903, +0.1003\\]",
        "0.0050",
        "0.1000",
        "1.2500",
        "87.5 %",
        "61.2 ± 2.2 %",
        "1,234",
        "61.3",
        "123 MB",
    ];
    assert_eq!(fine, want);
    assert!(
        markdown.contains("decode, speed on cpu, 2 threads, tokens/s"),
        "{markdown}"
    );
    let dashes = cells(&worth, "main")
        .iter()
        .filter(|cell| *cell == "–")
        .count();
    // Difference, floor and tail; one task; speeds and memory.
    assert_eq!(dashes, 3 + 1 + 3, "{markdown}");
}

/// Sizes of 4 and 8 GB: a tenth of room makes 3.6 to 8.4, in steps of 1 from 3 to 9. Perplexities
/// of 20 to 25 in steps of 1. The field is 340 - 42 - 14 wide and 250 - 30 - 36 high.
#[test]
fn marks_are_where_size_and_perplexity_are() {
    let mut report = two_branches();
    report.rows[1].weight_bytes = Some(8_000_000_000);
    let page = report.html().unwrap();
    // 42 + 284 * 5/6 = 278.67; 214 - 184 * 5/5 = 30.
    assert!(page.contains(r#"cx="278.7" cy="30" r="3.6""#), "{page}");
    // The second mark is a square around 42 + 284/6 = 89.33; 214 - 184 * 2/5 = 140.4.
    let (left, top) = (89.333 - 0.9 * 3.6, 140.4 - 0.9 * 3.6);
    let corner = format!(r#"points="{left:.1},{top:.1} "#);
    assert!(page.contains(&corner), "{corner}: {page}");
    // The reference lies on the floor.
    assert!(page.contains(r#"class="rule" d="M42 214H326""#), "{page}");
    assert!(page.contains("reference 20.000</text>"), "{page}");
    assert!(page.contains("size, GB</text>"), "{page}");
}

/// The ratio is 0.5 in both blocks, on an axis from 0 to 0.6 in steps of 0.2 and a field from 138 up
/// to 22; the longer label, of ten characters, takes 10 * 0.6 * 11 + 20 of 270 - 34 units.
#[test]
fn layer_errors_are_drawn_by_block() {
    let page = two_branches().html().unwrap();
    assert!(page.contains("rtn-self_attn-q_proj-t"), "{page}");
    // 138 - 116 * 5/6 = 41.33.
    assert!(page.contains(r#"d="M34 41.3L184 41.3""#), "{page}");
    assert!(
        page.contains("At 1, plain rounding would have done as well."),
        "{page}"
    );
    // √(1/100) is 10 %, √(0.25/100) is 5 %.
    assert!(page.contains("10.000 % in the first block"), "{page}");
    assert!(page.contains("5.000 % in the first block"), "{page}");
    assert!(
        page.contains("No layer was damped further than asked."),
        "{page}"
    );
    assert!(!page.contains("damping-"), "{page}");
    // 2 of 4 over both blocks, 0.5 of 2.
    assert_eq!(
        cells(&after(&two_branches().markdown(), "## Layers"), "main"),
        ["`main`", "0.500", "0.250"]
    );
}

fn after(text: &str, heading: &str) -> String {
    let (_, rest) = text.split_once(heading).unwrap();
    rest.to_string()
}

/// Five lines leave no room for labels: a key names them, each by its mark.
#[test]
fn many_lines_get_a_key() {
    let page = two_branches().html().unwrap();
    assert!(!page.contains("class=\"keys\""), "{page}");
    let groups = [16, 32, 64, 128, 256];
    let runs = groups.map(|group| found(&format!("out/g{group}"), run(group)));
    let page = report(runs.to_vec(), Vec::new()).html().unwrap();
    // Two figures by depth.
    assert_eq!(page.matches("class=\"keys\"").count(), 2);
    for group in groups {
        let entry = format!("</svg>4-bit g{group} <small>g{group}</small>");
        assert_eq!(page.matches(&entry).count(), 2, "{page}");
    }
}

#[test]
fn divergence_is_drawn_at_the_middle_of_each_part() {
    let mut report = two_branches();
    report.rows[1].scores[0].record.kl_by_position = vec![0.4, 0.2];
    let page = report.html().unwrap();
    // A quarter and three quarters of 340 - 42 - 86 units; 0.4 is the top of its axis.
    assert!(page.contains(r#"d="M95 30L201 122""#), "{page}");
    let markdown = report.markdown();
    assert!(markdown.contains("| part 1/2 | part 2/2 |"), "{markdown}");
    let parts = cells(&after(&markdown, "by position in the window"), "main");
    assert_eq!(parts, ["`main`", "0.4000", "0.2000"]);
}

#[test]
fn what_degraded_is_named_and_nothing_is_said_plainly() {
    let quiet = two_branches();
    for text in [quiet.html().unwrap(), quiet.markdown()] {
        assert_eq!(
            text.matches("Nothing. 4 layers were measured.").count(),
            2,
            "{text}"
        );
    }
    let mut bad = run(128);
    bad.layers[1].loss = Some(loss(1.5, 1.0, 10.0));
    if let Some(loss) = &mut bad.layers[2].loss {
        (loss.damp_used, loss.damp_escalations, loss.dead_channels) = (0.4, 2, 5);
    }
    let warning = |module: &str| Warning {
        module: module.into(),
        text: "few tokens".into(),
    };
    bad.warnings = vec![warning("a"), warning("b")];
    let report = report(vec![found("out/main", bad)], Vec::new());
    let degraded = report.rows[0].degraded.as_ref().unwrap();
    assert!(!degraded.is_nothing());
    assert_eq!(degraded.worse[0].ratio, 1.5);
    assert_eq!(degraded.warnings.len(), 1);
    let markdown = report.markdown();
    for line in [
        "- 1 layer is worse than rounding to nearest\n  - `model.layers.0.mlp.down_proj` 1.500 times its error",
        "- 1 layer was damped further than asked\n  - `model.layers.1.self_attn.q_proj` 0.4 instead of 0.1, in 2 steps",
        "- 1 layer has input channels that no token used\n  - `model.layers.1.self_attn.q_proj` 5 of 64",
        "- Warning: few tokens\n  - `a`\n  - `b`",
    ] {
        assert!(markdown.contains(line), "{line}: {markdown}");
    }
    let page = report.html().unwrap();
    assert!(page.contains("damping-self_attn-q_proj"), "{page}");
    assert!(!page.contains("damping-mlp-down_proj"), "{page}");
    assert!(page.contains("The line is what was asked for."), "{page}");
    // 1.5 is worse than rounding: 138 - 116 * 1/1.5 = 60.67.
    assert!(page.contains(r#"class="rule" d="M34 60.7H"#), "{page}");
    assert!(page.contains("Above the line at 1"), "{page}");
    assert!(!page.contains("Nothing. "), "{page}");
}

#[test]
fn text_of_records_is_never_markup() {
    let mut hostile = run(128);
    hostile.model = HOSTILE.into();
    hostile.warnings = vec![Warning {
        module: HOSTILE.into(),
        text: HOSTILE.into(),
    }];
    hostile.layers[0].layer = LayerName(format!("model.layers.0.{HOSTILE}"));
    let mut scores = vec![
        score("models/tiny", 20.0, None),
        score(HOSTILE, 25.0, Some(0.2)),
    ];
    scores[0].protocol = HOSTILE.into();
    scores[1].protocol = HOSTILE.into();
    scores[1].kind = HOSTILE.into();
    let runs = vec![FoundRun {
        name: HOSTILE.into(),
        ..found(HOSTILE, hostile)
    }];
    let report = report(runs, vec![scores]);
    let page = report.html().unwrap();
    assert!(!page.contains("<script"), "{page}");
    assert!(page.contains("&lt;script&gt;"), "{page}");
    let markdown = report.markdown();
    // Inside of code, and there alone, it stands as it is.
    for line in markdown.lines().filter(|line| line.contains("<script")) {
        let is_code = line.contains("`<script>") || line.starts_with("gptq quantize");
        assert!(is_code, "{line}");
    }
}

#[test]
fn the_page_needs_nothing_beside_itself() {
    let page = two_branches().html().unwrap();
    for outside in [
        "http://", "https://", "src=", "@import", "url(", "<script", "<link",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.starts_with("<!doctype html>"));
    // Every figure that is not an ornament has a title and a description.
    let figures = page.matches("<svg viewBox").count();
    assert_eq!(figures, 1 + 2 + 2);
    assert_eq!(page.matches("<title id=").count(), figures);
    assert_eq!(page.matches("<desc id=").count(), figures);
}

#[test]
fn one_branch_without_scores_is_a_report() {
    let report = report(vec![found("out/main", run(128))], Vec::new());
    let (page, markdown) = (report.html().unwrap(), report.markdown());
    for text in [&page, &markdown] {
        assert!(text.contains("Nothing was scored"), "{text}");
        assert!(!text.contains("perplexity"), "{text}");
        assert!(
            text.contains("gptq quantize owner/tiny -o main --bits 4 --group-size 128"),
            "{text}"
        );
    }
    assert!(!page.contains("size-0"), "{page}");
}

#[test]
fn rounding_alone_has_no_errors_of_layers() {
    let mut rtn = run(128);
    rtn.spec.method = Method::Rtn;
    rtn.spec.scale_search = false;
    rtn.calibration = None;
    for layer in &mut rtn.layers {
        layer.loss = None;
    }
    let report = report(vec![found("out/rtn", rtn)], Vec::new());
    let (page, markdown) = (report.html().unwrap(), report.markdown());
    for text in [&page, &markdown] {
        assert!(text.contains("No errors of layers are known"), "{text}");
        assert!(
            text.contains("Nothing. Errors of layers were not measured"),
            "{text}"
        );
        assert!(text.contains("--method rtn"), "{text}");
        assert!(!text.contains("--dataset"), "{text}");
    }
    assert_eq!(report.rows[0].label, "4-bit g128 RTN");
}

#[test]
fn commands_hold_every_setting() {
    let mut run = run(32);
    run.spec.order = ColumnOrder::ActOrderStaticGroups;
    run.spec.sym = false;
    run.spec.scale_search = false;
    run.model = "my models/tiny".into();
    let report = report(vec![found("out/main", run)], Vec::new());
    let want = "gptq quantize 'my models/tiny' -o main --bits 4 --group-size 32 --damp 0.1 \
                --dataset texts/book.txt --samples 32 --seq-len 256 --seed 3 --device cpu \
                --desc-act --static-groups --asym --no-scale-search\n";
    let markdown = report.markdown();
    assert!(markdown.contains(want), "{markdown}");
    for fact in [
        "- Token hash: ca11b",
        "- Device: cpu",
        "- Time: 12 s",
        "8,192 in 32 windows",
    ] {
        assert!(markdown.contains(fact), "{fact}: {markdown}");
    }
}

#[test]
fn what_is_the_same_for_all_runs_is_said_once() {
    let mut other = run(32);
    other.device = "NVIDIA H200".into();
    let runs = vec![found("out/main", run(128)), found("out/fine", other)];
    let markdown = report(runs, Vec::new()).markdown();
    assert_eq!(markdown.matches("- Token hash: ca11b").count(), 1);
    assert_eq!(markdown.matches("- Device: cpu").count(), 1);
    assert_eq!(markdown.matches("- Device: NVIDIA H200").count(), 1);
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
                samples: 32,
                seq_len: 256,
                seed: 3,
            },
            desc: "4-bit".into(),
        },
        weight_bytes: 4_100_000_000,
        bits_per_weight: 4.156,
        readings: vec![
            Reading {
                reader: "one".into(),
                refusal: None,
            },
            Reading {
                reader: "two".into(),
                refusal: Some("4 bits".into()),
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
}
