//! What the relayer tells of itself: logs, metrics, and the HTTP pages that show them.

mod http;
mod logs;
pub mod metrics;

pub use http::{Pages, serve};
pub use logs::{end_progress_bar, init_logs, progress_bar};
