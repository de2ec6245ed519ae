//! End-to-end tests of the command, one binary for all of them.
//!
//! Where a new test goes: what is typed and how it is answered, in `cli`; what a run leaves on disk
//! and what it is worth, in `pipeline`; what the sources themselves must keep, in `rules`. A bug
//! that was once released gets a test with its story in the module that it belongs to. Models,
//! texts and the command itself come from `support`.
#![allow(clippy::print_stderr)]

mod cli;
mod pipeline;
mod rules;
mod support;
