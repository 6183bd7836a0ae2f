//! Life on the chain while a test breaks things.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{Chain, Contract};

/// Numbers that look random and are the same in every run. From Numerical Recipes.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Escrows made, approved and released until told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    task: JoinHandle<usize>,
}

impl Load {
    pub fn start(chain: &Chain, factory: &Contract) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, factory, chain) = (Arc::clone(&stop), factory.clone(), chain.clone());
        let task = tokio::spawn(async move {
            let (mut escrows, mut dice, mut rounds) = (factory.create_many(3).await, Dice(7), 0);
            while !stopped.load(Ordering::Relaxed) {
                let escrow = escrows[dice.below(escrows.len() as u64) as usize].clone();
                match dice.below(4) {
                    0 => escrows.push(factory.create_escrow().await),
                    1 => escrows.push(factory.create_by("createApproveRelease").await.0),
                    2 => drop(factory.send("approveMany", &[escrow.address.into(), 5u64.into()]).await),
                    _ => drop(escrow.send("approve", &[]).await),
                }
                chain.mine(dice.below(2)).await;
                tokio::time::sleep(Duration::from_millis(dice.below(30))).await;
                rounds += 1;
            }
            rounds
        });
        Load { stop, task }
    }

    /// How many rounds there were.
    pub async fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the load does not fail")
    }
}
