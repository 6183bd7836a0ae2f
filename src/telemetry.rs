//! What the relayer tells of itself: logs, metrics, and the HTTP pages that show them.

mod http;
mod logs;
pub mod metrics;

pub use http::{Pages, serve};
pub use logs::init_logs;
