//! The gate of accuracy: green on what it was made of, red with the linear named, and deaf to
//! figures of another model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use half::f16;
use serde_json::{Value, json};

use crate::support::{
    Family, TinyModel, edit_json, edit_tensor, fixture, gptq, refused, run, write_text,
};

/// A linear that is neither the first nor the last.
const LAYER: &str = "model.layers.2.self_attn.v_proj";

/// `regress`, as if nowhere near GitHub.
fn regress(baseline: &Path) -> Command {
    let mut command = gptq("regress");
    command.arg("--baseline").arg(baseline);
    command.env_remove("GITHUB_ACTIONS");
    command
}

/// The committed baseline, which names its model and its texts among the fixtures.
fn committed() -> PathBuf {
    fixture("../regression/verne.json")
}

/// An edited copy of the committed baseline, in another folder.
fn committed_with(folder: &Path, edit: impl FnOnce(&mut Value)) -> PathBuf {
    let path = folder.join("changed.json");
    fs::copy(committed(), &path).unwrap();
    let home = fixture("../regression");
    edit_json(&path, |baseline| {
        let recipe = &mut baseline["recipe"];
        let texts = ["/model", "/calibration/dataset", "/evaluation/dataset"];
        for pointer in texts {
            let place = recipe.pointer_mut(pointer).unwrap();
            *place = json!(home.join(place.as_str().unwrap()));
        }
        edit(baseline);
    });
    path
}

/// The output of `quantize` for the committed recipe.
fn packed(folder: &Path) -> PathBuf {
    let recipe: Value = serde_json::from_slice(&fs::read(committed()).unwrap()).unwrap();
    let recipe = &recipe["recipe"];
    assert_eq!(recipe["spec"]["bits"], 4);
    let home = fixture("../regression");
    let (calibration, out) = (&recipe["calibration"], folder.join("packed"));
    let mut command = gptq("quantize");
    command
        .args(["--unsigned-scales", "--effort", "fast"])
        .arg(home.join(recipe["model"].as_str().unwrap()))
        .arg("--out")
        .arg(&out)
        .arg("--dataset")
        .arg(home.join(calibration["dataset"].as_str().unwrap()));
    for (flag, value) in [
        ("--samples", &calibration["samples"]),
        ("--seq-len", &calibration["seq_len"]),
        ("--group-size", &recipe["spec"]["group_size"]),
    ] {
        command.args([flag, &value.to_string()]);
    }
    run(&mut command).done();
    out
}

/// Linears with a finding for the worse, first to last.
fn worse(verdict: &Value) -> Vec<&str> {
    let cases = verdict["cases"].as_array().unwrap().iter();
    cases
        .filter(|case| case["standing"] == "worse")
        .map(|case| case["subject"].as_str().unwrap())
        .filter(|subject| subject.starts_with("model.layers."))
        .collect()
}

#[test]
fn the_committed_baseline_is_green() {
    let baseline = committed();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("junit.xml");
    let told = run(regress(&baseline).arg("--junit").arg(&file)).done();
    assert!(told.stdout.contains("as good"), "{told:#?}");
    assert!(!told.stdout.contains("::"), "{told:#?}");
    let xml = fs::read_to_string(file).unwrap();
    assert!(xml.contains("tests=\"39\" failures=\"0\""), "{xml}");
    assert!(xml.contains(&format!("name=\"{LAYER}\"")), "{xml}");
}

/// Runs the gate on a folder, which must be worse in `LAYER`; the verdict.
#[track_caller]
fn judged_worse(baseline: &Path, folder: &Path) -> Value {
    let mut command = regress(baseline);
    command.arg("--checkpoint").arg(folder);
    let told = run(command.arg("--json")).ended_with(1);
    let verdict: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(worse(&verdict)[0], LAYER, "{verdict:#}");
    verdict
}

#[test]
fn scales_of_one_linear_off_by_2_percent_are_named() {
    let baseline = committed();
    let folder = tempfile::tempdir().unwrap();
    let packed = packed(folder.path());
    run(regress(&baseline).arg("--checkpoint").arg(&packed)).done();

    edit_tensor(&packed, &format!("{LAYER}.scales"), |bytes| {
        for scale in bytes.chunks_exact_mut(2) {
            let value = f16::from_le_bytes([scale[0], scale[1]]).to_f32() * 1.02;
            scale.copy_from_slice(&f16::from_f32(value).to_le_bytes());
        }
    });
    judged_worse(&baseline, &packed);
    // The baseline alone is enough: what the solver reported need not be there.
    fs::remove_file(packed.join("gptq_run.json")).unwrap();
    let verdict = judged_worse(&baseline, &packed);
    assert!(verdict.to_string().contains("output_error"), "{verdict:#}");
}

#[test]
fn two_codes_that_changed_places_are_named() {
    let baseline = committed();
    let folder = tempfile::tempdir().unwrap();
    let packed = packed(folder.path());
    // One pair in the whole linear, and next to each other on the grid: no larger than rounding.
    edit_tensor(&packed, &format!("{LAYER}.qweight"), |bytes| {
        let differ_by_one = |byte: &&mut u8| (**byte >> 4).abs_diff(**byte & 15) == 1;
        let byte = bytes.iter_mut().find(differ_by_one).unwrap();
        *byte = byte.rotate_left(4);
    });
    let verdict = judged_worse(&baseline, &packed);
    assert!(verdict.to_string().contains("file_error"), "{verdict:#}");
}

#[test]
fn another_damping_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let changed = committed_with(folder.path(), |baseline| {
        baseline["recipe"]["spec"]["damp_percent"] = json!(0.2);
    });
    let file = folder.path().join("junit.xml");
    let mut command = regress(&changed);
    command.arg("--junit").arg(&file).arg("--github");
    let told = run(&mut command).ended_with(1);
    let row = format!("| {LAYER} | damping | 0.1 | 0.2 |");
    assert!(told.stdout.contains(&row), "{told:#?}");
    // Not the setting alone: what it did to the output, too.
    assert!(told.stdout.contains("| output error |"), "{told:#?}");
    let title = format!(",title=gptq regress%3A {LAYER}::");
    let annotation = told.stdout.lines().find(|line| line.contains(&title));
    assert!(annotation.unwrap().contains("damping is 0.2, was 0.1"));
    let xml = fs::read_to_string(file).unwrap();
    assert!(xml.contains("damping is 0.2, was 0.1"), "{xml}");
}

/// An untrained model, a text, and a baseline that the gate itself made of a recipe.
struct Made {
    folder: tempfile::TempDir,
    baseline: PathBuf,
}

impl Made {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let shapes = TinyModel::new(Family::Llama);
        shapes.write(&at("model"));
        write_text(&at("text.txt"), shapes.vocab, 2_000);
        let recipe = json!({"schema": 1, "recipe": {
            "model": "model",
            "spec": {
                "bits": 4, "group_size": 32, "sym": true, "order": "act_order",
                "damp_percent": 0.1, "method": "gptq", "format": "gptq", "scale_search": true,
            },
            "calibration": {"dataset": "text.txt", "samples": 8, "seq_len": 64, "seed": 0},
            "evaluation": {"dataset": "text.txt", "seq_len": 64, "max_windows": 8},
        }});
        fs::write(at("baseline.json"), recipe.to_string()).unwrap();
        let baseline = at("baseline.json");
        Made { folder, baseline }
    }

    /// A baseline with additional settings.
    fn with(settings: &Value) -> Self {
        let made = Made::new();
        edit_json(&made.baseline, |baseline| {
            for (name, value) in settings.as_object().unwrap() {
                baseline["recipe"]["spec"][name] = value.clone();
            }
        });
        made
    }

    fn updated() -> Self {
        let made = Made::new();
        run(regress(&made.baseline).arg("--update")).done();
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

#[test]
fn a_recipe_becomes_a_baseline_that_stays() {
    let made = Made::new();
    let mut command = regress(&made.baseline);
    refused(&mut command, made.folder.path(), &["no figures"]);
    run(regress(&made.baseline).arg("--update")).done();
    let told = run(&mut regress(&made.baseline)).done();
    let same = "all 14 linears have the baseline's bytes";
    assert!(told.stdout.contains(same), "{told:#?}");

    let before = fs::read(&made.baseline).unwrap();
    run(regress(&made.baseline).arg("--update")).done();
    assert_eq!(before, fs::read(&made.baseline).unwrap());
    let parsed: Value = serde_json::from_slice(&before).unwrap();
    let reason = &parsed["figures"]["tolerances"]["layer_error"]["reason"];
    assert!(reason.as_str().unwrap().contains("opposite order"));
}

#[test]
fn figures_of_other_inputs_are_not_compared() {
    let made = Made::updated();
    let refuse = |names: &[&str]| {
        refused(&mut regress(&made.baseline), made.folder.path(), names);
    };
    let files = ["text.txt", "model/model.safetensors", "model/config.json"];
    let whole = files.map(|name| (made.path(name), fs::read(made.path(name)).unwrap()));
    let restore = || {
        for (path, bytes) in &whole {
            fs::write(path, bytes).unwrap();
        }
    };
    let text = String::from_utf8(whole[0].1.clone()).unwrap();
    fs::write(&whole[0].0, text.replacen("w1", "w2", 40)).unwrap();
    refuse(&["baseline.json", "evaluation tokens"]);
    restore();
    edit_tensor(&made.path("model"), "model.norm.weight", |bytes| {
        bytes[0] ^= 1
    });
    refuse(&["baseline.json", "`model.safetensors` of the model"]);
    restore();
    edit_json(&whole[2].0, |config| config["rms_norm_eps"] = json!(1e-6));
    refuse(&["baseline.json", "`config.json` of the model"]);
    restore();
    let mut inside = regress(&made.baseline);
    inside.env("GITHUB_ACTIONS", "true");
    run(&mut inside).done();

    fs::remove_file(made.path("text.txt")).unwrap();
    let mut inside = regress(&made.baseline);
    let told = run(inside.env("GITHUB_ACTIONS", "true")).ended_with(2);
    assert!(told.stdout.starts_with("::error file="), "{told:#?}");
    assert_eq!(told.stdout.lines().count(), 1, "{told:#?}");
}

#[test]
fn files_that_cannot_be_judged_are_refused() {
    let made = Made::updated();
    let refuse = |command: &mut Command, names: &[&str]| {
        refused(command, made.folder.path(), names);
    };
    refuse(&mut regress(&made.path("absent.json")), &["absent.json"]);
    let mut lost = regress(&made.baseline);
    let nowhere = made.path("nowhere/junit.xml");
    refuse(lost.arg("--junit").arg(nowhere), &["no such folder"]);

    let mut float = regress(&made.baseline);
    float.arg("--checkpoint").arg(made.path("model"));
    refuse(&mut float, &["no packed linears"]);

    let mut other = gptq("quantize");
    other
        .arg(made.path("model"))
        .arg("--out")
        .arg(made.path("other"));
    run(other.args(["--method", "rtn", "--group-size", "32", "--bits", "8"])).done();
    let mut command = regress(&made.baseline);
    command.arg("--checkpoint").arg(made.path("other"));
    refuse(&mut command, &["bits 8, the recipe 4"]);

    let change = |edit: fn(&mut Value), names: &[&str]| {
        let path = made.path("changed.json");
        fs::copy(&made.baseline, &path).unwrap();
        edit_json(&path, edit);
        refuse(&mut regress(&path), names);
    };
    change(|b| b["schema"] = json!(2), &["schema 2", "knows 1"]);
    change(
        |b| b["recipe"]["spec"]["damp_percent"] = json!(1.5),
        &["changed.json", "1.5"],
    );
    change(
        |b| {
            b["recipe"]["spec"]["method"] = json!("rtn");
            b["recipe"]["spec"]["scale_search"] = json!(false);
            b["recipe"]["spec"]["order"] = json!("natural");
        },
        &["changed.json", "rtn"],
    );
    change(
        |b| b["recipe"]["evaluation"]["max_windows"] = json!(1),
        &["1 window"],
    );
    change(
        |b| b["recipe"]["calibration"]["dataset"] = json!("c5"),
        &["c5"],
    );
}

/// A folder whose linears were all rounded to nearest: every one with a Hessian behind it is worse,
/// and the first that is named is the first of the model.
#[test]
fn rounding_to_nearest_in_place_of_the_solver_is_worse() {
    let made = Made::updated();
    let rounded = made.path("rounded");
    let mut rtn = gptq("quantize");
    rtn.arg(made.path("model")).arg("--out").arg(&rounded);
    run(rtn.args(["--method", "rtn", "--group-size", "32"])).done();
    let mut command = regress(&made.baseline);
    command.arg("--checkpoint").arg(&rounded);
    let told = run(&mut command).ended_with(1);
    let first = "| model.layers.0.self_attn.q_proj | output error |";
    assert!(told.stdout.contains(first), "{told:#?}");
    assert!(
        told.stderr.contains("other calibration tokens"),
        "{told:#?}"
    );
}

/// The gate measures files against the float model's outputs if the solver did: both errors agree.
#[test]
fn a_recipe_that_aims_at_the_float_model_is_measured_there() {
    let made = Made::with(&json!({"full_range": true, "input_mismatch": 0.5}));
    run(regress(&made.baseline).arg("--update")).done();
    let told = run(&mut regress(&made.baseline)).done();
    assert!(told.stdout.contains("as good"), "{told:#?}");
    let plain = Made::with(&json!({"full_range": true}));
    run(regress(&plain.baseline).arg("--update")).done();
    let error = |made: &Made| {
        let text = fs::read_to_string(&made.baseline).unwrap();
        let baseline: Value = serde_json::from_str(&text).unwrap();
        let layer = &baseline["figures"]["layers"][7];
        layer["loss"]["error"].as_f64().unwrap()
    };
    // The layer is in the second block: its error includes that of rounding the first.
    assert!(error(&made) > error(&plain));
}

/// The record has the error of each linear before its block was trained; the baseline has that of the files.
#[test]
fn a_recipe_that_trains_is_measured_from_its_files() {
    let made =
        Made::with(&json!({"full_range": true, "input_mismatch": 0.5, "training_epochs": 2}));
    run(regress(&made.baseline).arg("--update")).done();
    let told = run(&mut regress(&made.baseline)).done();
    assert!(told.stdout.contains("as good"), "{told:#?}");
}

/// Permuted channels are measured as those of the float model; without a record of the permutation there
/// is no verdict.
#[test]
fn a_folded_checkpoint_is_measured_by_its_record() {
    let made = Made::with(&json!({"order": "folded", "descent_passes": 1, "group_size": 16}));
    run(regress(&made.baseline).arg("--update")).done();
    let told = run(&mut regress(&made.baseline)).done();
    assert!(told.stdout.contains("as good"), "{told:#?}");

    let packed = made.path("packed");
    let mut command = gptq("quantize");
    command.arg(made.path("model")).arg("--out").arg(&packed);
    command.args([
        "--order",
        "folded",
        "--effort",
        "fast",
        "--descent-passes",
        "1",
    ]);
    command.args([
        "--group-size",
        "16",
        "--no-scale-search",
        "--method",
        "gptq",
    ]);
    let recipe: Value = serde_json::from_slice(&fs::read(&made.baseline).unwrap()).unwrap();
    let calibration = &recipe["recipe"]["calibration"];
    let dataset = made.baseline.parent().unwrap();
    let dataset = dataset.join(calibration["dataset"].as_str().unwrap());
    command.arg("--dataset").arg(dataset);
    for (flag, key) in [("--samples", "samples"), ("--seq-len", "seq_len")] {
        command.args([flag, &calibration[key].to_string()]);
    }
    run(&mut command).done();
    let of_files = || {
        let mut command = regress(&made.baseline);
        command.arg("--checkpoint").arg(&packed);
        command
    };
    let told = run(&mut of_files());
    assert_ne!(told.code, Some(2), "{told:#?}");
    let record = packed.join("gptq_run.json");
    edit_json(&record, |record| {
        let layers = record["layers"].as_array_mut().unwrap();
        for layer in layers {
            if layer["layer"].as_str().unwrap().ends_with("down_proj") {
                layer["folded"][0] = json!(1);
                layer["folded"][1] = json!(1);
            }
        }
    });
    let told = run(&mut of_files()).ended_with(2);
    assert!(told.error_line().contains("down_proj"), "{told:#?}");
    fs::remove_file(&record).unwrap();
    let told = run(&mut of_files()).ended_with(2);
    let unknown = "does not say in which order the channels";
    assert!(told.error_line().contains(unknown), "{told:#?}");
}
