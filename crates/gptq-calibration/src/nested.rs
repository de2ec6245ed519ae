//! Cells of nested columns as JSON values, which conversations are read from.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use serde_json::{Map, Value};

/// Strings, lists and structs as they are; other values, which no conversation is made of, as null.
pub(crate) fn value_at(array: &ArrayRef, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    if let Some(strings) = array.as_string_opt::<i32>() {
        return strings.value(row).into();
    }
    if let Some(strings) = array.as_string_opt::<i64>() {
        return strings.value(row).into();
    }
    if let Some(strings) = array.as_string_view_opt() {
        return strings.value(row).into();
    }
    if let Some(structs) = array.as_struct_opt() {
        let names = structs.column_names().into_iter().zip(structs.columns());
        let fields = names.map(|(name, column)| (name.to_string(), value_at(column, row)));
        return Value::Object(Map::from_iter(fields));
    }
    let one = array.slice(row, 1); // all keys are widened at once
    if let Some(dictionary) = one.as_any_dictionary_opt() {
        let keys = dictionary.normalized_keys();
        return value_at(dictionary.values(), keys[0]);
    }
    let list = (array.as_list_opt::<i32>().map(|lists| lists.value(row)))
        .or_else(|| array.as_list_opt::<i64>().map(|lists| lists.value(row)))
        .or_else(|| array.as_fixed_size_list_opt().map(|lists| lists.value(row)));
    match list {
        Some(cells) => (0..cells.len())
            .map(|cell| value_at(&cells, cell))
            .collect(),
        None => Value::Null,
    }
}
