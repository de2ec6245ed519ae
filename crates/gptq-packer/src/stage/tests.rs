use gptq_types::Dtype;

use super::*;
use crate::SafetensorsFile;
use crate::place::discard_partial;

fn layout(max_shard_bytes: u64) -> CheckpointLayout {
    layout_of(&[("a", 3), ("b", 8)], max_shard_bytes)
}

fn layout_of(tensors: &[(&str, usize)], max_shard_bytes: u64) -> CheckpointLayout {
    let tensors = tensors
        .iter()
        .map(|&(name, count)| {
            let info = TensorInfo {
                dtype: Dtype::U8,
                shape: vec![count],
            };
            (name.to_string(), info)
        })
        .collect();
    CheckpointLayout::plan(tensors, max_shard_bytes).unwrap()
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_appears_whole() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("deep/out");
    fs::create_dir_all(&out).unwrap();
    let staged = StagedCheckpoint::create(&out, &layout(8)).unwrap();
    assert_eq!(entries(&out), [""; 0]);
    staged.write("b", &[2; 8]).unwrap();
    staged.write("a", &[1; 3]).unwrap();
    staged.add_file("config.json", b"{}").unwrap();
    staged.add_file("tokenizer.json", b"[]").unwrap();
    assert_eq!(staged.bytes("a").unwrap(), [1; 3]);
    let records = staged.file_records().unwrap();
    let published = staged.publish().unwrap();
    let found: BTreeMap<String, FileRecord> = entries(&published)
        .into_iter()
        .map(|name| {
            (
                name.clone(),
                FileRecord::of(&fs::read(published.join(name)).unwrap()),
            )
        })
        .collect();
    assert_eq!(records, found);
    assert_eq!(
        entries(&published),
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    assert_eq!(entries(out.parent().unwrap()), ["out"]);
    let second = out.join("model-00002-of-00002.safetensors");
    let file = SafetensorsFile::open(&second).unwrap();
    assert_eq!(file.read("b").unwrap(), [2; 8]);
    assert_eq!(file.metadata()["format"], "pt");
}

#[test]
fn publishing_needs_every_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    staged.write("a", &[1; 3]).unwrap();
    let error = staged.publish().unwrap_err();
    assert!(
        matches!(&error, StageError::Unwritten { count: 1, first, .. } if first == "b"),
        "{error}"
    );
    assert!(!out.exists());
    let leftover = folder.path().join(".out.partial/.config.json.partial");
    fs::write(&leftover, "{").unwrap();
    let staged = StagedCheckpoint::reopen(&out, &layout(100)).unwrap();
    assert!(!leftover.exists());
    assert!(!staged.is_written("a"));
    staged.mark_written("a").unwrap();
    staged.write("b", &[2; 8]).unwrap();
    assert_eq!(staged.bytes("a").unwrap(), [1; 3]);
    staged.publish().unwrap();
}

#[test]
fn what_is_there_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "x").unwrap();
    assert!(matches!(
        StagedCheckpoint::create(&out, &layout(100)),
        Err(StageError::Occupied(_))
    ));
    fs::remove_file(out.join("precious")).unwrap();
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    staged.write("a", &[1; 3]).unwrap();
    staged.write("b", &[2; 8]).unwrap();
    fs::write(out.join("precious"), "y").unwrap();
    let error = staged.publish().unwrap_err();
    assert!(matches!(error, StageError::TargetTaken { .. }), "{error}");
    assert!(error.to_string().contains(".out.partial"), "{error}");
    assert_eq!(fs::read_to_string(out.join("precious")).unwrap(), "y");
}

#[test]
fn nothing_is_left_after_discard() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    assert!(matches!(
        StagedCheckpoint::create(&out, &layout(100)),
        Err(StageError::Locked(_))
    ));
    assert!(matches!(
        StagedCheckpoint::reopen(&out, &layout(100)),
        Err(StageError::Locked(_))
    ));
    assert!(matches!(discard_partial(&out), Err(StageError::Locked(_))));
    assert!(
        staged.partial_dir().is_dir(),
        "the loser took the winner's work away"
    );
    staged.discard().unwrap();
    assert_eq!(entries(folder.path()), [""; 0]);
    assert!(!discard_partial(&out).unwrap());
    drop(StagedCheckpoint::create(&out, &layout(100)).unwrap());
    assert_eq!(entries(folder.path()), [".out.partial"]);
    assert!(matches!(
        StagedCheckpoint::create(&out, &layout(100)),
        Err(StageError::PartialExists(_))
    ));
    assert!(discard_partial(&out).unwrap());
    assert_eq!(entries(folder.path()), [""; 0]);
}

/// An output of `a/b/out` once left an empty `a/b` behind when the run failed.
#[test]
fn folders_above_go_with_what_they_were_made_for() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a/b/out");
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    staged.discard().unwrap();
    assert_eq!(entries(folder.path()), [""; 0]);
    let huge = layout_of(&[("a", 1 << 60)], 1);
    StagedCheckpoint::create(&out, &huge).unwrap_err();
    assert_eq!(entries(folder.path()), [""; 0]);
    fs::write(folder.path().join("file"), "x").unwrap();
    let below_a_file = folder.path().join("file/b/out");
    StagedCheckpoint::create(&below_a_file, &layout(100)).unwrap_err();
    assert_eq!(entries(folder.path()), ["file"]);

    fs::create_dir(folder.path().join("a")).unwrap();
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    staged.discard().unwrap();
    assert_eq!(entries(&folder.path().join("a")), [""; 0]);
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    fs::write(folder.path().join("a/b/precious"), "x").unwrap();
    staged.discard().unwrap();
    assert_eq!(entries(&folder.path().join("a/b")), ["precious"]);
}

#[test]
fn a_tensor_written_in_parts_is_whole_when_declared() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    staged.write("a", &[1; 3]).unwrap();
    staged.write_part("b", 5, &[6, 7, 8]).unwrap();
    staged.write_part("b", 0, &[1, 2, 3, 4, 5]).unwrap();
    assert!(!staged.is_written("b"));
    assert!(matches!(
        staged.write_part("b", 6, &[0; 3]),
        Err(StageError::Length {
            found: 9,
            expected: 8,
            ..
        })
    ));
    assert!(staged.write_part("b", u64::MAX, &[0]).is_err());
    staged.mark_written("b").unwrap();
    assert_eq!(staged.bytes("b").unwrap(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(entries(&staged.publish_unsynced().unwrap()).len(), 1);
}

#[test]
fn a_partial_folder_of_another_layout_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    assert!(matches!(
        StagedCheckpoint::reopen(&out, &layout(100)),
        Err(StageError::NoPartial(_))
    ));
    drop(StagedCheckpoint::create(&out, &layout(100)).unwrap());
    let difference = |other: CheckpointLayout| match StagedCheckpoint::reopen(&out, &other) {
        Err(StageError::Differs { difference, .. }) => difference,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        difference(layout_of(&[("a", 3), ("b", 9)], 100)),
        "tensor `b` is U8 [8] instead of U8 [9]"
    );
    assert_eq!(
        difference(layout_of(&[("a", 3), ("c", 8)], 100)),
        "tensor `b` instead of `c`"
    );
    assert_eq!(
        difference(layout_of(&[("a", 3)], 100)),
        "2 tensors instead of 1"
    );
    assert_eq!(
        difference(layout(8)),
        "`model.safetensors` is not one of its shards"
    );
    let shard = folder.path().join(".out.partial/model.safetensors");
    File::options()
        .write(true)
        .open(&shard)
        .unwrap()
        .set_len(layout(100).file_bytes() - 1)
        .unwrap();
    assert!(difference(layout(100)).contains("bytes instead of"));
}

#[test]
fn wrong_names_and_lengths_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    assert!(matches!(
        staged.write("c", &[]),
        Err(StageError::Unknown { .. })
    ));
    assert!(matches!(
        staged.write("a", &[1; 4]),
        Err(StageError::Length {
            found: 4,
            expected: 3,
            ..
        })
    ));
    assert!(matches!(
        staged.bytes("a"),
        Err(SourceError::Invalid { .. })
    ));
    for name in ["", "..", "a/b", "/etc/x", "model.safetensors", INDEX_FILE] {
        assert!(
            matches!(staged.add_file(name, b""), Err(StageError::BadFileName(_))),
            "{name}"
        );
    }
    assert!(matches!(
        StagedCheckpoint::create(Path::new("/"), &layout(100)),
        Err(StageError::Occupied(_))
    ));
}

#[test]
fn a_disk_without_room_is_found_first() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let error = StagedCheckpoint::create(&out, &layout_of(&[("a", 1 << 60)], 1)).unwrap_err();
    assert!(
        matches!(error, StageError::NoSpace { needed, free, .. } if needed > free),
        "{error}"
    );
    assert_eq!(entries(folder.path()), [""; 0]);
}

#[test]
fn what_is_hashed_ahead_and_written_again_is_hashed_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let staged = StagedCheckpoint::create(&out, &layout_of(&[("a", 3 << 20), ("b", 8)], 1 << 30));
    let staged = staged.unwrap();
    staged.hash_ahead().unwrap();
    staged.write("a", &[1; 3 << 20]).unwrap();
    staged.hash_ahead().unwrap();
    staged.write("b", &[2; 8]).unwrap();
    staged.write("a", &[3; 3 << 20]).unwrap();
    staged.hash_ahead().unwrap();
    staged.write("b", &[4; 8]).unwrap();
    let records = staged.file_records().unwrap();
    let published = staged.publish().unwrap();
    let bytes = fs::read(published.join("model.safetensors")).unwrap();
    assert_eq!(records["model.safetensors"], FileRecord::of(&bytes));
}

/// A journal that was removed before the rename left a complete result that nobody could publish.
#[test]
fn scaffolding_goes_after_the_rename() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let staged = StagedCheckpoint::create(&out, &layout(100)).unwrap();
    staged.write("a", &[1; 3]).unwrap();
    staged.write("b", &[2; 8]).unwrap();
    fs::write(staged.partial_dir().join("journal"), "x").unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "y").unwrap();
    staged.publish_without(&["journal"]).unwrap_err();
    assert!(folder.path().join(".out.partial/journal").exists());
    fs::remove_dir_all(&out).unwrap();
    let staged = StagedCheckpoint::reopen(&out, &layout(100)).unwrap();
    staged.mark_written("a").unwrap();
    staged.mark_written("b").unwrap();
    staged.publish_without(&["journal"]).unwrap();
    assert_eq!(entries(&out), ["model.safetensors"]);
    assert_eq!(entries(folder.path()), ["out"]);
}
