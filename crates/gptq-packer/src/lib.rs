//! Bytes: the GPTQ file format, written and read.
//!
//! Knows: bit order and word layout of `qweight` and `qzeros` ([`pack()`], [`unpack()`]), the zero
//! conventions v1 and v2, safetensors headers and shards ([`SafetensorsFile`],
//! [`CheckpointLayout`]), the configs that other tools write and expect ([`QuantizeConfig`],
//! [`quantize_config_json`]) and how they name what stays float ([`exclusions()`]), how a checkpoint comes into being without ever being half there
//! ([`StagedCheckpoint`]), and how to prove that a file holds what the solver chose
//! ([`verify_layer`]), and which runtimes load it ([`readings`]). `docs/FORMAT.md` draws the format
//! once.
//!
//! Does not know: how codes are chosen, what a model is, where a checkpoint comes from, the
//! network, Burn. Nothing is printed and nothing is memory-mapped: a file cut short under a map
//! kills the process, and mapped pages count as resident memory.

#[cfg(target_endian = "big")]
compile_error!("checkpoints are little-endian and are read without swapping bytes");

mod checkpoint;
mod config;
mod config_keys;
mod durable;
mod emit;
mod exclusions;
mod folder_check;
mod header;
mod layout;
mod lock;
mod pack;
mod place;
mod readers;
mod safetensors_file;
mod shard_digests;
mod shard_files;
mod stage;
mod unpack;
mod verify;
mod words;

pub use checkpoint::{
    ReadError, ZeroConvention, check_layer, packed_layers, read_layer, zero_convention,
};
pub use config::{ConfigError, QuantizeConfig, declared_settings};
pub use emit::{DeclaredType, config_json_with_quantization, quantize_config_json};
pub use exclusions::{exclusion_patterns, exclusions};
pub use folder_check::{FolderCheckError, FolderVerdict, check_files, hash_file};
pub use header::{HeaderError, MAX_HEADER_BYTES};
pub use layout::{
    CheckpointLayout, LayoutError, PACKED_SUFFIXES, Placement, Shard, packed_tensors,
};
pub use lock::{FolderLock, LockError};
pub use pack::{PackError, PackedLayer, pack};
pub use place::{ClaimedPlace, discard_partial, partial_path};
pub use readers::{GPTQMODEL_GROUPS, readings};
pub use safetensors_file::{SafetensorsError, SafetensorsFile, write_safetensors};
pub use stage::{StageError, StagedCheckpoint};
pub use unpack::unpack;
pub use verify::{VerifyError, verify_layer};
