//! A disk without room.

use std::process::Command;

use crate::support::{Cause, Family, TinyModel, gptq, run, skipped, write_text};

const NO_MOUNT: i32 = 77;

/// Mounts a small disk at `$1`, runs the rest there and lists what it left.
const ON_A_SMALL_DISK: &str = r#"
    disk=$1; shift
    mount -t tmpfs -o size=64k small "$disk" || exit 77
    "$@"; code=$?
    find "$disk" -mindepth 1 | sed 's/^/left: /' >&2
    exit $code
"#;

#[test]
fn a_disk_without_room_is_found_before_the_work_and_nothing_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel {
        vocab: 512,
        ..TinyModel::new(Family::Llama)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();

    let probe = Command::new("unshare").args(["-rm", "true"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        skipped(Cause::Machine, "`unshare -rm`, which mounts a small disk,");
        return;
    }
    let told = run(Command::new("unshare")
        .args(["-rm", "sh", "-c", ON_A_SMALL_DISK, "sh"])
        .arg(&disk)
        .arg(gptq("quantize").get_program())
        .arg("quantize")
        .arg(&model)
        .arg("--out")
        // folders above the output go too
        .arg(disk.join("deep/er/out"))
        .arg("--dataset")
        .arg(&text)
        .args(["--group-size", "32", "--samples", "4", "--seq-len", "32"]));
    if told.code == Some(NO_MOUNT) {
        skipped(Cause::Machine, "a small disk that can be mounted");
        return;
    }
    let told = told.ended_with(2);
    assert!(!told.stderr.contains("left: "), "{told:#?}");
    let error = told.error_line();
    assert!(error.contains("bytes") && error.contains("free"), "{error}");
    assert!(error.contains("out"), "{error}");
}

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

#[test]
fn a_disk_that_fills_up_meanwhile_costs_no_finished_block() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel {
        layers: 8,
        ..TinyModel::new(Family::Llama)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 30_000);
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let probe = Command::new("unshare").args(["-rm", "true"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        skipped(Cause::Machine, "`unshare -rm`, which mounts a small disk,");
        return;
    }
    let told = run(Command::new("unshare")
        .args(["-rm", "sh", "-c", FILLED_MEANWHILE, "sh"])
        .arg(&disk)
        .arg(gptq("quantize").get_program())
        .arg("quantize")
        .arg(&model)
        .arg("--out")
        .arg(disk.join("out"))
        .arg("--dataset")
        .arg(&text)
        .args(["--group-size", "32", "--samples", "64", "--seq-len", "128"]));
    if told.code == Some(NO_MOUNT) {
        skipped(Cause::Machine, "a small disk that can be mounted");
        return;
    }
    let told = told.done();
    assert!(told.stderr.contains("first: 2"), "{told:#?}");
    assert!(told.stderr.contains("blocks are kept in"), "{told:#?}");
    assert!(told.stderr.contains("left: .out.partial"), "{told:#?}");
    assert!(told.stderr.contains("blocks are done already"), "{told:#?}");
    assert!(told.stderr.contains("made: out"), "{told:#?}");
    assert!(!told.stderr.contains("made: .out"), "{told:#?}");
}
