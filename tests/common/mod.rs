//! What tests and the demo stand on: a real chain (anvil) with our contracts on it, and a Pub/Sub server in this
//! process.
//!
//! ```ignore
//! let anvil = Anvil::new().spawn().await?;
//! let chain = Chain::connect(anvil.url()).await;
//! let factory = chain.deploy("EscrowFactory", &[]).await;
//! let made = factory.send("createMany", &[100u64.into()]).await;
//!
//! let pubsub = PubSub::start().await;
//! let topic = pubsub.create_topic("projects/test/topics/settlement.events.v1");
//! // … run the relayer against anvil.url(), factory.address and pubsub.endpoint() …
//! pubsub.wait_for(100).await;
//! ```

// Every test that says `mod common;` compiles all of it and uses a part.
#![allow(dead_code, unused_imports)]

pub mod anvil;
pub mod browser;
pub mod chain;
pub mod example;
pub mod fakechain;
pub mod load;
pub mod pubsub;
pub mod relay;
pub mod settlement;
pub mod sink;

pub use anvil::Anvil;
pub use chain::{Chain, Contract, Log, Receipt};
pub use pubsub::{Answer, PubSub};
pub use relay::{Finished, Line, Running, Setup, World};
pub use settlement::Settlement;
