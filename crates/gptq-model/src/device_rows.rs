//! Final hidden states that a GPU scores.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, CudaError, DeviceHead, DeviceMatrix, Gpu, RowScore, States};
use gptq_types::Dtype;

use crate::ModelError;
use crate::cuda::device_norm;
use crate::head::HostHead;
use crate::score::{HeadRows, TokenScore};
use crate::weights::to_f32;

/// The head on the GPU, and the one in f32 for those who ask for logits.
#[derive(Clone)]
pub(crate) struct ScoringHead {
    device: Arc<DeviceHead>,
    host: Arc<HostHead>,
    dtype: Dtype,
}

/// Hidden states before the final norm; the GPU norms what it scores.
pub(crate) struct DeviceRows {
    head: ScoringHead,
    states: States,
}

impl ScoringHead {
    pub fn new(
        gpu: &Arc<Gpu>,
        weight: Buffer,
        dtype: Dtype,
        host: HostHead,
    ) -> Result<Self, ModelError> {
        let norm = &host.norm;
        let norm = device_norm(gpu, norm.kind, &norm.weight, norm.bias.as_deref(), norm.eps)?;
        let device = DeviceHead::new(gpu, weight, dtype, norm, host.soft_cap)?;
        Ok(ScoringHead {
            #[allow(clippy::arc_with_non_send_sync)]
            device: Arc::new(device),
            host: Arc::new(host),
            dtype,
        })
    }

    pub fn rows(&self, hidden: DeviceMatrix<'_>) -> Result<DeviceRows, CudaError> {
        Ok(DeviceRows {
            head: self.clone(),
            states: States::copy_of(self.device.gpu(), hidden)?,
        })
    }
}

impl DeviceRows {
    pub fn kept(self) -> Result<Self, CudaError> {
        let states = self.states.to_host()?;
        Ok(DeviceRows { states, ..self })
    }

    pub fn tokens(&self) -> usize {
        self.states.elements() / self.head.host.width()
    }

    /// Normed and multiplied in f32.
    pub fn to_processor(&self) -> Result<HeadRows, ModelError> {
        let values = self.states.values()?;
        let hidden = to_f32(self.head.dtype, bytemuck::cast_slice(&values));
        Ok(self.head.host.rows(&hidden.expect("states are floats"))?)
    }

    pub fn score(
        &self,
        targets: &[(usize, u32)],
        reference: Option<&DeviceRows>,
    ) -> Result<Vec<TokenScore>, CudaError> {
        let reference = reference.map(|other| (&*other.head.device, &other.states));
        let rows = self.head.device.score(&self.states, targets, reference)?;
        let score = |row: RowScore| TokenScore {
            nll: -row.log_likelihood,
            kl: row.kl,
            top1_agrees: row.top1_agrees,
        };
        Ok(rows.into_iter().map(score).collect())
    }
}
