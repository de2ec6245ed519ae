//! Names that are short and still tell rows apart.

use std::collections::BTreeMap;

use gptq_types::{ColumnOrder, GroupSize, Method, QuantSpec};

use super::join::Open;

/// The kind of a float model in records of `gptq eval`.
pub(super) const UNQUANTIZED: &str = "unquantised";
/// Characters of a label that figures have room for.
const LABEL_CHARACTERS: usize = 22;

/// Without what does not change where a path leads.
pub(super) fn plain_path(path: &str) -> &str {
    let mut path = path;
    while let Some(rest) = path.strip_prefix("./") {
        path = rest.trim_start_matches('/');
    }
    match path.trim_end_matches('/') {
        "" => path,
        plain => plain,
    }
}

/// The last name of a path.
pub(super) fn tail(path: &str) -> &str {
    let plain = plain_path(path);
    plain.rsplit('/').next().unwrap_or(plain)
}

/// The branch of `owner/name:branch`, or the last name.
pub(super) fn branch_of(model: &str) -> &str {
    let last = tail(model);
    last.rsplit_once(':').map_or(last, |(_, branch)| branch)
}

/// Name and label of every row, each unique.
pub(super) fn name_rows(rows: &[Open]) -> Vec<(String, String)> {
    let short: Vec<String> = rows.iter().map(|row| row.name.clone()).collect();
    let places: Vec<String> = rows.iter().map(|row| row.place.clone()).collect();
    let names = first_unique(&[short, places]);
    // Settings are more informative in a figure than names.
    let settings = |more: fn(&QuantSpec) -> String| -> Vec<String> {
        (rows.iter().zip(&names))
            .map(|(row, name)| match &row.run {
                Some(run) => more(&run.spec),
                None => row.kind().map_or(name.clone(), short_kind),
            })
            .collect()
    };
    let damped = |spec: &QuantSpec| format!("{} d{}", short_settings(spec), spec.damp_percent);
    let labels = first_unique(&[settings(short_settings), settings(damped), names.clone()]);
    let fitting = first_unique(&[
        labels.iter().map(|label| shortened(label)).collect(),
        labels,
    ]);
    names.into_iter().zip(fitting).collect()
}

/// For each row the first of its candidates that no other row has at the same level; where the
/// last is shared too, a number tells them apart.
fn first_unique(levels: &[Vec<String>]) -> Vec<String> {
    let rows = levels.first().map_or(0, Vec::len);
    let mut found: Vec<Option<String>> = vec![None; rows];
    for level in levels {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for name in level {
            *counts.entry(name).or_default() += 1;
        }
        let fixed: Vec<String> = found.iter().flatten().cloned().collect();
        for (row, name) in level.iter().enumerate() {
            let free = counts[name.as_str()] == 1 && !fixed.contains(name);
            if found[row].is_none() && free {
                found[row] = Some(name.clone());
            }
        }
    }
    (found.into_iter().enumerate())
        .map(|(row, name)| {
            let last = levels.last().map_or("", |level| level[row].as_str());
            name.unwrap_or_else(|| format!("{last} ({})", row + 1))
        })
        .collect()
}

/// `4-bit g32 act asym`.
fn short_settings(spec: &QuantSpec) -> String {
    let mut text = format!("{}-bit", spec.bits);
    text += &match spec.group_size {
        GroupSize::None => " no group".to_string(),
        GroupSize::Channels(size) => format!(" g{size}"),
    };
    text += match spec.order {
        ColumnOrder::Natural => "",
        ColumnOrder::ActOrder => " act",
        ColumnOrder::ActOrderStaticGroups => " static",
        ColumnOrder::GroupAware => " in-group",
        ColumnOrder::Folded => " folded",
        ColumnOrder::Auto => " auto",
    };
    if !spec.sym {
        text += " asym";
    }
    if spec.input_mismatch != 0.0 {
        text += " aimed";
    }
    if spec.descent_passes != 0 {
        text += " descent";
    }
    if spec.trains() {
        text += " trained";
    }
    if spec.method == Method::Rtn {
        text += " RTN";
    }
    text
}

/// The kind of a scored checkpoint in the words of [`short_settings`].
fn short_kind(kind: &str) -> String {
    kind.replace(" sym", "").replace(" act-order", " act")
}

/// Both ends of what is too long for a figure.
fn shortened(label: &str) -> String {
    let characters: Vec<char> = label.chars().collect();
    if characters.len() <= LABEL_CHARACTERS {
        return label.to_string();
    }
    let half = LABEL_CHARACTERS / 2;
    let start: String = characters[..half - 1].iter().collect();
    let end: String = characters[characters.len() - half..].iter().collect();
    format!("{start}…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_compared_by_where_they_lead() {
        assert_eq!(plain_path("././out/main//"), "out/main");
        assert_eq!(plain_path("/"), "/");
        assert_eq!(tail("../data/stories260k/"), "stories260k");
        assert_eq!(branch_of("owner/name:4bit"), "4bit");
        assert_eq!(branch_of("out/main"), "main");
    }

    #[test]
    fn equal_names_give_way_to_longer_ones() {
        let level = |names: [&str; 3]| names.map(str::to_string).to_vec();
        let found = first_unique(&[level(["a", "a", "b"]), level(["x/a", "y/a", "z/b"])]);
        assert_eq!(found, ["x/a", "y/a", "b"]);
        let found = first_unique(&[level(["a", "a", "b"])]);
        assert_eq!(found, ["a (1)", "a (2)", "b"]);
    }

    #[test]
    fn long_labels_keep_both_ends() {
        let label = shortened("gptq-4bit-128g-actorder_True");
        assert_eq!(label, "gptq-4bit-…torder_True");
        assert_eq!(label.chars().count(), LABEL_CHARACTERS);
    }
}
