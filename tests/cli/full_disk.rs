//! A disk without room.

use std::process::Command;

use crate::support::{Cause, Family, Run, TinyModel, gptq, run, skipped, write_text};

const NO_MOUNT: i32 = 77;

/// Mounts a small disk at `$1`, runs the rest there and lists what it left.
const ON_A_SMALL_DISK: &str = r#"
    disk=$1; shift
    mount -t tmpfs -o size=64k small "$disk" || exit 77
    "$@"; code=$?
    find "$disk" -mindepth 1 | sed 's/^/left: /' >&2
    exit $code
"#;

/// Mounts a small disk at `$1`, fills it once a block is in the journal, waits for the run to fail,
/// makes room and runs the same command again with --resume.
const FILLED_MEANWHILE: &str = r#"
    disk=$1; shift
    mount -t tmpfs -o size=4m small "$disk" || exit 77
    "$@" & run=$!
    while [ "$(wc -l < "$disk/.out.partial/journal.jsonl" 2>/dev/null || echo 0)" -lt 2 ]; do
        kill -0 $run 2>/dev/null || break
    done
    cat /dev/zero > "$disk/fill" 2>/dev/null
    wait $run; echo "first: $?" >&2
    ls -A "$disk" | sed 's/^/left: /' >&2
    rm "$disk/fill"
    "$@" --resume; code=$?
    ls -A "$disk" | sed 's/^/made: /' >&2
    exit $code
"#;

/// Runs `script` in a mount namespace of its own: `$1` is the folder to mount a disk at, the rest a
/// `quantize` of a model of these shapes to `out` on that disk. `None` if the machine cannot mount
/// one.
fn on_a_disk(
    script: &str,
    shapes: &TinyModel,
    out: &str,
    words: usize,
    flags: [&str; 4],
) -> Option<Run> {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    shapes.write(&model);
    write_text(&text, shapes.vocab, words);
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let probe = Command::new("unshare").args(["-rm", "true"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        skipped(Cause::Machine, "`unshare -rm`, which mounts a small disk,");
        return None;
    }
    let told = run(Command::new("unshare")
        .args(["-rm", "sh", "-c", script, "sh"])
        .arg(&disk)
        .arg(gptq("quantize").get_program())
        .arg("quantize")
        .arg(&model)
        .arg("--out")
        .arg(disk.join(out))
        .arg("--dataset")
        .arg(&text)
        .args(["--group-size", "32"])
        .args(flags));
    if told.code == Some(NO_MOUNT) {
        skipped(Cause::Machine, "a small disk that can be mounted");
        return None;
    }
    Some(told)
}

#[test]
fn a_disk_without_room_is_found_before_the_work_and_nothing_stays() {
    let shapes = TinyModel {
        vocab: 512,
        ..TinyModel::new(Family::Llama)
    };
    let flags = ["--samples", "4", "--seq-len", "32"];
    // Folders above the output go too.
    let Some(told) = on_a_disk(ON_A_SMALL_DISK, &shapes, "deep/er/out", 2_000, flags) else {
        return;
    };
    let told = told.ended_with(2);
    assert!(!told.stderr.contains("left: "), "{told:#?}");
    let error = told.error_line();
    assert!(error.contains("bytes") && error.contains("free"), "{error}");
    assert!(error.contains("out"), "{error}");
}

#[test]
fn a_disk_that_fills_up_meanwhile_costs_no_finished_block() {
    let shapes = TinyModel {
        layers: 8,
        ..TinyModel::new(Family::Llama)
    };
    let flags = ["--samples", "64", "--seq-len", "128"];
    let Some(told) = on_a_disk(FILLED_MEANWHILE, &shapes, "out", 30_000, flags) else {
        return;
    };
    let told = told.done();
    assert!(told.stderr.contains("first: 2"), "{told:#?}");
    assert!(told.stderr.contains("blocks are kept in"), "{told:#?}");
    assert!(told.stderr.contains("left: .out.partial"), "{told:#?}");
    assert!(told.stderr.contains("blocks are done already"), "{told:#?}");
    assert!(told.stderr.contains("made: out"), "{told:#?}");
    assert!(!told.stderr.contains("made: .out"), "{told:#?}");
}
