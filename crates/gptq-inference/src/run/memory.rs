//! Memory that sequences would take, compared with what is free before it is asked for: an allocation
//! that the system refuses ends the process, and one that it grants too early ends another.

use std::fs;
use std::path::Path;

use gptq_model::ModelSpec;
use gptq_model::spec::{BlockSpec, KeySource, RotarySpec};

use super::RunError;

/// Bytes that `batch` sequences of `capacity` tokens take in addition to the weights: a KV cache of
/// `element` bytes a value, rotary tables, and a step's activations and logits. `None` on overflow.
fn needed(spec: &ModelSpec, batch: usize, capacity: usize, element: usize) -> Option<usize> {
    let own = |keys: KeySource| !matches!(keys, KeySource::Block(_));
    let keys: usize = (spec.blocks.iter())
        .flat_map(BlockSpec::attention)
        .filter(|attention| own(attention.keys))
        .map(|attention| attention.shape.kv_heads * attention.shape.head_dim)
        .sum();
    let caches = (2 * element * keys)
        .checked_mul(capacity)?
        .checked_mul(batch)?;
    let columns = |table: &RotarySpec| match table.query_factor {
        None => table.rotary_dim,
        Some(_) => 2 * table.rotary_dim,
    };
    let columns: usize = spec.rotaries.iter().map(columns).sum();
    let tables = capacity.checked_mul(4 * columns)?;
    let by_token = spec.embedding.per_block.as_ref();
    let by_token = by_token.map_or(0, |inputs| inputs.width * spec.blocks.len());
    // The logits twice: those of the last step are kept while the next are computed.
    let widest = 2 * widest_outputs(spec) + 3 * spec.hidden_size;
    let row = 4 * (widest + 2 * spec.vocab_size + 3 * by_token);
    let step = batch.checked_mul(row)?;
    caches.checked_add(tables)?.checked_add(step)
}

/// Columns of all outputs of linears that share an input, the most of them.
pub(super) fn widest_outputs(spec: &ModelSpec) -> usize {
    let branches = spec.blocks.iter().flat_map(BlockSpec::branches);
    let outputs =
        branches.map(|branch| branch.input.iter().map(|linear| linear.out_features).sum());
    outputs.max().unwrap_or(0)
}

/// Refuses sequences that take more than `free` bytes.
pub(super) fn check(
    spec: &ModelSpec,
    batch: usize,
    capacity: usize,
    element: usize,
    free: usize,
) -> Result<(), RunError> {
    match needed(spec, batch, capacity, element) {
        Some(needed) if needed <= free => Ok(()),
        needed => Err(RunError::Memory {
            batch,
            capacity,
            needed: needed.map_or("more than can be counted".to_string(), gigabytes),
            free: gigabytes(free),
        }),
    }
}

fn gigabytes(bytes: usize) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

/// Bytes that this process may still take of the host's memory: the least of what the machine, its
/// control group and its address space have left. All of them where nothing tells.
pub(crate) fn free_on_host() -> usize {
    let known = [available(), left_in_group(), left_of_addresses()];
    known.into_iter().flatten().min().unwrap_or(usize::MAX)
}

fn available() -> Option<usize> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    kilobytes(&text, "MemAvailable:")
}

/// A group's limit counts the files that it has read, which make room when asked.
fn left_in_group() -> Option<usize> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let version_1 = groups.lines().find_map(|line| {
        let (_, path) = line.split_once(":memory:")?;
        left_in(
            &Path::new("/sys/fs/cgroup/memory").join(path.trim_start_matches('/')),
            [
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ],
        )
    });
    let version_2 = groups.lines().find_map(|line| {
        let path = line.strip_prefix("0::")?;
        left_in(
            &Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')),
            ["memory.max", "memory.current", "inactive_file"],
        )
    });
    version_1.or(version_2)
}

fn left_in(folder: &Path, [limit, usage, files]: [&str; 3]) -> Option<usize> {
    let number = |name| {
        fs::read_to_string(folder.join(name))
            .ok()?
            .trim()
            .parse::<usize>()
            .ok()
    };
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let files = (stat.lines())
        .find_map(|line| line.strip_prefix(files)?.trim().parse::<usize>().ok())
        .unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(files)))
}

fn left_of_addresses() -> Option<usize> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: usize = line.split_whitespace().next()?.parse().ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(limit.saturating_sub(kilobytes(&status, "VmSize:")?))
}

/// The number of kilobytes behind a name at the start of a line.
fn kilobytes(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: usize = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ModelSpec {
        let json = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}"#;
        ModelSpec::parse(json).unwrap()
    }

    /// `--speed-batch 100000` and `--speed-prompt 4294967296` ended in an abort.
    #[test]
    fn what_does_not_fit_or_cannot_be_counted_is_refused() {
        let spec = spec();
        // 2 blocks, keys and values, 64 wide, f32; 16 channels; 640 + 2 * 384 ... by hand
        assert_eq!(
            needed(&spec, 1, 10, 4),
            Some(10_240 + 640 + 4 * (384 + 192 + 256))
        );
        check(&spec, 1, 10, 4, 1 << 20).unwrap();
        for (batch, capacity) in [(100_000, 512), (1, 1 << 40), (usize::MAX, usize::MAX)] {
            let error = check(&spec, batch, capacity, 4, 1 << 30).unwrap_err();
            let named = format!("{batch} sequences of {capacity} tokens");
            assert!(error.to_string().contains(&named), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn this_machine_has_some_memory_left() {
        assert!(free_on_host() > 1 << 20);
        assert_eq!(
            kilobytes("a\nVmSize:\t   12 kB\n", "VmSize:"),
            Some(12 << 10)
        );
    }
}
