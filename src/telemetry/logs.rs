//! Logs, to stderr: stdout is for data.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex, MutexGuard};

use indicatif::ProgressBar;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogFormat;
use crate::vitals::Vitals;

/// What is logged where `RUST_LOG` is not set: what we say, and what worries a library.
const DEFAULT_FILTER: &str = "warn,relayer=info";

/// Libraries that see RPC URLs, by the beginning of their names. At debug they log them.
const SEE_URLS: [&str; 7] = ["alloy", "reqwest", "hyper", "h2", "tower", "tungstenite", "tokio_tungstenite"];

/// Sends log lines to stderr from now on, filtered by `RUST_LOG`; our warnings and errors are told to `vitals`, too. A second
/// call changes nothing.
pub fn init_logs(format: LogFormat, vitals: &Arc<Vitals>) {
    let terminal = io::stderr().is_terminal();
    let look = match format {
        LogFormat::Text => Look::Text { ansi: terminal },
        LogFormat::Json => Look::Json,
        LogFormat::Auto if terminal => Look::Text { ansi: true },
        LogFormat::Auto => Look::Json,
    };
    let filter = std::env::var("RUST_LOG").unwrap_or_default();
    // It fails only if a test or an embedding program has already set one.
    let _ = subscriber(look, &filter, || AboveTheBar).with(Faults(Arc::clone(vitals))).try_init();
}

/// The bar at the bottom of the terminal, if there is one.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn bar() -> MutexGuard<'static, Option<ProgressBar>> {
    BAR.lock().expect("no code that panics runs under this lock")
}

/// A bar on standard error, below the log lines. `None`: it is no terminal, or events are printed to one, too.
pub fn progress_bar(events_are_printed: bool) -> Option<ProgressBar> {
    if !io::stderr().is_terminal() || events_are_printed && io::stdout().is_terminal() {
        return None;
    }
    Some(bar().insert(ProgressBar::new(0)).clone())
}

/// Leaves the bar as it is, and the terminal to what comes after it.
pub fn end_progress_bar() {
    if let Some(bar) = bar().take() {
        bar.abandon();
    }
}

/// Standard error, without tearing the bar.
struct AboveTheBar;

impl io::Write for AboveTheBar {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &*bar() {
            Some(bar) => bar.suspend(|| io::stderr().write(line)),
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Keeps what we warn of. A fault is logged once when it begins, without secrets: that is what a status shows. What `RUST_LOG`
/// keeps from the log it keeps from there, too.
struct Faults(Arc<Vitals>);

impl<S: Subscriber> Layer<S> for Faults {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN || !metadata.target().starts_with("relayer") {
            return;
        }
        let mut said = Said::default();
        event.record(&mut said);
        let text = match said.why {
            Some(why) if !said.message.contains(&why) => format!("{} ({why})", said.message),
            Some(_) | None => said.message,
        };
        self.0.fault(*metadata.level() == Level::ERROR, &text);
    }
}

/// What a log line says, and why.
#[derive(Default)]
struct Said {
    message: String,
    why: Option<String>,
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "reason" | "error" => self.why = Some(format!("{value:?}")),
            _ => {}
        }
    }
}

enum Look {
    Text { ansi: bool },
    Json,
}

fn subscriber<W>(look: Look, filter: &str, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = match filter.trim() {
        "" => EnvFilter::new(DEFAULT_FILTER),
        filter => EnvFilter::builder().parse_lossy(filter),
    };
    let registry = tracing_subscriber::registry().with(filter).with(cap());
    match look {
        Look::Text { ansi } => {
            let layer = tracing_subscriber::fmt::layer();
            Box::new(registry.with(layer.with_ansi(ansi).with_writer(writer)))
        }
        Look::Json => {
            // The names Cloud Logging knows: cloud.google.com/logging/docs/structured-logging.
            let mut layer = json_subscriber::JsonLayer::new(writer);
            layer.with_timer("time", SystemTime);
            layer.add_dynamic_field("severity", |event, _| Some(severity(*event.metadata().level())));
            layer.with_target("target");
            layer.with_flattened_event();
            Box::new(registry.with(layer))
        }
    }
}

fn severity(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        _ => "DEBUG",
    }
}

/// What no `RUST_LOG` can lift: RPC URLs hold keys, so whoever sees them may only warn, and a library nobody
/// looked at may not say more than info.
fn cap() -> Targets {
    let cap = Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target("relayer", LevelFilter::TRACE)
        .with_target("google_cloud", LevelFilter::TRACE);
    SEE_URLS.iter().fold(cap, |cap, &library| cap.with_target(library, LevelFilter::WARN))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(look: Look, filter: &str, say: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(look, filter, move || writer.clone());
        tracing::subscriber::with_default(subscriber, say);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_are_what_cloud_logging_reads() {
        let text = logged(Look::Json, "trace", || {
            tracing::trace!(target: "relayer", "t");
            tracing::debug!(target: "relayer", "d");
            tracing::info!(target: "relayer", blocks = 5_u64, from = %"x", "Processing blocks 1 to 5");
            tracing::warn!(target: "relayer", "w");
            tracing::error!(target: "relayer", "e");
        });
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let severities: Vec<_> = lines.iter().map(|line| &line["severity"]).collect();
        assert_eq!(severities, ["DEBUG", "DEBUG", "INFO", "WARNING", "ERROR"]);

        let line = &lines[2];
        assert_eq!(line["message"], "Processing blocks 1 to 5");
        assert_eq!(line["blocks"], 5);
        assert_eq!(line["from"], "x");
        let time = line["time"].as_str().unwrap();
        assert!(time.contains('T') && time.ends_with('Z'), "{time}");
    }

    #[test]
    fn text_has_no_colours_unless_asked() {
        let say = || tracing::info!(target: "relayer", blocks = 5, "hello");
        let plain = logged(Look::Text { ansi: false }, "", say);
        assert!(plain.contains("hello blocks=5"), "{plain}");
        assert!(!plain.contains('\u{1b}'), "{plain}");
        assert!(logged(Look::Text { ansi: true }, "", say).contains('\u{1b}'));
    }

    #[test]
    fn by_default_we_inform_and_libraries_warn() {
        let text = logged(Look::Json, "", || {
            tracing::info!(target: "relayer::scan", "ours");
            tracing::debug!(target: "relayer::scan", "too much");
            tracing::info!(target: "google_cloud_pubsub", "too much");
            tracing::info!(target: "redb", "too much");
            tracing::warn!(target: "google_cloud_pubsub", "worry");
        });
        assert!(text.contains("ours") && text.contains("worry"), "{text}");
        assert!(!text.contains("too much"), "{text}");
    }

    #[test]
    fn no_rust_log_makes_a_library_log_an_rpc_url() {
        let say = || {
            let url = "https://rpc.example/v2/KEY";
            let span = tracing::debug_span!(target: "alloy_transport_http::reqwest_transport", "ReqwestTransport", url);
            let _entered = span.entered();
            tracing::debug!(target: "alloy_transport_http::reqwest_transport", url);
            tracing::info!(target: "alloy_rpc_client::call", url);
            tracing::debug!(target: "reqwest::connect", url);
            tracing::trace!(target: "hyper_util::client::legacy", url);
            tracing::trace!(target: "h2::codec", url);
            tracing::trace!(target: "tungstenite::handshake::client", url);
            tracing::debug!(target: "some_library", url);
            tracing::info!(target: "relayer::rpc", "inside the span");
            tracing::debug!(target: "google_cloud_pubsub", "detail");
            tracing::warn!(target: "alloy_transport_ws", "worry");
        };
        for filter in ["trace", "debug,alloy_transport_http=trace", "reqwest=trace,hyper_util=trace,trace"] {
            for look in [Look::Json, Look::Text { ansi: false }] {
                let text = logged(look, filter, say);
                assert!(!text.contains("KEY"), "{filter}: {text}");
                for kept in ["inside the span", "detail", "worry"] {
                    assert!(text.contains(kept), "{filter}: {kept}: {text}");
                }
            }
        }
    }
}
