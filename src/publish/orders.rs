//! What an operator asks of a publisher at work: to offer refused messages again, to give one up, to send again what was
//! acknowledged. All of it goes through the lanes, so that it neither overtakes nor counts apart.

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tracing::info;

use super::lane::{Item, LaneId};
use super::{Message, PublishError, Publisher, Sink};
use crate::store::{Claimed, on_disk};

/// How many orders may wait to be looked at.
pub const ORDERS: usize = 16;

/// One order. Whoever gave it is told what came of it; nobody is waited for who is not there any more.
#[derive(Debug)]
pub enum Order {
    /// Offers messages that are refused again now, instead of after their pause.
    Retry {
        /// Which, by position; all of them if none is named.
        only: Option<Vec<u64>>,
        /// How many these are.
        told: oneshot::Sender<usize>,
    },
    /// Gives up a message that is refused, so that its lane goes on.
    GiveUp {
        /// Which.
        position: u64,
        /// Whether it was refused, and is done now.
        told: oneshot::Sender<bool>,
    },
    /// Sends entries again that were acknowledged.
    Replay {
        /// In log order.
        entries: Vec<Claimed>,
        /// What becomes of each.
        told: mpsc::UnboundedSender<Replayed>,
    },
}

/// What became of a message that was sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replayed {
    /// The sink has it once more.
    Acknowledged,
    /// It was not sent, or not taken: its position, and why.
    Left(u64, String),
}

/// A message that is sent again, and who wants to know.
#[derive(Debug)]
pub(super) struct Replaying(mpsc::UnboundedSender<Replayed>);

impl Replaying {
    pub fn acknowledged(self) {
        let _ = self.0.send(Replayed::Acknowledged);
    }

    pub fn left(self, position: u64, why: &str) {
        let _ = self.0.send(Replayed::Left(position, why.to_owned()));
    }
}

impl<S: Sink> Publisher<S> {
    /// Takes orders from now on.
    pub fn taking(mut self, orders: mpsc::Receiver<Order>) -> Self {
        self.orders = Some(orders);
        self
    }

    /// Publishes nothing of its own accord: only what it is ordered to send again.
    pub fn only_ordered(mut self) -> Self {
        self.only_ordered = true;
        self
    }

    /// The next order; pends for ever when nobody can give one.
    pub(super) async fn next_order(orders: &mut Option<mpsc::Receiver<Order>>) -> Order {
        match orders {
            Some(receiver) => match receiver.recv().await {
                Some(order) => order,
                None => {
                    *orders = None;
                    std::future::pending().await
                }
            },
            None => std::future::pending().await,
        }
    }

    /// Does what can be done of the orders by now. What cannot waits: for room, or for the lane to rest.
    pub(super) async fn obey(&mut self) -> Result<(), PublishError> {
        while let Some(receiver) = &mut self.orders {
            match receiver.try_recv() {
                Ok(order) => self.pending.push_back(order),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.orders = None,
            }
        }
        for order in std::mem::take(&mut self.pending) {
            match order {
                Order::Retry { only, told } => {
                    let _ = told.send(self.retry(only.as_deref()));
                }
                Order::GiveUp { position, told } => match self.give_up(position).await? {
                    Some(done) => drop(told.send(done)),
                    None => self.pending.push_back(Order::GiveUp { position, told }),
                },
                Order::Replay { entries, told } if self.has_room() => self.replay(entries, &told),
                waiting @ Order::Replay { .. } => self.pending.push_back(waiting),
            }
        }
        Ok(())
    }

    fn retry(&mut self, only: Option<&[u64]>) -> usize {
        let wanted = |front: u64| only.is_none_or(|positions| positions.contains(&front));
        let wanted = |id: &LaneId| self.lanes[id].front().is_some_and(wanted);
        let ids: Vec<LaneId> = self.blocked.iter().copied().filter(wanted).collect();
        for id in &ids {
            self.go_on(*id);
        }
        ids.len()
    }

    /// Ends the lane's pause, if it has one.
    fn go_on(&mut self, id: LaneId) {
        self.retries.retain(|(_, waiting)| *waiting != id);
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        if lane.resting_front().is_none() && lane.len() > 0 {
            // It is under way: what comes of it decides.
            return;
        }
        match lane.rest() {
            Some(front) => drop(self.ready.insert((front, id))),
            None => drop(self.lanes.remove(&id)),
        }
    }

    /// `None`: it is under way just now.
    async fn give_up(&mut self, position: u64) -> Result<Option<bool>, PublishError> {
        let of_it = |id: &&LaneId| self.lanes[*id].front() == Some(position);
        let Some(id) = self.blocked.iter().find(of_it).copied() else {
            return Ok(Some(false));
        };
        if self.lanes[&id].resting_front().is_none() {
            return Ok(None);
        }
        // In the store first: should the process end in between, the lane is gone as well.
        if !on_disk(&self.store, move |store| store.give_up(position)).await? {
            return Ok(Some(false));
        }
        let lane = self.lanes.get_mut(&id).expect("just found");
        self.ready.remove(&(position, id));
        let (_, was_outstanding) = lane.give_up_front();
        self.blocked.remove(&id);
        self.held -= 1;
        self.outstanding -= usize::from(was_outstanding);
        self.vitals.lane_unblocked(&id.to_string());
        info!(lane = %id, "Lane unblocked: its message was given up");
        self.go_on(id);
        self.measure();
        Ok(Some(true))
    }

    fn replay(&mut self, entries: Vec<Claimed>, told: &mpsc::UnboundedSender<Replayed>) {
        for Claimed { position, entry } in entries {
            let replaying = Replaying(told.clone());
            let id = LaneId::of(&entry, self.ordering, self.sink.is_sequential());
            // Behind what is refused it might wait for ever.
            if let Some(reason) = self.lanes.get(&id).and_then(|lane| lane.blocked()) {
                replaying.left(position, &blocked(reason));
                continue;
            }
            let mut message = Message::of(entry, self.store.identity().chain_id, self.ordering);
            message.attributes.push(("replay", "true".to_owned()));
            self.enqueue(
                id,
                Item { position, message: std::sync::Arc::new(message), replaying: Some(replaying) },
            );
        }
    }

    /// A message that is only sent again is refused: that is told, and holds up nobody. `true`: it was one.
    pub(super) fn leave_refused(&mut self, id: LaneId, reason: &str) -> bool {
        let lane = self.lanes.get_mut(&id).expect("a lane that was refused exists");
        if lane.resting_front().is_none_or(|item| item.replaying.is_none()) {
            return false;
        }
        let (item, was_outstanding) = lane.give_up_front();
        self.held -= 1;
        self.outstanding -= usize::from(was_outstanding);
        if let Some(Item { position, replaying: Some(replaying), .. }) = item {
            replaying.left(position, &format!("refused: {reason}"));
        }
        true
    }

    /// The lane is blocked: what is only sent again does not wait behind it.
    pub(super) fn leave_replays(&mut self, id: LaneId, reason: &str) {
        let lane = self.lanes.get_mut(&id).expect("a lane that is blocked exists");
        let (replays, stored) = lane.take_replays();
        self.held -= replays.len();
        self.outstanding -= stored;
        for item in replays {
            if let Some(replaying) = item.replaying {
                replaying.left(item.position, &blocked(reason));
            }
        }
    }

    /// Waits for entries to be appended, or for an order.
    pub async fn woken(&mut self) {
        tokio::select! {
            changed = self.appended.changed(), if !self.only_ordered => changed.expect("the store outlives its publisher"),
            order = Self::next_order(&mut self.orders) => self.pending.push_back(order),
        }
    }

    /// At the end of its lane.
    pub(super) fn enqueue(&mut self, id: LaneId, item: Item) {
        let lane = self.lanes.entry(id).or_default();
        lane.push(item);
        self.held += 1;
        if lane.is_resting() {
            self.ready.insert((lane.front().expect("just pushed"), id));
        }
    }
}

fn blocked(reason: &str) -> String {
    format!("its lane is blocked: {reason}")
}
