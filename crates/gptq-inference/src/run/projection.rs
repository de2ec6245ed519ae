//! Linears that read the same rows, on a GPU: one product wherever they can stand side by side.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, CudaError, DeviceMatrix, Gpu, PackedLinear, RowOrder};
use gptq_model::spec::Piece;
use gptq_model::{LinearSpec, ModelError};
use gptq_types::{Dtype, SolvedLayer, SourceError};
use half::{bf16, f16};

use crate::{OpenedModel, StoredLinear, StoredMatrix, StoredWeight};

/// A sixteen-bit matrix on the GPU.
pub(super) struct Dense {
    weight: Buffer,
    rows: usize,
    columns: usize,
    dtype: Dtype,
}

impl Dense {
    /// The rows of all `parts`, in the type of activations.
    pub fn new(
        gpu: &Arc<Gpu>,
        name: &str,
        parts: &[&StoredMatrix],
        rows: usize,
        columns: usize,
        dtype: Dtype,
    ) -> Result<Self, ModelError> {
        let elements: usize = parts.iter().map(|part| part.elements()).sum();
        if elements != rows * columns {
            return Err(ModelError::Source(SourceError::Invalid {
                name: name.to_string(),
                reason: format!("has not {rows} x {columns} elements"),
            }));
        }
        let weight = Buffer::new(gpu, elements * 2)?;
        let (whole, mut written) = (weight.slice::<u16>(elements), 0);
        for part in parts {
            let values = sixteen_bits(name, part, dtype)?;
            gpu.write(whole.part(written..written + values.len()), &values)?;
            written += values.len();
        }
        Ok(Dense {
            weight,
            rows,
            columns,
            dtype,
        })
    }

    pub fn matrix(&self) -> DeviceMatrix<'_> {
        self.weight.matrix([self.rows, self.columns], self.dtype)
    }
}

/// Bits of values rounded to `dtype`; one that it cannot hold is an error.
fn sixteen_bits(name: &str, stored: &StoredMatrix, dtype: Dtype) -> Result<Vec<u16>, SourceError> {
    let pairs =
        || (stored.bytes.chunks_exact(2)).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let narrow = |value: f32| match dtype {
        Dtype::BF16 => (
            bf16::from_f32(value).to_bits(),
            bf16::from_f32(value).is_finite(),
        ),
        _ => (
            f16::from_f32(value).to_bits(),
            f16::from_f32(value).is_finite(),
        ),
    };
    let rounded = |values: &mut dyn Iterator<Item = f32>| {
        values
            .map(|value| match narrow(value) {
                (bits, true) => Ok(bits),
                _ => Err(SourceError::Invalid {
                    name: name.to_string(),
                    reason: format!("holds {value}, which {dtype} cannot"),
                }),
            })
            .collect()
    };
    match stored.dtype {
        same if same == dtype => Ok(pairs().collect()),
        Dtype::F16 => rounded(&mut pairs().map(|bits| f16::from_bits(bits).to_f32())),
        Dtype::BF16 => rounded(&mut pairs().map(|bits| bf16::from_bits(bits).to_f32())),
        Dtype::F32 => rounded(
            &mut (stored.bytes.chunks_exact(4))
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])),
        ),
        other => Err(SourceError::Invalid {
            name: name.to_string(),
            reason: format!("is {other}, expected floats"),
        }),
    }
}

enum Linear {
    Packed(PackedLinear),
    Float { weight: Dense, bias: Option<Buffer> },
}

impl Linear {
    fn order(&self) -> RowOrder<'_> {
        match self {
            Linear::Packed(linear) => linear.order(),
            Linear::Float { weight, .. } => RowOrder::natural(weight.columns),
        }
    }

    fn outputs(&self) -> usize {
        match self {
            Linear::Packed(linear) => linear.outputs(),
            Linear::Float { weight, .. } => weight.rows,
        }
    }

    fn multiply(
        &self,
        gpu: &Gpu,
        out: DeviceMatrix<'_>,
        x: DeviceMatrix<'_>,
        ordered: bool,
        add: bool,
    ) -> Result<(), CudaError> {
        match self {
            Linear::Packed(linear) if ordered => linear.multiply_ordered(out, x, add),
            Linear::Packed(linear) => linear.multiply(out, x, add),
            Linear::Float { weight, bias } => {
                gpu.project_onto(out, x, weight.matrix(), add)?;
                match bias {
                    None => Ok(()),
                    Some(bias) => gpu.add_bias(out, bias),
                }
            }
        }
    }
}

/// See the module.
pub(super) struct Projection {
    /// One fused linear, or one for each name where they cannot be fused.
    linears: Vec<Linear>,
    /// Outputs of each name.
    outputs: Vec<usize>,
    /// The place of each operand in the outputs.
    operands: Vec<Piece>,
}

impl Projection {
    pub fn load(
        gpu: &Arc<Gpu>,
        model: &OpenedModel,
        names: &[LinearSpec],
        operands: &[Piece],
        dtype: Dtype,
    ) -> Result<Self, ModelError> {
        let stored = (names.iter())
            .map(|linear| model.linear(linear))
            .collect::<Result<Vec<StoredLinear>, _>>()?;
        let columns = names[0].in_features;
        let packed: Vec<&SolvedLayer> = (stored.iter())
            .filter_map(|linear| match &linear.weight {
                StoredWeight::Packed(solved) => Some(solved),
                StoredWeight::Float(_) => None,
            })
            .collect();
        let float: Vec<&StoredMatrix> = (stored.iter())
            .filter_map(|linear| match &linear.weight {
                StoredWeight::Packed(_) => None,
                StoredWeight::Float(matrix) => Some(matrix),
            })
            .collect();
        let outputs: Vec<usize> = names.iter().map(|linear| linear.out_features).collect();
        let biases: Vec<f32> = (stored.iter())
            .flat_map(|linear| linear.bias.iter().flatten().copied())
            .collect();
        let bias = (!biases.is_empty()).then_some(&biases[..]);
        let name = names[0].name.to_string();
        let dense = |name: &str, parts: &[&StoredMatrix], rows, bias: Option<&[f32]>| {
            Ok::<_, ModelError>(Linear::Float {
                weight: Dense::new(gpu, name, parts, rows, columns, dtype)?,
                bias: bias.map(|bias| Buffer::from_host(gpu, bias)).transpose()?,
            })
        };
        let linears = if packed.len() == stored.len() && PackedLinear::fit_beside(&packed) {
            vec![Linear::Packed(PackedLinear::beside(
                gpu, &packed, bias, dtype,
            )?)]
        } else if float.len() == stored.len() {
            vec![dense(&name, &float, outputs.iter().sum(), bias)?]
        } else {
            (stored.iter().zip(names))
                .map(|(linear, spec)| match &linear.weight {
                    StoredWeight::Packed(solved) => Ok(Linear::Packed(PackedLinear::new(
                        gpu,
                        solved,
                        linear.bias.as_deref(),
                        dtype,
                    )?)),
                    StoredWeight::Float(matrix) => {
                        let bias = linear.bias.as_deref();
                        dense(&spec.name.0, &[matrix], spec.out_features, bias)
                    }
                })
                .collect::<Result<_, ModelError>>()?
        };
        Ok(Projection {
            linears,
            outputs,
            operands: operands.to_vec(),
        })
    }

    /// The order in which rows are to be written for it.
    pub fn order(&self) -> RowOrder<'_> {
        match &self.linears[..] {
            [one] => one.order(),
            // Each linear gathers its own input.
            _ => RowOrder::natural(self.features()),
        }
    }

    /// Columns of the rows that it reads, in their natural order.
    pub fn features(&self) -> usize {
        match &self.linears[0] {
            Linear::Packed(linear) => linear.features(),
            Linear::Float { weight, .. } => weight.columns,
        }
    }

    /// Outputs of all names.
    pub fn outputs_width(&self) -> usize {
        self.outputs.iter().sum()
    }

    /// All products with rows of x in [order](Self::order), one behind the other in `out`, which has
    /// `[rows, `[`outputs_width`](Self::outputs_width)`]` elements.
    pub fn multiply(
        &self,
        gpu: &Gpu,
        out: DeviceMatrix<'_>,
        x: DeviceMatrix<'_>,
        add: bool,
    ) -> Result<(), CudaError> {
        let ordered = self.linears.len() == 1;
        self.each(out, |linear, out| {
            linear.multiply(gpu, out, x, ordered, add)
        })
    }

    /// Multiplies rows of x in their natural order.
    pub fn multiply_natural(
        &self,
        gpu: &Gpu,
        out: DeviceMatrix<'_>,
        x: DeviceMatrix<'_>,
        add: bool,
    ) -> Result<(), CudaError> {
        self.each(out, |linear, out| linear.multiply(gpu, out, x, false, add))
    }

    fn each(
        &self,
        out: DeviceMatrix<'_>,
        multiply: impl Fn(&Linear, DeviceMatrix<'_>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let mut before = 0;
        for linear in &self.linears {
            let outputs = linear.outputs();
            multiply(linear, behind(out, before, outputs))?;
            before += outputs;
        }
        Ok(())
    }

    /// Views of a mixer's operands in `out`, which holds the product.
    pub fn operands<'a, const N: usize>(&self, out: DeviceMatrix<'a>) -> [DeviceMatrix<'a>; N] {
        let together = self.linears.len() == 1;
        let operand = |piece: &Piece| {
            let before: usize = self.outputs[..piece.linear].iter().sum();
            let columns = piece.columns.clone();
            match together {
                true => out.column_range(before + columns.start..before + columns.end),
                false => behind(out, before, self.outputs[piece.linear]).column_range(columns),
            }
        };
        let all: Vec<DeviceMatrix<'a>> = self.operands.iter().map(operand).collect();
        all.try_into()
            .expect("the spec names the operands of a mixer")
    }
}

/// The outputs of one of several linears whose products lie behind each other in `out`, after `before`
/// outputs of others.
fn behind(out: DeviceMatrix<'_>, before: usize, outputs: usize) -> DeviceMatrix<'_> {
    let rows = out.rows();
    let flat = out.reshaped([1, out.elements()]);
    let own = flat.column_range(rows * before..rows * (before + outputs));
    own.reshaped([rows, outputs])
}
