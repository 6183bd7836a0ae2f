//! What the relayer tells of itself: logs and metrics.

mod logs;
pub mod metrics;

pub use logs::{end_progress_bar, init_logs, progress_bar};
