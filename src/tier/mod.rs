//! Weights on disk: one scratch file, read and written past the page cache, many requests at a time.
//!
//! | module | holds |
//! | --- | --- |
//! | `store` | the scratch file: made without a name, preallocated, grown |
//! | `queue` | operations in flight: io_uring, or threads where the kernel refuses it |
//! | `worker` | a thread that splits requests into chunks, in order where they overlap |
//! | `engine` | requests: checked, handed over, waited for |

mod engine;
mod queue;
mod store;
mod worker;

pub use engine::{Counters, Engine, Memory, Options};
pub use queue::Backend;

/// What offsets, lengths and addresses are multiples of: direct transfers go past the page cache in whole blocks.
pub const ALIGNMENT: usize = 4096;
