#![doc = include_str!("ARCHITECTURE.md")]

pub mod adapters;
pub mod checkpoint;
pub mod cli;
pub mod control;
pub mod convert;
pub mod demo;
pub mod device;
pub mod error;
pub mod hub;
pub mod library;
pub mod memory;
pub mod output;
pub mod picture;
pub mod pipeline;
pub mod sampling;
pub mod spec;
pub mod text;
pub mod upscale;
pub mod weights;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use output::Image;
pub use pipeline::{Control, Engine, Event, Plan, Request};
