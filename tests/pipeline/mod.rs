//! Files that a run leaves on disk, and their quality.

mod architectures;
mod branches;
mod divergence;
mod evaluation;
mod families;
mod generated;
mod gpu;
mod matrix;
mod memory;
mod orders;
mod published;
mod quality;
mod regress;
mod repository;
mod resume;
mod runners;
mod same_bytes;
mod synthetic;
mod tasks;
mod texts;
mod witness;
