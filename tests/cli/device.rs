//! Absent devices, and the report of `doctor`.

use crate::support::{Family, TinyModel, gptq, quantize, refused, run, write_text};

/// No machine has so many GPUs.
const NO_SUCH_DEVICE: &str = "cuda:99";

#[test]
fn a_gpu_that_is_not_there_is_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let mut command = quantize(&model, &folder.path().join("out"), &text);
    command.args(["--group-size", "32", "--samples", "4", "--seq-len", "32"]);
    command.args(["--device", NO_SUCH_DEVICE]);
    // A build without GPU support reports that; one with it names the missing library or device.
    let told = refused(&mut command, folder.path(), &[]);
    let error = told.error_line();
    let names = ["without GPUs", "loader path", "finds no device 99"];
    assert!(names.iter().any(|name| error.contains(name)), "{error}");
    assert!(told.stderr.contains("--device cpu"), "{told:#?}");
}

#[test]
fn sizes_and_devices_that_cannot_be_read_are_usage_errors() {
    for (flag, value, named) in [
        ("--device", "gpu", "expected auto, cpu or cuda:N"),
        ("--device", "cuda:x", "expected auto, cpu or cuda:N"),
        ("--gpu-memory", "much", "expected a size such as 8GB"),
        ("--gpu-memory", "-1GB", "expected a size such as 8GB"),
    ] {
        let flag = format!("{flag}={value}");
        let told = run(gptq("quantize").args(["m", "-o", "out", &flag])).ended_with(2);
        assert!(told.stderr.contains(named), "{told:#?}");
    }
}

#[test]
fn doctor_tells_of_the_processor_and_of_gpus() {
    let told = run(&mut gptq("doctor"));
    assert!(told.stdout.starts_with("processor: "), "{told:#?}");
    let gpus = ["without GPUs", "libcuda"];
    assert!(
        gpus.iter().any(|name| told.stdout.contains(name)),
        "{told:#?}"
    );
    assert!(matches!(told.code, Some(0 | 1)), "{told:#?}");
}
