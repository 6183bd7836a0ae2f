//! Who answers: whoever has the store open.

use std::sync::Arc;

use alloy::primitives::Address;
use tokio::sync::mpsc;
use tracing::info;

use super::rows::{EscrowRow, Imported, RegistryRow, SnapshotRow};
use super::{IMPORTED_AT_ONCE, PAGE, Refusal, Replies, Request};
use crate::config::Config;
use crate::event::{BlockRange, Signatures};
use crate::permit::Permit;
use crate::publish::Order;
use crate::rpc::Rpc;
use crate::snapshot::{Folder, Listed, Snapshots};
use crate::status::{Observer, Status};
use crate::store::{Store, StoreError, on_disk};

/// What it takes to answer: a store, and the means to ask the chain.
pub struct Desk {
    pub(super) config: Config,
    pub(super) signatures: Arc<Signatures>,
    pub(super) store: Arc<Store>,
    pub(super) rpc: Arc<Rpc>,
    /// Where snapshots go.
    snapshots: Option<Arc<Snapshots<Folder>>>,
    /// While it holds something may be published from here.
    pub(super) permit: Arc<Permit>,
    company: Company,
}

/// Whose store it is.
enum Company {
    /// No relayer's that runs.
    Nobody,
    /// That of a relayer at work.
    Relaying { orders: mpsc::Sender<Order>, observer: Arc<Observer> },
    /// That of one that waits for the lease: another instance may be at work.
    Standby { observer: Arc<Observer> },
}

impl Desk {
    /// Of a running relayer, whose publisher takes these orders.
    pub fn beside(
        config: Config,
        signatures: Arc<Signatures>,
        store: Arc<Store>,
        rpc: Arc<Rpc>,
        orders: mpsc::Sender<Order>,
        observer: Arc<Observer>,
    ) -> Self {
        Self::of(config, signatures, store, rpc, Company::Relaying { orders, observer })
    }

    /// Of a relayer that waits for the lease, and will go on from this store: one can look.
    pub fn standing_by(
        config: Config,
        signatures: Arc<Signatures>,
        store: Arc<Store>,
        rpc: Arc<Rpc>,
        observer: Arc<Observer>,
    ) -> Self {
        Self::of(config, signatures, store, rpc, Company::Standby { observer })
    }

    fn of(
        config: Config,
        signatures: Arc<Signatures>,
        store: Arc<Store>,
        rpc: Arc<Rpc>,
        company: Company,
    ) -> Self {
        let permit = Arc::new(Permit::forever());
        Self { config, signatures, store, rpc, snapshots: None, permit, company }
    }

    /// Makes snapshots there, when asked to.
    pub fn with_snapshots(self, snapshots: &Arc<Snapshots<Folder>>) -> Self {
        Self { snapshots: Some(Arc::clone(snapshots)), ..self }
    }

    /// Publishes only while that permit holds, and makes snapshots there, when asked to.
    pub fn works_under(&mut self, permit: Arc<Permit>, snapshots: &Arc<Snapshots<Folder>>) {
        (self.permit, self.snapshots) = (permit, Some(Arc::clone(snapshots)));
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// On a store that no relayer runs on.
    pub fn alone(
        config: Config,
        signatures: Arc<Signatures>,
        store: Arc<Store>,
    ) -> Result<Self, reqwest::Error> {
        let rpc = Arc::new(Rpc::new(config.chain.id, &config.rpc)?);
        Ok(Self::of(config, signatures, store, rpc, Company::Nobody))
    }

    /// The publisher at work.
    pub(super) fn orders(&self) -> Option<&mpsc::Sender<Order>> {
        match &self.company {
            Company::Relaying { orders, .. } => Some(orders),
            Company::Nobody | Company::Standby { .. } => None,
        }
    }

    /// Whether that may be done here: not beside one that stands by, if it publishes or changes something.
    fn is_permitted(&self, request: &Request) -> Result<(), Refusal> {
        let observer = match &self.company {
            Company::Standby { observer } if request.changes() => observer,
            Company::Standby { .. } | Company::Nobody | Company::Relaying { .. } => return Ok(()),
        };
        Err(Refusal::fault(match observer.vitals().now_known().lease_holder {
            Some(holder) => format!(
                "the relayer here stands by, as another instance holds the lease in storage.snapshot_dir ({holder}): if that is a \
                 relayer, run it there, beside it, or stop both first; if it is a command, try again when that has ended"
            ),
            None => "the relayer here is starting: try again in a moment".to_owned(),
        }))
    }

    /// Answers one request. Dropped in the middle, it leaves nothing half done.
    pub(super) async fn answer(&self, request: Request, to: &Replies) -> Result<(), Refusal> {
        self.is_permitted(&request)?;
        match request {
            Request::Status => self.status(to).await,
            Request::Escrows => self.escrows(to).await,
            Request::Import { escrows, from } => self.import(escrows, from, to).await,
            Request::Discover { from, to: last } => self.discover(from, last, to).await,
            Request::Outbox { limit } => self.outbox(limit, to).await,
            Request::Show { event_ids } => self.show(&event_ids, to).await,
            Request::Discard { event_ids } => self.discard(&event_ids, to).await,
            Request::Retry { which } => self.retry(&which, to).await,
            Request::Replay { from, to: last, escrow } => self.replay(range(from, last)?, escrow, to).await,
            Request::Snapshot => self.snapshot(to).await,
            Request::Verify { from, to: last } => self.verify(range(from, last)?, to).await,
        }
    }

    pub(super) async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Refusal> {
        Ok(on_disk(&self.store, work).await?)
    }

    async fn status(&self, to: &Replies) -> Result<(), Refusal> {
        let status = match &self.company {
            Company::Relaying { observer, .. } => {
                let observer = Arc::clone(observer);
                self.on_disk(move |_| observer.status()).await?
            }
            Company::Standby { observer } => {
                let observer = Arc::clone(observer);
                self.on_disk(move |store| observer.standby_status(store)).await?
            }
            Company::Nobody => self.on_disk(Status::of_store).await?,
        };
        to.row(&status).await
    }

    async fn escrows(&self, to: &Replies) -> Result<(), Refusal> {
        let mut after = None;
        loop {
            let page = self.on_disk(move |store| store.escrows_after(after, PAGE)).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            for (address, escrow) in &page {
                to.row(&RegistryRow::Escrow(EscrowRow::new(*address, escrow))).await?;
            }
        }
        let (next_block, reads_late) = (self.store.next_block(), self.store.late_read().is_some());
        to.row(&RegistryRow::Store { next_block, reads_late }).await
    }

    async fn import(&self, escrows: Vec<Address>, from: u64, to: &Replies) -> Result<(), Refusal> {
        if escrows.len() > IMPORTED_AT_ONCE {
            return Err(Refusal::usage(format!("at most {IMPORTED_AT_ONCE} escrows are imported at once")));
        }
        let factory = self.store.identity().factory;
        if escrows.contains(&factory) {
            let why = format!("{factory:#x} is factory.address, not an escrow: take it out of the file");
            return Err(Refusal::usage(why));
        }
        let next_block = self.store.next_block();
        let too_far = Refusal::usage(format!(
            "--from {from}: the store has not got there, its next block is {next_block}; give at most that"
        ));
        if from > next_block {
            return Err(too_far);
        }
        let running = self.orders().is_some();
        let imported = self
            .on_disk(move |store| match running {
                true => store.import_beside(&escrows, from),
                false => store.import(&escrows, from).map(Some),
            })
            .await?
            .ok_or(too_far)?;
        let (new, known) = (imported.new, imported.known);
        info!(new, known, from, "Imported {new} escrows, whose events count from block {from} on");
        to.row(&Imported { new, known, next_block, running }).await
    }

    async fn snapshot(&self, to: &Replies) -> Result<(), Refusal> {
        let no_folder = "storage.snapshot_dir is not set: set it to a folder for snapshots, and start the relayer with it";
        let snapshots = self.snapshots.as_ref().ok_or_else(|| Refusal::usage(no_folder))?;
        let (snapshots, store) = (Arc::clone(snapshots), Arc::clone(&self.store));
        let made = tokio::task::spawn_blocking(move || snapshots.create(&store, None));
        let refuse = |why: String| Refusal::fault(format!("no snapshot was made: {why}"));
        let made = made.await.map_err(|error| refuse(error.to_string()))?;
        let manifest = made.map_err(|error| refuse(error.to_string()))?;
        to.row(&SnapshotRow::from(&Listed { file: manifest.file(), manifest: Ok(manifest) })).await
    }
}

fn range(from: u64, to: u64) -> Result<BlockRange, Refusal> {
    let empty = || Refusal::usage(format!("--from {from} --to {to}: the first block comes after the last"));
    BlockRange::new(from, to).ok_or_else(empty)
}
