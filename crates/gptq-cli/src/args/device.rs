//! Where to compute, and sizes in bytes.

use std::str::FromStr;

use clap::Args;

use super::size::parse_size;

/// Where to compute.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// `auto` takes the first GPU if there is one and says what it took; `cpu`; `cuda:N`
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// GPU memory that the run may take; activations beyond it wait in host memory
    #[arg(long, default_value = "10GB", value_name = "SIZE", value_parser = parse_size)]
    pub gpu_memory: usize,
}

/// Where to keep all weights.
#[derive(Args, Clone)]
pub struct WholeDeviceArgs {
    /// `auto` takes the first GPU if there is one and says what it took; `cpu`; `cuda:N`
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(DeviceArg::Auto),
            "cpu" => Ok(DeviceArg::Cpu),
            "cuda" => Ok(DeviceArg::Cuda(0)),
            _ => (text.strip_prefix("cuda:"))
                .and_then(|ordinal| ordinal.parse().ok())
                .map(DeviceArg::Cuda)
                .ok_or_else(|| "expected auto, cpu or cuda:N".to_string()),
        }
    }
}
