//! Cells of nested columns as JSON values, which conversations and questions are read from.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType};
use serde_json::{Map, Value};

/// Strings, whole numbers, lists and structs as they are; other values, which neither is made of, as
/// null.
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
    if let Some(number) = whole_number(array, row) {
        return number;
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

fn whole_number(array: &ArrayRef, row: usize) -> Option<Value> {
    (number::<Int64Type>(array, row))
        .or_else(|| number::<Int32Type>(array, row))
        .or_else(|| number::<Int16Type>(array, row))
        .or_else(|| number::<Int8Type>(array, row))
        .or_else(|| number::<UInt64Type>(array, row))
        .or_else(|| number::<UInt32Type>(array, row))
        .or_else(|| number::<UInt16Type>(array, row))
        .or_else(|| number::<UInt8Type>(array, row))
}

fn number<T: ArrowPrimitiveType>(array: &ArrayRef, row: usize) -> Option<Value>
where
    T::Native: Into<Value>,
{
    Some(array.as_primitive_opt::<T>()?.value(row).into())
}
