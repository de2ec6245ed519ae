//! Contents of tables and lists, and omissions.

use gptq_types::{
    Accuracy, ColumnOrder, Divergence, Method, PairedDifference, Share, Speed, Warning,
};

use super::*;

const HOSTILE: &str = "<script>alert(\"x\")</script>'&";

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
        acc_norm: None,
    });
    measured.tasks = vec![Accuracy {
        task: "arc|easy".into(),
        examples: 570,
        share: 0.523,
        stderr: 0.0209,
        acc_norm: Some(Share {
            share: 0.43,
            stderr: 0.0208,
        }),
    }];
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
        "52.3 ± 2.1 %",
        "43.0 ± 2.1 %",
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
    // Difference, floor and tail; two tasks, one of them twice; speeds and memory.
    assert_eq!(dashes, 3 + 3 + 3, "{markdown}");
    assert!(
        markdown.contains("| arc\\|easy, acc | arc\\|easy, acc_norm |"),
        "{markdown}"
    );
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
    let mut warned = run(128);
    warned.warnings = bad.warnings[..1].to_vec();
    let only_warned = report(vec![found("out/main", warned)], Vec::new());
    let markdown = only_warned.markdown();
    assert!(
        markdown.contains("No layer. 4 layers were measured."),
        "{markdown}"
    );
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
                --desc-act --static-groups --asym --no-scale-search --effort fast\n";
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

/// Each of these changes the tokens, or what is measured, and was left out of the command.
#[test]
fn commands_hold_where_tokens_come_from_and_what_was_compared() {
    let mut run = run(32);
    let calibration = run.calibration.as_mut().unwrap();
    calibration.dataset = "wikitext2".into();
    calibration.file = Some("wiki.train.raw".into());
    calibration.column = Some("the text".into());
    calibration.temperature = Some(0.7);
    run.tokenizer = Some("tiny-tokenizer".into());
    let compared = |text: &str, held_out| Divergence {
        text: text.into(),
        held_out,
        windows: 8,
        tokens: 2048,
        seq_len: 256,
        kl: 0.125,
        ..Divergence::default()
    };
    run.divergence = vec![compared("wikitext2", true), compared("c4", false)];
    run.divergence[1].file = Some("c4.jsonl".into());
    let mut rounded = run.clone();
    rounded.calibration = None;
    rounded.divergence[1].window_bos = Some(false);
    run.calibration.as_mut().unwrap().window_bos = Some(true);
    let markdown = report(
        vec![found("out/main", run), found("out/rtn", rounded)],
        Vec::new(),
    )
    .markdown();
    let rest = "--tokenizer tiny-tokenizer --check-windows 8 --check-dataset c4=c4.jsonl";
    for want in [
        format!(
            "--dataset wikitext2=wiki.train.raw --column 'the text' --samples 32 --seq-len 256 \
             --seed 3 --temperature 0.7 {rest}"
        ),
        format!("--dataset wikitext2 --seq-len 256 {rest}"),
        " --window-bos".to_string(),
        " --no-window-bos".to_string(),
    ] {
        assert!(markdown.contains(&want), "{want}: {markdown}");
    }
    let fact = "- Against the float model: KL 0.1250 nats, perplexity 0.000 (float 0.000) on 8 windows \
                of wikitext2 that calibration did not see, 2048 tokens";
    assert!(markdown.contains(fact), "{markdown}");
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
