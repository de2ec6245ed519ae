//! Help names every flag; what cannot be understood is a usage error.

use crate::support::{gptq, run};

/// Every flag and argument by subcommand. `--threads` belongs to all of them.
const FLAGS: &[(&str, &[&str])] = &[
    (
        "push",
        &[
            "<PLACE>",
            "<TARGET>",
            "--branch",
            "--private",
            "--update",
            "--offline",
        ],
    ),
    (
        "matrix",
        &[
            "--tokenizer",
            "<MODEL>",
            "--out",
            "--preset",
            "--plan",
            "--dry-run",
            "--skip-impossible",
            "--only",
            "--assemble",
            "--shared-hessian",
            "--dataset",
            "--column",
            "--samples",
            "--seq-len",
            "--seed",
            "--window-bos",
            "--no-window-bos",
            "--evaluate",
            "--eval-seq-len",
            "--eval-windows",
            "--card",
            "--template",
            "--max-shard-size",
            "--device",
            "--gpu-memory",
            "--json",
            "--strict",
            "--offline",
        ],
    ),
    ("card", &["<PLACE>", "--card", "--template", "--commit"]),
    ("pull", &["<SOURCE>", "--out", "--offline"]),
    (
        "quantize",
        &[
            "--tokenizer",
            "<MODEL>",
            "--out",
            "--bits",
            "--group-size",
            "--desc-act",
            "--static-groups",
            "--act-group-aware",
            "--sym",
            "--asym",
            "--damp",
            "--method",
            "--no-scale-search",
            "--unsigned-scales",
            "--order",
            "--tokens",
            "--effort",
            "--input-mismatch",
            "--descent-passes",
            "--training-epochs",
            "--dataset",
            "--column",
            "--samples",
            "--seq-len",
            "--seed",
            "--temperature",
            "--window-bos",
            "--no-window-bos",
            "--format",
            "--max-shard-size",
            "--device",
            "--gpu-memory",
            "--resume",
            "--profile",
            "--max-degraded",
            "--check-windows",
            "--check-dataset",
            "--json",
            "--strict",
            "--offline",
        ],
    ),
    (
        "generate",
        &[
            "--tokenizer",
            "<MODEL>",
            "--prompt",
            "--prompt-template",
            "--chat",
            "--system",
            "--temperature",
            "--top-p",
            "--top-k",
            "--repetition-penalty",
            "--max-new-tokens",
            "--seed",
            "--stop",
            "--no-cache",
            "--device",
            "--json",
            "--strict",
            "--offline",
        ],
    ),
    (
        "chat",
        &[
            "--tokenizer",
            "<MODEL>",
            "--system",
            "--prompt-template",
            "--context",
            "--temperature",
            "--top-p",
            "--top-k",
            "--repetition-penalty",
            "--max-new-tokens",
            "--seed",
            "--stop",
            "--device",
            "--offline",
        ],
    ),
    ("doctor", &[]),
    ("import", &["<FILE>", "--out"]),
    (
        "synth",
        &[
            "--shape",
            "--out",
            "--layers",
            "--seed",
            "--dtype",
            "--calibration",
            "--samples",
            "--seq-len",
        ],
    ),
    (
        "eval",
        &[
            "--tokenizer",
            "<MODELS>...",
            "--dataset",
            "--column",
            "--seq-len",
            "--max-windows",
            "--window-bos",
            "--no-window-bos",
            "--lambada",
            "--lambada-examples",
            "--task",
            "--task-examples",
            "--state",
            "--group-tokens",
            "--speed",
            "--device",
            "--gpu-memory",
            "--json",
            "--strict",
            "--offline",
            "--speed-prompt",
            "--speed-tokens",
            "--speed-batch",
        ],
    ),
    (
        "verify",
        &[
            "<MODEL>",
            "--expect",
            "--write",
            "--ids",
            "--tolerance",
            "--device",
            "--strict",
            "--offline",
        ],
    ),
    ("inspect", &["<MODEL>", "--layers", "--json", "--offline"]),
    (
        "regress",
        &[
            "--baseline",
            "--update",
            "--checkpoint",
            "--junit",
            "--github",
            "--json",
            "--offline",
        ],
    ),
    ("report", &["<RUN>...", "--out", "--json"]),
];

#[test]
fn help_lists_the_subcommands() {
    let help = run(&mut gptq("--help")).done().stdout;
    for (subcommand, _) in FLAGS {
        assert!(help.contains(&format!("\n  {subcommand} ")), "{help}");
    }
}

#[test]
fn help_of_a_subcommand_names_its_flags_and_no_others() {
    for (subcommand, flags) in FLAGS {
        let help = run(gptq(subcommand).arg("--help")).done().stdout;
        let named = flags.iter().chain(&["--threads", "--help"]);
        for flag in named.clone() {
            assert!(help.contains(flag), "`{flag}` of {subcommand}: {help}");
        }
        // A definition is the first thing on its line; prose may name flags too.
        let defined = help.lines().filter_map(|line| {
            let words = line.trim_start().split([' ', ',', '=']);
            let mut words = words.filter(|word| !word.is_empty());
            let first = words.next()?;
            match first.len() == 2 && first.starts_with('-') {
                true => words.next(),
                false => first.starts_with("--").then_some(first),
            }
        });
        for flag in defined {
            assert!(
                named.clone().any(|known| *known == flag),
                "`{flag}` of {subcommand} is not in the list of this test"
            );
        }
    }
}

#[test]
fn the_version_is_data() {
    let run = run(&mut gptq("--version")).done();
    assert!(run.stdout.starts_with("gptq "), "{run:#?}");
    assert_eq!(run.stderr, "");
}

#[test]
fn what_cannot_be_understood_is_a_usage_error() {
    let wrong: &[(&[&str], &str)] = &[
        (&["quantise"], "quantise"),
        (&["quantize"], "<MODEL>"),
        (&["quantize", "m"], "--out"),
        (&["quantize", "m", "-o", "o", "--fast"], "--fast"),
        (
            &["quantize", "m", "-o", "o", "--bits", "5"],
            "bits `5` is not one of 2, 3, 4, 8",
        ),
        (
            &["quantize", "m", "-o", "o", "--group-size", "100"],
            "group size `100`",
        ),
        (
            &["quantize", "m", "-o", "o", "--static-groups"],
            "--desc-act",
        ),
        // --static-groups was once silently ignored here.
        (
            &[
                "quantize",
                "m",
                "-o",
                "o",
                "--static-groups",
                "--act-group-aware",
            ],
            "--act-group-aware",
        ),
        (
            &[
                "quantize",
                "m",
                "-o",
                "o",
                "--desc-act",
                "--act-group-aware",
            ],
            "--act-group-aware",
        ),
        (&["quantize", "m", "-o", "o", "--method", "awq"], "awq"),
        (&["quantize", "m", "-o", "o", "--threads", "0"], "--threads"),
        (
            &["synth", "-o", "o", "--shape", "llama-3"],
            "shape `llama-3` is not one of `llama-2-7b`, `llama-2-7b-32k`, `llama-2-70b`, `llama-3-8b`, `gemma-3-27b`, `tiny`",
        ),
        (
            &["synth", "-o", "o", "--shape", "tiny", "--layers", "0"],
            "--layers",
        ),
        (
            &["synth", "-o", "o", "--shape", "tiny", "--samples", "4"],
            "--calibration",
        ),
        (&["regress"], "--baseline"),
        (
            &[
                "regress",
                "--baseline",
                "b",
                "--update",
                "--checkpoint",
                "c",
            ],
            "--update",
        ),
        (
            &["regress", "--baseline", "b", "--json", "--github"],
            "--github",
        ),
        (&["eval"], "<MODELS>..."),
        (&["report", "-o", "o"], "<RUN>..."),
        (&["report", "r"], "--out"),
        (
            &["eval", "m", "--window-bos", "--no-window-bos"],
            "--no-window-bos",
        ),
        (&["eval", "m", "--lambada-examples", "5"], "--lambada"),
        (&["eval", "m", "--task-examples", "5"], "--task"),
        (&["eval", "m", "--task", "arc.jsonl"], "--task"),
        (&["eval", "m", "--group-tokens", "0"], "--group-tokens"),
        (&["verify", "m", "--ids", "1"], "--write"),
        (&["verify", "m", "--tolerance", "1"], "--expect"),
        (&["verify", "m", "--write", "f"], "--ids"),
        (
            &["verify", "m", "--write", "f", "--expect", "g"],
            "--expect",
        ),
    ];
    for (args, named) in wrong {
        let run = run(gptq(args[0]).args(&args[1..])).ended_with(2);
        let errors = run
            .stderr
            .lines()
            .filter(|line| line.starts_with("error: "));
        assert_eq!(errors.count(), 1, "{args:?}: {run:#?}");
        assert!(run.stderr.contains(named), "{args:?}: {run:#?}");
        assert_eq!(run.stdout, "", "{args:?}");
    }
}
