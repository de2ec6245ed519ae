//! The language-model head on the GPU.

use std::sync::Arc;

use gptq_types::Dtype;

use super::Gpu;
use super::decoder;
use super::error::CudaError;
use super::memory::Buffer;
use super::norm::DeviceNorm;
use super::view::{DeviceMatrix, DeviceSlice};

/// Logits that exist at a time, in bytes of f32.
const LOGIT_BYTES: usize = 1 << 30;

/// A head on the GPU, sixteen-bit `[vocab, width]`, and the norm before it.
pub struct DeviceHead {
    gpu: Arc<Gpu>,
    weight: Buffer,
    norm: DeviceNorm,
    soft_cap: Option<f32>,
    vocab: usize,
    dtype: Dtype,
}

/// Hidden states before the final norm, sixteen-bit `[tokens, width]`.
pub enum States {
    /// On the GPU.
    Device(Buffer),
    /// In host memory, until they are needed again.
    Host(Vec<u16>),
}

impl States {
    /// A copy of a matrix on the GPU.
    pub fn copy_of(gpu: &Arc<Gpu>, x: DeviceMatrix) -> Result<States, CudaError> {
        let buffer = Buffer::new(gpu, x.bytes())?;
        gpu.copy(buffer.matrix([x.rows, x.columns], x.dtype), x)?;
        Ok(States::Device(buffer))
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        match self {
            States::Device(buffer) => buffer.bytes() / 2,
            States::Host(values) => values.len(),
        }
    }

    /// All of them, in host memory.
    pub fn values(&self) -> Result<Vec<u16>, CudaError> {
        match self {
            States::Device(buffer) => buffer.to_host(buffer.bytes() / 2),
            States::Host(values) => Ok(values.clone()),
        }
    }

    /// Moved to host memory.
    pub fn to_host(self) -> Result<States, CudaError> {
        match self {
            States::Device(buffer) => Ok(States::Host(buffer.to_host(buffer.bytes() / 2)?)),
            host => Ok(host),
        }
    }
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
    /// A head `[vocab, norm.width()]` of `dtype` whose weight is there already; logits `x` become
    /// `cap * tanh(x / cap)` where there is a `soft_cap`.
    pub fn new(
        gpu: &Arc<Gpu>,
        weight: Buffer,
        dtype: Dtype,
        norm: DeviceNorm,
        soft_cap: Option<f32>,
    ) -> Result<Self, CudaError> {
        Ok(DeviceHead {
            gpu: gpu.clone(),
            vocab: weight.bytes() / 2 / norm.width(),
            weight,
            norm,
            soft_cap,
            dtype,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    fn matrix<'a>(&self, buffer: &'a Buffer, rows: usize) -> DeviceMatrix<'a> {
        buffer.matrix([rows, self.norm.width()], self.dtype)
    }

    /// f32 logits of rows `ids` of `states`, at the start of `out`.
    fn logits(
        &self,
        out: &Buffer,
        states: &Buffer,
        ids: DeviceSlice<'_, u32>,
    ) -> Result<(), CudaError> {
        let (count, width) = (ids.len(), self.norm.width());
        let x = self.gpu.scratch("rows of the head", count * width * 2)?;
        let own = self.matrix(&x, count);
        let all = self.matrix(states, states.bytes() / 2 / width);
        self.gpu.look_up(own, all, ids, 1.0)?;
        self.gpu.norm(own, own, &self.norm)?;
        let head = self.matrix(&self.weight, self.vocab);
        let out = out.matrix([count, self.vocab], Dtype::F32);
        self.gpu.project(out, own, head)?;
        match self.soft_cap {
            Some(cap) => self.gpu.soft_cap(out, cap),
            None => Ok(()),
        }
    }

    /// Row `row` of `states` for the token that follows it, for all `(row, target)`; `reference`
    /// is another model with the same vocabulary and its states of the same tokens.
    pub fn score(
        &self,
        states: &States,
        targets: &[(usize, u32)],
        reference: Option<(&DeviceHead, &States)>,
    ) -> Result<Vec<RowScore>, CudaError> {
        let gpu = &self.gpu;
        let rows = states.elements() / self.norm.width();
        let inside = |&(row, token): &(usize, u32)| row < rows && (token as usize) < self.vocab;
        assert!(
            targets.iter().all(inside),
            "rows of the states, tokens of the vocabulary"
        );
        if let Some((other, states)) = reference {
            assert_eq!(other.vocab, self.vocab, "vocabulary of the reference");
            assert_eq!(
                states.elements() / other.norm.width(),
                rows,
                "rows of the reference"
            );
        }
        let step = (LOGIT_BYTES / (4 * self.vocab)).clamp(1, targets.len().max(1));
        let q = gpu.scratch("logits", step * self.vocab * 4)?;
        let p = match reference {
            Some((other, _)) => Some(gpu.scratch("reference logits", step * other.vocab * 4)?),
            None => None,
        };
        let (mut own, mut others) = (None, None);
        let own = there(gpu, states, &mut own)?;
        let reference = match reference {
            Some((other, states)) => Some((other, there(gpu, states, &mut others)?)),
            None => None,
        };
        let mut scores = Vec::with_capacity(targets.len());
        for targets in targets.chunks(step) {
            let (rows, tokens): (Vec<u32>, Vec<u32>) =
                (targets.iter().map(|&(row, token)| (row as u32, token))).unzip();
            let rows = Buffer::from_host(gpu, &rows)?;
            let rows = rows.slice(targets.len());
            self.logits(&q, own, rows)?;
            if let (Some((other, states)), Some(p)) = (reference, &p) {
                other.logits(p, states, rows)?;
            }
            let out = Buffer::new(gpu, targets.len() * 24)?;
            let tokens = Buffer::from_host(gpu, &tokens)?;
            let args = [
                (&out).into(),
                q.address().into(),
                p.as_ref().map_or(0, |p| p.address()).into(),
                (&tokens).into(),
                (self.vocab as i32).into(),
            ];
            let program = decoder::program(self.dtype);
            let grid = [targets.len(), 1, 1];
            // SAFETY: a row of logits for each target; targets lie in the vocabulary.
            unsafe { gpu.launch(program, "score", grid, [256, 1, 1], 0, &args)? };
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

/// States on the GPU, in `copy` where they have to be brought there.
fn there<'a>(
    gpu: &Arc<Gpu>,
    states: &'a States,
    copy: &'a mut Option<Buffer>,
) -> Result<&'a Buffer, CudaError> {
    match states {
        States::Device(buffer) => Ok(buffer),
        States::Host(values) => Ok(copy.insert(Buffer::from_host(gpu, values)?)),
    }
}
