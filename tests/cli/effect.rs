//! Flags without effect in a combination: refused, or reported in a line.

use crate::support::{Family, TinyModel, gptq, refused, run, write_text};

/// All of these flags were once silently ignored. The first word is the command; MODEL, OUT and TEXT begin
/// paths.
#[test]
fn a_flag_without_effect_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let rtn = "quantize MODEL -o OUT --group-size 32 --method rtn --device cpu";
    let gptq_run = "quantize MODEL -o OUT --group-size 32 --samples 2 --seq-len 32 --dataset TEXT --device cpu";
    let said = "generate MODEL --prompt w1 --max-new-tokens 1 --device cpu";
    let eval = "eval MODEL --dataset TEXT --seq-len 32 --max-windows 1 --device cpu";
    let plan = "matrix MODEL --preset llama-2 --skip-impossible --dry-run --device cpu";
    let cases: [(&str, &str, &[&str]); 22] = [
        (rtn, "--dataset /nonexistent", &["--dataset"]),
        (rtn, "--samples 7 --seq-len 9", &["--samples", "--seq-len"]),
        (
            rtn,
            "--seed 7 --temperature 2",
            &["--seed", "--temperature"],
        ),
        (rtn, "--damp 0.7", &["--damp"]),
        (rtn, "--window-bos", &["--window-bos"]),
        (rtn, "--no-window-bos", &["--no-window-bos"]),
        (rtn, "--no-scale-search", &["--no-scale-search"]),
        (rtn, "--unsigned-scales", &["--unsigned-scales"]),
        (rtn, "--effort balanced", &["--effort"]),
        (rtn, "--input-mismatch 0.5", &["--input-mismatch"]),
        (rtn, "--max-degraded 1", &["--max-degraded"]),
        (rtn, "--gpu-memory 1GB", &["--gpu-memory"]),
        (gptq_run, "--temperature 2", &["--temperature"]),
        (gptq_run, "--gpu-memory 1GB", &["--gpu-memory"]),
        (said, "--top-k 5", &["--top-k"]),
        (said, "--top-p 0.5 --seed 3", &["--top-p", "--seed"]),
        (eval, "--gpu-memory 1GB", &["--gpu-memory"]),
        (
            "verify MODEL --write OUT --ids 1",
            "--tolerance 1",
            &["--tolerance"],
        ),
        (
            plan,
            "--evaluate none --eval-windows 3",
            &["--eval-windows"],
        ),
        (
            plan,
            "--evaluate none --eval-seq-len 64",
            &["--eval-seq-len"],
        ),
        (plan, "--only main", &["--only"]),
        (plan, "--gpu-memory 1GB", &["--gpu-memory"]),
    ];
    for (index, (command, flags, named)) in cases.into_iter().enumerate() {
        let out = folder.path().join(format!("out{index}"));
        let path = |word: &str| match word {
            "MODEL" => model.display().to_string(),
            "TEXT" => text.display().to_string(),
            "OUT" => out.display().to_string(),
            word => word.to_string(),
        };
        let line = format!("{command} {flags}");
        let mut words = line.split(' ').map(path);
        let run = run(gptq(&words.next().unwrap()).args(words)).done();
        for flag in named {
            let told = format!("warning: {flag} has no effect: ");
            assert!(run.stderr.contains(&told), "{line}: {run:#?}");
        }
        let told = run.stderr.matches("has no effect").count();
        assert_eq!(told, named.len(), "{line}: {run:#?}");
    }
}

/// `--device cuda:0` passed with `--method rtn` on a program without GPUs, and so did settings of the
/// environment that nobody could read.
#[test]
fn what_cannot_be_meant_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, place) = (folder.path().join("model"), folder.path());
    TinyModel::new(Family::Llama).write(&model);
    let rtn = || {
        let mut command = gptq("quantize");
        command.arg(&model).arg("-o").arg(place.join("out"));
        command.args(["--group-size", "32", "--method", "rtn"]);
        command
    };
    if !cfg!(feature = "cuda") {
        refused(rtn().args(["--device", "cuda"]), place, &["cuda:0"]);
    }
    for (name, value) in [
        ("SOURCE_DATE_EPOCH", "yesterday"),
        ("SOURCE_DATE_EPOCH", "-1"),
        ("RAYON_NUM_THREADS", "many"),
        ("HF_HUB_OFFLINE", "maybe"),
    ] {
        refused(rtn().env(name, value), place, &[name, value]);
    }
}
