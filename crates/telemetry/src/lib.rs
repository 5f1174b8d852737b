//! What the system says about itself: metrics, logs, and the trace identity that ties log lines together.
//!
//! Never here: a label whose set of values a client can grow; a log line that a metric would tell better;
//! a global that a test cannot replace, except the one log subscriber that a process has.

pub mod logs;
pub mod metrics;
pub mod spans;
pub mod trace;

pub use metrics::{HttpMetrics, PubsubMetrics, Registry};
pub use spans::Spans;
pub use trace::TraceContext;
