//! The command that makes a checkpoint again, as far as its record holds it.

use gptq_types::{CheckpointFormat, ColumnOrder, Effort, Method, RunRecord};

/// `gptq quantize` with every setting of the record.
pub(super) fn quantize_command(run: &RunRecord, out: &str) -> String {
    let spec = &run.spec;
    let mut words: Vec<String> = vec!["gptq".into(), "quantize".into(), quoted(&run.model)];
    let mut flag = |name: &str, value: String| words.extend([name.to_string(), quoted(&value)]);
    flag("-o", out.to_string());
    flag("--bits", spec.bits.to_string());
    flag("--group-size", spec.group_size.to_string());
    flag("--damp", spec.damp_percent.to_string());
    if let Some(calibration) = &run.calibration {
        flag("--dataset", given(&calibration.dataset, &calibration.file));
        if let Some(column) = &calibration.column {
            flag("--column", column.clone());
        }
        flag("--samples", calibration.samples.to_string());
        flag("--seq-len", calibration.seq_len.to_string());
        flag("--seed", calibration.seed.to_string());
        if let Some(temperature) = calibration.temperature {
            flag("--temperature", temperature.to_string());
        }
    }
    let bos = match &run.calibration {
        Some(calibration) => calibration.window_bos,
        None => run
            .divergence
            .iter()
            .find_map(|compared| compared.window_bos),
    };
    let mut compared = run.divergence.iter();
    if let Some(compared) = compared.next().filter(|_| run.calibration.is_none()) {
        // Rounding to nearest keeps no record of tokens that it did not see.
        if compared.held_out {
            flag("--dataset", given(&compared.text, &compared.file));
        }
        flag("--seq-len", compared.seq_len.to_string());
    }
    if let Some(tokenizer) = &run.tokenizer {
        flag("--tokenizer", tokenizer.clone());
    }
    for compared in &run.divergence {
        match compared.held_out {
            true => flag("--check-windows", compared.windows.to_string()),
            false => flag("--check-dataset", given(&compared.text, &compared.file)),
        }
    }
    if spec.format != CheckpointFormat::Gptq {
        flag("--format", spec.format.to_string());
    }
    if spec.method == Method::Rtn {
        flag("--method", "rtn".to_string());
    }
    if run.device == "cpu" {
        flag("--device", "cpu".to_string());
    }
    let order: &[&str] = match spec.order {
        ColumnOrder::Natural => &[],
        ColumnOrder::ActOrder => &["--desc-act"],
        ColumnOrder::ActOrderStaticGroups => &["--desc-act", "--static-groups"],
        ColumnOrder::GroupAware => &["--act-group-aware"],
        ColumnOrder::Folded => &["--order folded"],
        ColumnOrder::Auto => &["--order auto"],
    };
    words.extend(order.iter().map(|flag| flag.to_string()));
    // An absent value is the default of the model's family.
    words.extend(bos.map(|bos| match bos {
        true => "--window-bos".to_string(),
        false => "--no-window-bos".to_string(),
    }));
    if !spec.sym {
        words.push("--asym".to_string());
    }
    if spec.method == Method::Gptq && !spec.scale_search {
        words.push("--no-scale-search".to_string());
    }
    if spec.scale_search && !spec.full_range {
        words.push("--unsigned-scales".to_string());
    }
    match spec.effort() {
        _ if spec.method == Method::Rtn => {}
        Some(effort) if effort == Effort::default() => {}
        Some(effort) => words.push(format!("--effort {}", effort.name())),
        None => {
            words.push(format!("--input-mismatch {}", spec.input_mismatch));
            words.push(format!("--descent-passes {}", spec.descent_passes));
            if spec.trains() {
                words.push(format!("--training-epochs {}", spec.training_epochs));
            }
        }
    }
    words.join(" ")
}

/// A dataset as it is typed, with the local copy of a named one.
fn given(dataset: &str, file: &Option<String>) -> String {
    match file {
        Some(file) => format!("{dataset}={file}"),
        None => dataset.to_string(),
    }
}

/// A word as a shell reads it back.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:=+,@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_from_a_shell() {
        assert_eq!(quoted("owner/name:b-1"), "owner/name:b-1");
        assert_eq!(quoted("it's; rm"), r"'it'\''s; rm'");
        assert_eq!(quoted(""), "''");
    }
}
