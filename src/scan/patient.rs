//! A chain that may take its time: whoever waits for its answers does not hang.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::watch;

use super::{Answer, Call, Chain, Refused};
use crate::event::Header;
use crate::vitals::{Loop, Vitals};

/// A chain for the loop that scans. Its answers may be late for hours, in an outage or at a rate limit; that is waited
/// out below, with attempts that are bounded, so the loop counts as turning meanwhile.
pub struct Patient<C> {
    chain: Arc<C>,
    vitals: Arc<Vitals>,
}

impl<C> Patient<C> {
    /// The same chain, saying so while it is waited for.
    pub fn new(chain: Arc<C>, vitals: Arc<Vitals>) -> Self {
        Self { chain, vitals }
    }

    fn wait<T>(&self, answers: impl Future<Output = T>) -> impl Future<Output = T> {
        self.vitals.while_waiting(Loop::Scan, answers)
    }
}

impl<C: Chain> Chain for Patient<C> {
    async fn ask(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        self.wait(self.chain.ask(calls)).await
    }

    async fn ask_another(&self, calls: Vec<Call>) -> Option<Result<Vec<Answer>, Refused>> {
        self.wait(self.chain.ask_another(calls)).await
    }

    async fn ask_ahead(&self, calls: Vec<Call>) -> Option<Vec<Answer>> {
        self.wait(self.chain.ask_ahead(calls)).await
    }

    async fn ask_once(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        self.wait(self.chain.ask_once(calls)).await
    }

    fn heads(&self) -> Option<watch::Receiver<Option<Header>>> {
        self.chain.heads()
    }

    fn heads_are_missing(&self) {
        self.chain.heads_are_missing();
    }

    fn turn_away(&self) {
        self.chain.turn_away();
    }
}
