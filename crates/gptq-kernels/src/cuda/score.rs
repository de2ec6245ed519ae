//! The language-model head on the GPU.

use std::sync::Arc;

use gptq_types::{DeviceMatrix, Dtype};

use super::Gpu;
use super::error::CudaError;
use super::memory::Buffer;
use super::program::Program;

/// Logits that exist at a time, in bytes of f32.
const LOGIT_BYTES: usize = 1 << 30;

/// A head on the GPU, sixteen-bit `[vocab, width]`.
pub struct DeviceHead {
    gpu: Arc<Gpu>,
    weight: Buffer,
    vocab: usize,
    width: usize,
    dtype: Dtype,
}

/// What a model says about one next token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowScore {
    /// `ln p(target)`, nats.
    pub log_likelihood: f64,
    /// KL divergence of the reference from this model, nats; 0 without a reference.
    pub kl: f64,
    /// Whether both models' likeliest token is the same; true without a reference.
    pub top1_agrees: bool,
}

impl DeviceHead {
    /// A copy of `weight [vocab, width]`, rounded to `dtype`.
    pub fn new(
        gpu: &Arc<Gpu>,
        weight: &[f32],
        width: usize,
        dtype: Dtype,
    ) -> Result<Self, CudaError> {
        let vocab = weight.len() / width;
        let there = Buffer::new(gpu, weight.len() * 2)?;
        // In parts: the f32 copy on its way need not exist as a whole.
        let part = (1 << 26) / width * width;
        for (index, values) in weight.chunks(part).enumerate() {
            let rows = values.len() / width;
            let to = DeviceMatrix {
                address: there.address() + 2 * (index * part) as u64,
                rows,
                columns: width,
                dtype,
            };
            gpu.upload(to, values)?;
        }
        Ok(DeviceHead {
            gpu: gpu.clone(),
            weight: there,
            vocab,
            width,
            dtype,
        })
    }

    fn logits(&self, out: u64, rows: &[f32]) -> Result<(), CudaError> {
        let count = rows.len() / self.width;
        let x = Buffer::new(&self.gpu, rows.len() * 2)?;
        let matrix = |address, rows| DeviceMatrix {
            address,
            rows,
            columns: self.width,
            dtype: self.dtype,
        };
        let x_there = matrix(x.address(), count);
        self.gpu.upload(x_there, rows)?;
        self.gpu.project(
            out,
            true,
            x_there,
            matrix(self.weight.address(), self.vocab),
        )
    }

    /// Scores `rows [targets.len(), width]` for the tokens that follow them; `reference` is
    /// another model with the same vocabulary and its rows.
    pub fn score(
        &self,
        rows: &[f32],
        targets: &[u32],
        reference: Option<(&DeviceHead, &[f32])>,
    ) -> Result<Vec<RowScore>, CudaError> {
        let gpu = &self.gpu;
        let step = (LOGIT_BYTES / (4 * self.vocab)).clamp(1, targets.len().max(1));
        let q = gpu.scratch("logits", step * self.vocab * 4)?;
        let p = match reference {
            Some((other, _)) => Some(gpu.scratch("reference logits", step * other.vocab * 4)?),
            None => None,
        };
        let mut scores = Vec::with_capacity(targets.len());
        for (index, targets) in targets.chunks(step).enumerate() {
            let part = |rows: &'_ [f32], width: usize| {
                index * step * width..(index * step + targets.len()) * width.min(rows.len())
            };
            self.logits(q.address(), &rows[part(rows, self.width)])?;
            if let (Some((other, rows)), Some(p)) = (reference, &p) {
                other.logits(p.address(), &rows[part(rows, other.width)])?;
            }
            let out = Buffer::new(gpu, targets.len() * 24)?;
            let targets_there = Buffer::from_host(gpu, targets)?;
            let args = [
                (&out).into(),
                q.address().into(),
                p.as_ref().map_or(0, |p| p.address()).into(),
                (&targets_there).into(),
                (self.vocab as i32).into(),
            ];
            let program = Program::Decoder {
                bf16: self.dtype == Dtype::BF16,
            };
            // SAFETY: a row of logits for each target; targets lie in the vocabulary.
            unsafe {
                gpu.launch(
                    program,
                    "score",
                    [targets.len(), 1, 1],
                    [256, 1, 1],
                    0,
                    &args,
                )?
            };
            let values: Vec<f64> = out.to_host(targets.len() * 3)?;
            scores.extend(values.chunks_exact(3).map(|row| RowScore {
                log_likelihood: row[0],
                kl: row[1],
                top1_agrees: row[2] != 0.0,
            }));
        }
        Ok(scores)
    }
}
