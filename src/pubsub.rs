//! Where messages go: Google Pub/Sub; and standard output and files, for pipes and for trying things out.

mod google;
mod lines;

use std::sync::Arc;

use thiserror::Error;

pub(crate) use google::topic_name;
pub use google::{GooglePubSub, Topic, find_topic};
pub use lines::Lines;

use crate::config::{self, SinkKind};
use crate::publish::{Message, Receipt, Sink};

/// A sink that cannot be set up as configured.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The client could not be made.
    #[error(
        "the Pub/Sub client cannot be set up: {0}; on Google Cloud attach a service account, elsewhere run `gcloud auth application-default login`, or set PUBSUB_EMULATOR_HOST"
    )]
    PubSub(String),
    /// The file cannot be written.
    #[error("sink.path {path} cannot be written: {source}; give a file in a directory this user may write")]
    File {
        /// As configured.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
}

/// The sink the configuration names.
pub enum ConfiguredSink {
    /// Google Pub/Sub, or an emulator of it.
    PubSub(Box<GooglePubSub>),
    /// Standard output or a file.
    Lines(Lines),
}

impl ConfiguredSink {
    /// Sets up the configured sink. Nothing is sent, and nobody is called yet.
    pub async fn open(config: &config::Sink) -> Result<Self, SetupError> {
        match &config.kind {
            SinkKind::Pubsub { .. } => Ok(Self::PubSub(Box::new(GooglePubSub::open(config).await?))),
            SinkKind::Stdout => Ok(Self::Lines(Lines::stdout())),
            SinkKind::File { path } => match Lines::file(path) {
                Ok(lines) => Ok(Self::Lines(lines)),
                Err(source) => Err(SetupError::File { path: path.display().to_string(), source }),
            },
        }
    }
}

impl Sink for ConfiguredSink {
    async fn publish(&self, run: Vec<Arc<Message>>) -> Receipt {
        match self {
            Self::PubSub(sink) => sink.publish(run).await,
            Self::Lines(sink) => sink.publish(run).await,
        }
    }

    fn is_sequential(&self) -> bool {
        match self {
            Self::PubSub(sink) => sink.is_sequential(),
            Self::Lines(sink) => sink.is_sequential(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::PubSub(sink) => sink.name(),
            Self::Lines(sink) => sink.name(),
        }
    }
}
