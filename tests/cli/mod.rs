//! Tests of the command line: arguments, output, errors.

mod bad_input;
mod bad_model;
mod brought;
mod calibration;
mod device;
mod effect;
mod files;
mod forecast;
mod full_disk;
mod generate;
mod help;
mod multimodal;
mod report;
mod streams;
mod target;
mod templates;
mod window_bos;
