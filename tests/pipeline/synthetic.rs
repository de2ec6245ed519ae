//! Models of random weights, with calibration tokens of their own.

use crate::support::{gptq, quantize, refused, run};

#[test]
fn a_model_of_random_weights_is_quantized_with_random_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("deep/model"), folder.path().join("out"));
    let ids = folder.path().join("ids.safetensors");
    let made = || {
        let mut command = gptq("synth");
        command.args(["--shape", "tiny", "--layers", "1", "--dtype", "bf16"]);
        command.arg("--out").arg(&model);
        command.arg("--calibration").arg(&ids);
        command.args(["--samples", "8", "--seq-len", "64"]);
        command
    };
    let told = run(&mut made()).done();
    assert_eq!(told.stdout, "", "{told:#?}");
    refused(
        &mut made(),
        folder.path(),
        &["deep/model", "not an empty folder"],
    );

    let mut command = quantize(&model, &out, &ids);
    command.args(["--group-size", "64", "--samples", "8", "--seq-len", "64"]);
    run(&mut command).done();
    run(gptq("inspect").arg(&out)).done();
}
