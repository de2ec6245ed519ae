//! Token windows that somebody stored: safetensors with one tensor `input_ids`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use gptq_types::outside_name::shown;

use crate::CalibrationError;
use crate::rows::limit;

const TENSOR: &str = "input_ids";

/// 2^27 tokens of eight bytes: a thousand times the papers' 128 windows of 2048.
const MAX_FILE_BYTES: usize = 1 << 30;

/// `input_ids`, i32 or i64 `[windows, tokens]`, as one vector per window.
///
/// Fails on another type or shape, on an empty tensor and on an id below 0 or above `u32::MAX`.
pub(crate) fn read_windows(path: &Path) -> Result<Vec<Vec<u32>>, CalibrationError> {
    let wrong = |reason: String| CalibrationError::Tensor {
        path: path.display().to_string(),
        tensor: TENSOR,
        reason,
    };
    let bytes = read_file(path)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| CalibrationError::malformed(path, error))?;
    let tensor = file.tensor(TENSOR).map_err(|_| {
        let names = format!("{:?}", sorted(file.names()));
        wrong(format!("missing, the file has {}", shown(&names, 120)))
    })?;
    let [windows, tokens] = *tensor.shape() else {
        return Err(wrong(format!(
            "shape {:?}, expected [windows, tokens]",
            tensor.shape()
        )));
    };
    if windows == 0 || tokens == 0 {
        return Err(wrong(format!(
            "shape [{windows}, {tokens}] holds no tokens"
        )));
    }
    let values: Vec<i64> = match tensor.dtype() {
        Dtype::I32 => words(tensor.data())
            .map(|w| i64::from(i32::from_le_bytes(w)))
            .collect(),
        Dtype::I64 => words(tensor.data()).map(i64::from_le_bytes).collect(),
        other => return Err(wrong(format!("type {other:?}, expected I32 or I64"))),
    };
    let window = |(row, values): (usize, &[i64])| {
        let id = |(column, &value): (usize, &i64)| {
            u32::try_from(value).map_err(|_| {
                wrong(format!(
                    "[{row}, {column}] is {value}, which is no token id"
                ))
            })
        };
        values.iter().enumerate().map(id).collect()
    };
    values
        .chunks_exact(tokens)
        .enumerate()
        .map(window)
        .collect()
}

fn read_file(path: &Path) -> Result<Vec<u8>, CalibrationError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|source| CalibrationError::read(path, source))?;
    limit(path, bytes.len(), MAX_FILE_BYTES)?;
    Ok(bytes)
}

fn words<const SIZE: usize>(data: &[u8]) -> impl Iterator<Item = [u8; SIZE]> {
    data.as_chunks::<SIZE>().0.iter().copied()
}

fn sorted(mut names: Vec<&str>) -> Vec<&str> {
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn read(
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        data: &[u8],
    ) -> Result<Vec<Vec<u32>>, CalibrationError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        let bytes = safetensors::serialize([(name, view)], None).unwrap();
        std::fs::write(&path, bytes).unwrap();
        read_windows(&path)
    }

    fn i32s(values: &[i32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn both_integer_types_give_the_same_windows() {
        let expected = vec![vec![1, 2, 3], vec![4, 5, 31999]];
        let narrow = i32s(&[1, 2, 3, 4, 5, 31999]);
        assert_eq!(
            read("input_ids", Dtype::I32, &[2, 3], &narrow).unwrap(),
            expected
        );
        let wide: Vec<u8> = [1i64, 2, 3, 4, 5, 31999]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        assert_eq!(
            read("input_ids", Dtype::I64, &[2, 3], &wide).unwrap(),
            expected
        );
    }

    #[test]
    fn whatever_is_not_token_windows_is_refused() {
        let data = i32s(&[1, -2]);
        let reason = |result: Result<Vec<Vec<u32>>, CalibrationError>| match result.unwrap_err() {
            CalibrationError::Tensor { reason, .. } => reason,
            other => panic!("{other}"),
        };
        assert_eq!(
            reason(read("ids", Dtype::I32, &[1, 2], &data)),
            "missing, the file has [\"ids\"]"
        );
        assert_eq!(
            reason(read("input_ids", Dtype::I32, &[2], &data)),
            "shape [2], expected [windows, tokens]"
        );
        assert_eq!(
            reason(read("input_ids", Dtype::I32, &[0, 2], &[])),
            "shape [0, 2] holds no tokens"
        );
        assert_eq!(
            reason(read("input_ids", Dtype::F32, &[1, 2], &data)),
            "type F32, expected I32 or I64"
        );
        assert_eq!(
            reason(read("input_ids", Dtype::I32, &[1, 2], &data)),
            "[0, 1] is -2, which is no token id"
        );
        let large = (1i64 << 32).to_le_bytes();
        assert_eq!(
            reason(read("input_ids", Dtype::I64, &[1, 1], &large)),
            "[0, 0] is 4294967296, which is no token id"
        );
    }

    #[test]
    fn a_file_that_is_no_safetensors_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        assert!(matches!(
            read_windows(&path),
            Err(CalibrationError::Read { .. })
        ));
        std::fs::write(&path, [255; 32]).unwrap();
        assert!(matches!(
            read_windows(&path),
            Err(CalibrationError::Malformed { .. })
        ));
    }
}
